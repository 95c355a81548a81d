"""From specs to built parts: published sizes, what does not fit together, and where weights go."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from rcnn.backbones.norm import SyncBatchNorm
from rcnn.config.edit import edit
from rcnn.dense.rpn import RPNHead
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.errors import SetupError
from rcnn.recipes import models
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import Recipe
from rcnn.roi.box_head import TwoFCHead


def build(recipe: Recipe, num_classes: int = 3, *, pretrained: bool = False) -> TwoStageDetector:
    return build_detector(recipe.detector, num_classes=num_classes, pretrained=pretrained)


# torchvision's weight pages state the parameters of its COCO models: 91 outputs, our 90 classes and the background.
PUBLISHED = {
    "faster_rcnn_resnet50_fpn": 41_755_286,
    "faster_rcnn_resnet50_fpn_v2": 43_712_278,
    "faster_rcnn_mobilenet_v3_large_fpn": 19_386_354,
    "faster_rcnn_mobilenet_v3_large_320_fpn": 19_386_354,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        detector = build(RECIPES[name](), num_classes=90)
    # torchvision has a box for the background too, which nothing reads: 4 rows of 1024 weights and a bias, 4100.
    assert sum(parameter.numel() for parameter in detector.parameters()) == PUBLISHED[name] - 4 * (1024 + 1)


def test_vgg16_on_voc() -> None:
    """The paper's network, counted by hand."""
    with torch.device("meta"):
        detector = build(RECIPES["faster_rcnn_vgg16"](), num_classes=20)
    # VGG16 (Simonyan and Zisserman, 2014) has 138,357,544: without its last layer, 1000 * (4096 + 1) = 4,097,000,
    # 134,260,544. RPN: 512 * (512 * 9 + 1) = 2,359,808, and on 512 channels 9 scores and 36 deltas, 45 * 513 = 23,085.
    # Predictor: 21 scores and 80 deltas on 4096 features, 101 * 4097 = 413,797.
    assert sum(parameter.numel() for parameter in detector.parameters()) == 134_260_544 + 2_359_808 + 23_085 + 413_797


def test_numbers_of_a_recipe_reach_the_parts() -> None:
    with torch.device("meta"):
        detector = build(RECIPES["faster_rcnn_vgg16"](), num_classes=20)
    head = detector.proposals.head
    assert isinstance(head, RPNHead)
    assert head.border_px == 0
    assert head.anchors.centre_offset == 0.5
    assert head.coder.max_log_ratio is None
    test = detector.proposals.test_filter
    assert (test.pre_nms, test.post_nms, test.min_side_px, test.side_frame, test.side_test) == (
        6000,
        300,
        16.0,
        "original",
        "before_pre_nms",
    )
    assert (detector.proposals.train_filter.pre_nms, detector.proposals.train_filter.post_nms) == (12000, 2000)
    roi = detector.roi
    assert roi.coder.weights == (10.0, 10.0, 5.0, 5.0)
    assert (roi.detection_filter.nms_iou, roi.detection_filter.max_detections) == (0.3, None)


def test_norms_of_v2_are_synchronised() -> None:
    with torch.device("meta"):
        detector = build(RECIPES["faster_rcnn_resnet50_fpn_v2"]())
    # 53 in ResNet-50, 8 in the FPN, 4 in the box head.
    assert sum(isinstance(module, SyncBatchNorm) for module in detector.modules()) == 53 + 8 + 4


# ---------------------------------------------------------------------------------------------------- what does not fit

RESNET18 = RECIPES["faster_rcnn_resnet18_fpn"]()


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            {"detector.neck.first_map": 4},
            r"first_map: 4; allowed: the backbone gives 4 maps, at strides \(4, 8, 16, 32\)",
        ),
        ({"detector.neck": {"type": "none", "index": 4}}, "index: 4"),
        ({"detector.neck": {"type": "none", "index": -5}}, "index: -5"),
        ({"detector.proposals.head.anchors.sizes_px": ((32.0,), (64.0,))}, "2 lists .* the neck gives 5 maps"),
        ({"detector.neck.extra": "none"}, "5 lists .* the neck gives 4 maps"),
        (
            {"detector.proposals.head.anchors.sizes_px": ((1.0,), (2.0,), (3.0,), (4.0,), (5.0, 6.0))},
            r"sizes \[1, 1, 1, 1, 2\]|\[1, 1, 1, 1, 2\] sizes",
        ),
        (
            {
                "detector.backbone": {"type": "timm", "name": "resnet10t", "frozen_stages": 5},
                "detector.neck.first_map": 9,
            },
            "9",
        ),
    ],
)
def test_parts_that_do_not_fit(edits: dict[str, object], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        build(edit(RESNET18, edits))


# -------------------------------------------------------------------------------------------------------------- weights


def with_backbone_file(path: Path) -> Recipe:
    return edit(RESNET18, {"detector.backbone.weights": str(path)})


def test_a_file_starts_the_backbone(shared: Path) -> None:
    path = shared / "weights" / "resnet18_backbone.pth"
    detector = build(with_backbone_file(path), pretrained=True)
    stored = torch.load(path, weights_only=True)
    torch.testing.assert_close(
        detector.backbone.state_dict()["layer4.1.conv2.weight"], stored["layer4.1.conv2.weight"].float()
    )


def test_c4_keeps_no_layer_that_no_map_needs(shared: Path) -> None:
    """The file is whole, the backbone is not: layer4 is checked, and then dropped."""
    recipe = edit(
        with_backbone_file(shared / "weights" / "resnet18_backbone.pth"),
        {
            "detector.neck": {"type": "none", "index": -2},
            "detector.proposals.head.anchors.sizes_px": ((32.0, 64.0),),
        },
    )
    detector = build(recipe, pretrained=True)
    assert detector.strides_px == (16,)
    assert not any("layer4" in name for name in detector.state_dict())
    assert set(build(recipe).state_dict()) == set(detector.state_dict())


def test_a_checkpoint_is_all_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pretrained=False` looks for no file and no hub."""

    def refuse(*args: object) -> None:
        raise AssertionError("asked for weights")

    monkeypatch.setattr(models, "backbone_file", refuse)
    monkeypatch.setattr(models, "imagenet_tensors", refuse)
    timm = edit(RESNET18, {"detector.backbone": {"type": "timm", "name": "resnet10t"}})
    for recipe in (RESNET18, timm, RECIPES["faster_rcnn_efficientnet_lite0_fpn"]()):
        build(recipe)
        with pytest.raises(AssertionError, match="asked for weights"):
            build(recipe, pretrained=True)


def test_timms_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = edit(RESNET18, {"detector.backbone": {"type": "timm", "name": "resnet10t", "norm": "frozen"}})
    import timm

    tensors = {
        name: torch.full_like(value, 0.5)
        for name, value in timm.create_model("resnet10t", features_only=True).state_dict().items()
    }
    monkeypatch.setattr(models, "imagenet_tensors", lambda name: tensors)
    state = build(recipe, pretrained=True).backbone.state_dict()
    assert all((value == 0.5).all() for value in state.values())


def small_vgg(**edits: object) -> Recipe:
    return edit(RECIPES["faster_rcnn_vgg16"](), {"detector.backbone.weights": "vgg16.pth", **edits})


@pytest.fixture
def vgg_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """VGG16's layout without its memory: each layer is one number."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        state = vgg16(weights=None).state_dict()
    tensors = {
        name: torch.tensor(float(number)).expand(value.shape) for number, (name, value) in enumerate(state.items())
    }
    monkeypatch.setattr(models, "read_tensors", lambda path: tensors)
    return tensors


def test_vggs_fully_connected_layers_start_the_box_head(vgg_file: dict[str, torch.Tensor]) -> None:
    box_head = build(small_vgg(), pretrained=True).roi.box_head
    assert isinstance(box_head, TwoFCHead)
    for layer, theirs in ((box_head.fc6, "classifier.0"), (box_head.fc7, "classifier.3")):
        assert (layer.weight == vgg_file[f"{theirs}.weight"][0, 0]).all()
        assert (layer.bias == vgg_file[f"{theirs}.bias"][0]).all()


def test_a_pooling_that_they_do_not_fit(vgg_file: dict[str, torch.Tensor]) -> None:
    with pytest.raises(SetupError, match=r"fc6\.weight: shape \(4096, 12800\)") as caught:
        build(small_vgg(**{"detector.roi.pooling.output_size": 5}), pretrained=True)
    assert "output_size=7" in str(caught.value)


def test_other_heads_and_backbones_take_none_of_them(vgg_file: dict[str, torch.Tensor]) -> None:
    build(small_vgg(**{"detector.roi.box_head": {"type": "two_fc", "features": 64}}), pretrained=True)
    # MobileNetV3's classifier has layers 0 and 3 too.
    recipe = edit(
        RECIPES["faster_rcnn_mobilenet_v3_large_fpn"](),
        {
            "detector.backbone.weights": "mobilenet.pth",
            "detector.neck.channels": 8,
            "detector.roi.box_head": {"type": "vgg_fc"},
        },
    )
    from torchvision.models import mobilenet_v3_large

    vgg_file.clear()
    vgg_file.update(mobilenet_v3_large(weights=None).state_dict())
    build(recipe, pretrained=True)


# --------------------------------------------------------------------------------------------------------- whole models


def test_a_copy_is_independent() -> None:
    detector = build(RESNET18)
    twin = copy.deepcopy(detector)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert detector.backbone.get_parameter("conv1.weight").any()


def test_the_network_sees_normalised_pixels() -> None:
    # EfficientNet-Lite was trained on (pixel - 127) / 128 (MEAN_RGB and STDDEV_RGB of its authors' code).
    detector = build(RECIPES["faster_rcnn_efficientnet_lite0_fpn"]())
    assert detector.normalizer.mean_values == (127.0, 127.0, 127.0)
    assert detector.normalizer.std_values == (128.0, 128.0, 128.0)
