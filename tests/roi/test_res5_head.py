"""The last stage of a ResNet as a box head, against torchvision's own layer4."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torchvision.ops import FrozenBatchNorm2d

from rcnn.backbones.norm import norm_factory
from rcnn.config.edit import edit
from rcnn.detectors.preparation import prepared_detector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.errors import SetupError
from rcnn.recipes.detectron2_catalogue import faster_rcnn_resnet50_c4
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import Recipe
from rcnn.records import ImageBatch, Size
from rcnn.roi.res5_head import Res5Head
from rcnn.roi.stage import RoIStage


def test_it_is_torchvisions_layer4_and_a_mean() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d).double().eval()
    head = Res5Head(depth=18, style="pytorch", make_norm=norm_factory("frozen", 1e-5)).double()
    head.layer4.load_state_dict(theirs.layer4.state_dict())
    pooled = torch.randn(3, head.in_channels, 14, 14, dtype=torch.float64)
    expected = theirs.avgpool(theirs.layer4(pooled)).flatten(1)
    torch.testing.assert_close(head(pooled), expected, rtol=1e-9, atol=1e-9)
    assert (head.in_channels, head.out_features) == (256, 512)
    # No proposal: no row.
    assert head(pooled[:0]).shape == (0, 512)


def small() -> Recipe:
    changes = {"detector.backbone.depth": 18, "detector.proposals.test.post_nms": 50}
    return edit(faster_rcnn_resnet50_c4(), changes)


def test_a_detector_that_is_prepared_finds_the_same() -> None:
    torch.manual_seed(0)
    detector = build_detector(small().detector, num_classes=3, pretrained=False).eval()
    size = Size(96, 128)
    batch = ImageBatch(
        pixels=torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8),
        sizes=(size,),
        original_sizes=(size,),
        image_ids=(0,),
    )
    with torch.inference_mode():
        (expected,), (found,) = detector.predict(batch), prepared_detector(detector).predict(batch)
    torch.testing.assert_close(found.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=0.02)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=5e-4)


def test_it_starts_from_the_backbones_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    theirs = torchvision.models.resnet18(weights=None)
    torch.save(theirs.state_dict(), weights)
    recipe = edit(small(), {"detector.backbone.weights": str(weights)})
    detector = build_detector(recipe.detector, num_classes=3)
    assert isinstance(detector, TwoStageDetector)
    assert isinstance(detector.roi, RoIStage)
    state = detector.state_dict()
    assert not [name for name in state if name.startswith("backbone.layer4")]
    for name, value in theirs.layer4.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(state[f"roi.box_head.layer4.{name}"], value), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"detector.neck": {"type": "none", "index": 3}}, "512 channels at strides 32"),
        ({"detector.neck": {"type": "fpn"}}, "256 channels at strides 4, 8"),
        ({"detector.backbone": {"type": "vgg16"}, "detector.neck.index": 0}, "type vgg16"),
    ],
)
def test_regions_of_another_map_are_refused(changes: dict[str, object], said: str) -> None:
    recipe = edit(small(), {"detector.proposals.head.anchors.sizes_px": [[32.0]]} | changes)
    with pytest.raises(SetupError, match=said), torch.device("meta"):
        build_detector(recipe.detector, num_classes=3, pretrained=False)
