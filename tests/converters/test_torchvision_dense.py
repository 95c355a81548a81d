"""torchvision's FCOS and RetinaNet, live: a user's small model converted, and written back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor, resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import resnet18
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import rcnn
from rcnn.converters.convert import convert_file, export_file
from rcnn.errors import CheckpointError
from rcnn.recipes.checkpoints import read_detector
from rcnn.recipes.heads import FCOSSpec, RetinaNetSpec
from rcnn.recipes.recipe import OneStageSpec
from rcnn.records import Size, Target
from rcnn.transforms.batching import Sample, collate

SIZES = {"min_size": 96, "max_size": 160}
OVERRIDES = ["detector.image.short_side=96", "detector.image.max_long_side=160"]


def fcos() -> nn.Module:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    return FCOS(backbone, num_classes=4, **SIZES)


def retinanet() -> nn.Module:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    return RetinaNet(backbone, num_classes=4, **SIZES)


def retinanet_v2() -> nn.Module:
    """As `retinanet_resnet50_fpn_v2` is built, on a smaller trunk."""
    extra = LastLevelP6P7(512, 256)
    backbone = _resnet_fpn_extractor(resnet18(weights=None), 5, returned_layers=[2, 3, 4], extra_blocks=extra)
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    head = RetinaNetHead(backbone.out_channels, 9, 4, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    head.regression_head._loss_type = "giou"
    return RetinaNet(backbone, num_classes=4, anchor_generator=anchors, head=head, **SIZES)


@pytest.fixture(scope="module", params=[fcos, retinanet, retinanet_v2])
def theirs(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    make: Callable[[], nn.Module] = request.param
    model = make().double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cls_logits" in name:
                # Scores that are far apart and above the thresholds.
                parameter.mul_(30) if name.endswith("weight") else parameter.zero_()
    return model


def converted(theirs: nn.Module, folder: Path) -> Path:
    torch.save({"model": theirs.state_dict()}, folder / "model.pth")
    out = folder / "ours.safetensors"
    report = rcnn.convert(folder / "model.pth", out, classes="cat,dog,bird", overrides=OVERRIDES)
    assert report.system == "torchvision"
    return out


def test_a_users_model_detects_the_same(theirs: nn.Module, tmp_path: Path) -> None:
    loaded = read_detector(converted(theirs, tmp_path))
    assert loaded.classes.names == ("unused 0", "cat", "dog", "bird")
    pixels = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(1)).double()
    nothing = Target(boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    sample = Sample(image=pixels, target=nothing, original_size=Size(96, 128), image_id=0)
    batch, _ = collate([sample], divisor=32)
    with torch.no_grad():
        (expected,) = theirs([pixels / 255])
        (found,) = loaded.detector.double().eval().predict(batch)
    assert len(found) > 20
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.boxes_xyxy, expected["boxes"], rtol=1e-6, atol=1e-5)
    assert found.labels.tolist() == expected["labels"].tolist()


def test_training_goes_on_with_the_same_loss(theirs: nn.Module, tmp_path: Path) -> None:
    """FCOS has a GIoU loss alone, RetinaNet says which."""
    detector = read_detector(converted(theirs, tmp_path)).recipe.detector
    assert isinstance(detector, OneStageSpec)
    assert isinstance(detector.head, FCOSSpec | RetinaNetSpec)
    given = detector.head.box_loss
    found = given if isinstance(given, str) else given.type
    assert found == getattr(theirs.head.regression_head, "_loss_type", "giou")


def test_there_and_back(theirs: nn.Module, tmp_path: Path) -> None:
    lines = export_file(converted(theirs, tmp_path), tmp_path / "back.pth", system="torchvision")
    assert lines[-1] == f"written: {tmp_path / 'back.pth'}"
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    torch.testing.assert_close(back, dict(theirs.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("classes", [None, "cat,dog", "a,b,c,d,e"])
def test_class_names_must_be_given(classes: str | None, tmp_path: Path) -> None:
    torch.save(fcos().state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"4 outputs, and \w+ class names; allowed: 3 names.*--classes"):
        convert_file(tmp_path / "model.pth", tmp_path / "ours.safetensors", classes=classes)


def test_conventions_that_torchvision_lacks_are_listed(tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "detector.head.points.offset=0.5", "detector.image.channel_order=bgr"]
    torch.save(fcos().state_dict(), tmp_path / "model.pth")
    convert_file(tmp_path / "model.pth", tmp_path / "a.safetensors", classes="a,b,c", overrides=overrides)
    with pytest.raises(CheckpointError) as caught:
        export_file(tmp_path / "a.safetensors", tmp_path / "back.pth", system="torchvision")
    text = str(caught.value)
    assert "detector.head.points.offset: 0.5; allowed: 0.0; torchvision has no setting for it" in text
    assert "detector.image.channel_order: bgr; allowed: rgb" in text
    assert not (tmp_path / "back.pth").exists()


def test_the_python_api_reads_it(theirs: nn.Module, tmp_path: Path) -> None:
    predictor = rcnn.load(converted(theirs, tmp_path), device="cpu")
    assert predictor.recipe.detector.image.short_side == 96
