"""detectron2's state dicts: every key of each recorded one, there and back, and what the keys make of the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rcnn.config.edit import edit
from rcnn.converters.coco_classes import coco_80_classes
from rcnn.converters.detectron2_system import Detectron2System
from rcnn.converters.interface import ForeignFile, ForeignModel, Wanted
from rcnn.converters.key_map import Converted
from rcnn.engine.checkpoint import load_into
from rcnn.errors import CheckpointError
from rcnn.recipes import catalogue, detectron2_catalogue
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import FPNSpec, OneStageSpec, Recipe, ResNetSpec, TwoStageSpec
from rcnn.recipes.regions import CascadeSpec, ConvFCSpec, RoIAlignSpec

Layout = Callable[[str], dict[str, Tensor]]
RPN = "proposal_generator.rpn_head"
SYSTEM = Detectron2System()

# What the recorded configs are called here, and what becomes of some of their keys.
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "faster_rcnn_R_50_FPN_1x": (
        "faster_rcnn_resnet50_caffe_fpn",
        {
            "backbone.bottom_up.stem.conv1.norm.running_mean": "backbone.bn1.running_mean",
            "backbone.bottom_up.stem.conv1.weight": "backbone.conv1.weight",
            "backbone.bottom_up.res2.0.shortcut.norm.bias": "backbone.layer1.0.downsample.1.bias",
            "backbone.bottom_up.res5.2.conv3.weight": "backbone.layer4.2.conv3.weight",
            "backbone.fpn_lateral2.weight": "neck.lateral.0.0.weight",
            "backbone.fpn_output5.bias": "neck.output.3.0.bias",
            f"{RPN}.objectness_logits.bias": "proposals.head.tower.classes.bias",
            "roi_heads.box_head.fc1.weight": "roi.box_head.fc6.weight",
            "roi_heads.box_predictor.bbox_pred.bias": "roi.predictor.deltas.bias",
        },
    ),
    "faster_rcnn_R_50_C4_1x": (
        "faster_rcnn_resnet50_c4",
        {
            "backbone.stem.conv1.norm.bias": "backbone.bn1.bias",
            "backbone.res4.5.conv2.weight": "backbone.layer3.5.conv2.weight",
            "roi_heads.res5.0.shortcut.norm.weight": "roi.box_head.layer4.0.downsample.1.weight",
            "roi_heads.res5.2.conv3.norm.running_var": "roi.box_head.layer4.2.bn3.running_var",
            "roi_heads.box_predictor.cls_score.weight": "roi.predictor.classes.weight",
        },
    ),
    "retinanet_R_50_FPN_1x": (
        "retinanet_resnet50_caffe_fpn",
        {
            "backbone.fpn_lateral3.weight": "neck.lateral.0.0.weight",
            "backbone.top_block.p6.weight": "neck.p6.weight",
            # Convolutions have the even numbers.
            "head.cls_subnet.6.weight": "head.tower.class_tower.layers.3.0.weight",
            "head.bbox_subnet.2.bias": "head.tower.box_tower.layers.1.0.bias",
            "head.bbox_pred.weight": "head.tower.deltas.weight",
        },
    ),
}


@pytest.fixture(scope="module")
def layout(shared: Path) -> Layout:
    """A recorded state dict, numbered instead of filled."""

    def read(case: str) -> dict[str, Tensor]:
        manifest = json.loads((shared / "oracles" / "detectron2" / case / "manifest.json").read_text())
        return {
            key: torch.tensor(float(number)).expand(shape)
            for number, (key, shape, _) in enumerate(manifest["state_dict"])
        }

    return read


def recognise(state: Mapping[str, Tensor], wanted: Wanted | None = None, **meta: object) -> ForeignModel:
    return SYSTEM.recognise(ForeignFile(path=Path("model.pth"), tensors=state, meta=meta), wanted or Wanted())


def fitted(model: ForeignModel, changes: Mapping[str, object] | None = None) -> tuple[Converted, nn.Module]:
    """What the model's own recipe, with `changes`, makes of its tensors: they fit the detector that it builds."""
    recipe = edit(model.recipe, changes or {})
    converted = model.key_map(recipe).to_ours(model.tensors)
    with torch.device("meta"):
        detector = build_detector(recipe.detector, num_classes=len(model.classes), pretrained=False)
    load_into(detector, converted.state)
    return converted, detector


def two_stage(recipe: Recipe) -> TwoStageSpec:
    assert isinstance(recipe.detector, TwoStageSpec)
    return recipe.detector


@pytest.mark.parametrize("case", CASES)
def test_every_key_there_and_back(case: str, layout: Layout) -> None:
    name, some = CASES[case]
    state = layout(case)
    assert SYSTEM.signs(ForeignFile(path=Path("model.pth"), tensors=state))
    model = recognise(state)
    assert (model.recipe_name, model.recipe) == (name, catalogue.RECIPES[name]())
    assert model.classes == coco_80_classes()
    assert model.classes.category_ids[-1] == 90
    converted, _ = fitted(model)
    assert set(converted.names) == set(state)
    assert some.items() <= converted.names.items()
    assert set(converted.added) == ({"head.normalizer.mean"} if case.startswith("retinanet") else set())
    back = SYSTEM.export(converted.state, model.recipe)
    assert set(back) == {"model", "__author__"}
    assert_same(back["model"], state)


def assert_same(found: object, expected: Mapping[str, Tensor]) -> None:
    assert isinstance(found, dict)
    assert set(found) == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_anchors_change_places(layout: Layout) -> None:
    """Nine anchors of two classes: theirs are sizes a b c of the first ratio at 0, 3, 6, ours at 0, 1, 2."""
    state = layout("retinanet_R_50_FPN_1x")
    state["head.cls_score.weight"] = torch.ones(18, 1)
    state["head.cls_score.bias"] = torch.arange(18.0)  # anchor n has 2n and 2n + 1
    state["head.bbox_pred.weight"] = torch.arange(9.0).repeat_interleave(4)[:, None].expand(36, 5)
    model = recognise(state, Wanted(class_names=("one", "two")))
    key_map = model.key_map(model.recipe)
    found = key_map.to_ours(state).state
    order = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert found["head.tower.classes.bias"].reshape(9, 2)[:, 0].tolist() == [2.0 * n for n in order]
    assert found["head.tower.classes.bias"].reshape(9, 2)[:, 1].tolist() == [2.0 * n + 1 for n in order]
    assert found["head.tower.deltas.weight"][::4, 4].tolist() == order
    back = key_map.to_theirs(found)
    for name in ("head.cls_score.bias", "head.bbox_pred.weight"):
        assert torch.equal(back[name], state[name])


def test_fifteen_anchors_of_c4_change_places(layout: Layout) -> None:
    """Theirs: five sizes of three ratios each; the second size of the first ratio is at 3, ours at 1."""
    state = layout("faster_rcnn_R_50_C4_1x") | {f"{RPN}.objectness_logits.bias": torch.arange(15.0)}
    model = recognise(state)
    found = model.key_map(model.recipe).to_ours(state).state["proposals.head.tower.classes.bias"]
    assert found.tolist() == [0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14]


# ----------------------------------------------------------------------------------------------- what the keys can tell


def dilated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DC5: res5 is the backbone's, and two layers follow RoIAlign of 7x7 on its 2048 channels."""
    state = {key.replace("roi_heads.res5", "backbone.res5"): value for key, value in state.items()}
    shapes = {
        f"{RPN}.conv.weight": (2048, 2048, 3, 3),
        f"{RPN}.conv.bias": (2048,),
        f"{RPN}.objectness_logits.weight": (15, 2048, 1, 1),
        f"{RPN}.anchor_deltas.weight": (60, 2048, 1, 1),
        "roi_heads.box_head.fc1.weight": (1024, 2048 * 49),
        "roi_heads.box_head.fc1.bias": (1024,),
        "roi_heads.box_head.fc2.weight": (1024, 1024),
        "roi_heads.box_head.fc2.bias": (1024,),
        "roi_heads.box_predictor.cls_score.weight": (81, 1024),
        "roi_heads.box_predictor.bbox_pred.weight": (320, 1024),
    }
    return state | {key: torch.tensor(1.0).expand(shape) for key, shape in shapes.items()}


def test_a_dilated_c5(layout: Layout) -> None:
    state = dilated(layout("faster_rcnn_R_50_C4_1x"))
    model = recognise(state)
    assert model.recipe == detectron2_catalogue.faster_rcnn_resnet50_dc5()
    converted, detector = fitted(model)
    assert converted.names["backbone.res5.0.conv1.weight"] == "backbone.layer4.0.conv1.weight"
    assert detector.get_submodule("backbone.layer4.1.conv2").dilation == (2, 2)
    assert_same(SYSTEM.export(converted.state, model.recipe)["model"], state)


def test_a_cascade(layout: Layout) -> None:
    state = layout("faster_rcnn_R_50_FPN_1x")
    for key in [key for key in state if key.startswith(("roi_heads.box_head.", "roi_heads.box_predictor."))]:
        value = state.pop(key)
        value = value[:4] if "bbox_pred" in key else value
        head, part, rest = key.split(".", 2)
        state |= {f"{head}.{part}.{stage}.{rest}": value for stage in range(3)}
    model = recognise(state)
    assert isinstance(two_stage(model.recipe).roi, CascadeSpec)
    converted, _ = fitted(model)
    assert converted.names["roi_heads.box_head.2.fc1.weight"] == "roi.stages.2.box_head.fc6.weight"
    assert_same(SYSTEM.export(converted.state, model.recipe)["model"], state)


def test_norms_that_are_trained_and_convolutions_in_the_box_head(layout: Layout) -> None:
    """As detectron2's newer baselines: batch norms everywhere, four convolutions in the box head, two in the RPN."""
    state = with_norms(layout("faster_rcnn_R_50_FPN_1x"))
    model = recognise(state, Wanted(class_names=tuple(map(str, range(80)))))
    detector = two_stage(model.recipe)
    assert isinstance(detector.backbone, ResNetSpec) and isinstance(detector.neck, FPNSpec)
    assert (detector.backbone.norm, detector.neck.norm) == ("sync", "sync")
    assert detector.roi.box_head == ConvFCSpec(norm="sync")
    converted, _ = fitted(model)
    assert not converted.dropped
    assert converted.names["roi_heads.box_head.conv4.norm.bias"] == "roi.box_head.convs.3.1.bias"
    assert converted.names[f"{RPN}.conv.conv1.bias"] == "proposals.head.tower.convs.1.bias"
    assert_same(SYSTEM.export(converted.state, model.recipe)["model"], state)


def with_norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for key in [key for key in state if key.endswith(".norm.running_var")]:
        state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    for level in range(2, 6):
        for kind in ("lateral", "output"):
            del state[f"backbone.fpn_{kind}{level}.bias"]
            state |= norm(f"backbone.fpn_{kind}{level}.norm")
    for kind in ("weight", "bias"):
        value = state.pop(f"{RPN}.conv.{kind}")
        state |= {f"{RPN}.conv.conv{number}.{kind}": value for number in (0, 1)}
        del state[f"roi_heads.box_head.fc2.{kind}"]
    for number in range(1, 5):
        state[f"roi_heads.box_head.conv{number}.weight"] = torch.zeros(()).expand(256, 256, 3, 3)
        state |= norm(f"roi_heads.box_head.conv{number}.norm")
    return state


def norm(place: str) -> dict[str, Tensor]:
    entries = {kind: torch.ones(256) for kind in ("weight", "bias", "running_mean", "running_var")}
    return {f"{place}.{kind}": value for kind, value in (entries | {"num_batches_tracked": torch.tensor(7)}).items()}


def test_frozen_norms_can_go_on_trained(layout: Layout) -> None:
    model = recognise(layout("faster_rcnn_R_50_FPN_1x"))
    converted, _ = fitted(model, {"detector.backbone.norm": "batch"})
    # 53 convolutions have a norm each.
    assert len([name for name in converted.added if name.endswith("num_batches_tracked")]) == 53


def test_constants_of_older_files(layout: Layout) -> None:
    """Its means tell blue first, or torchvision's backbone; its corners the anchors. Masks are left out."""
    state = layout("faster_rcnn_R_50_FPN_1x")
    # Sizes 32 to 512 at the ratios 1 and 2: at ratio 2, 22.63 wide and 45.25 high for size 32.
    shapes = {size: torch.tensor([[size, size], [size / 2**0.5, size * 2**0.5]]) for size in (32, 64, 128, 256, 512)}
    constants = {
        "pixel_mean": torch.tensor([123.675, 116.28, 103.53])[:, None, None],
        "pixel_std": torch.tensor([58.395, 57.12, 57.375])[:, None, None],
        "backbone.bottom_up.stem.conv1.norm.num_batches_tracked": torch.ones(()),
        "roi_heads.mask_head.deconv.weight": torch.ones(1),
    } | {
        f"proposal_generator.anchor_generator.cell_anchors.{level}": torch.cat((-shape / 2, shape / 2), dim=1)
        for level, shape in enumerate(shapes.values())
    }
    two_ratios = {f"{RPN}.objectness_logits": 2, f"{RPN}.anchor_deltas": 8}
    fewer = {
        f"{place}.{kind}": state[f"{place}.{kind}"][:rows]
        for place, rows in two_ratios.items()
        for kind in ("weight", "bias")
    }
    model = recognise(state | constants | fewer)
    detector = two_stage(model.recipe)
    assert (detector.image.channel_order, detector.image.mean) == ("rgb", (123.675, 116.28, 103.53))
    assert isinstance(detector.backbone, ResNetSpec)
    assert detector.backbone.style == "pytorch"
    converted, _ = fitted(model, {"detector.backbone.norm": "frozen"})
    assert set(converted.dropped) == set(constants)
    anchors = detector.proposals.head.anchors  # type: ignore[union-attr]
    assert anchors.heights_over_widths == (1.0, 2.0)
    assert anchors.sizes_px == ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))


def test_norms_of_version_2_get_their_epsilon(layout: Layout) -> None:
    state = layout("faster_rcnn_R_50_FPN_1x")
    place = "backbone.bottom_up.res2.0.conv1.norm"
    versions = {place: {"version": 2}, "backbone.bottom_up.res2.0.conv2.norm": {"version": 3}}
    tensors = recognise(state, _metadata=versions).tensors
    assert torch.equal(tensors[f"{place}.running_var"], state[f"{place}.running_var"] - 1e-5)
    other = "backbone.bottom_up.res2.0.conv2.norm.running_var"
    assert torch.equal(tensors[other], state[other])
    # torch's own batch norms are of version 2 as well.
    counted = state | {f"{place}.num_batches_tracked": torch.tensor(3)}
    assert torch.equal(
        recognise(counted, _metadata=versions).tensors[f"{place}.running_var"], state[f"{place}.running_var"]
    )


# ------------------------------------------------------------------------------------------------------ what is refused


def test_keys_that_are_none_of_these(layout: Layout) -> None:
    assert SYSTEM.signs(ForeignFile(path=Path("x"), tensors={"model.0.weight": torch.ones(1)})) is None
    with pytest.raises(CheckpointError, match=r"head\.cls_score\.weight"):
        recognise({"model.0.weight": torch.ones(1)})
    state = layout("retinanet_R_50_FPN_1x") | {"head.ctrness.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"head\.ctrness\.weight: no rule"):
        fitted(recognise(state))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"backbone.fpn_lateral2.norm.weight": (256,)}, "group norms"),
        ({"backbone.bottom_up.res3.0.conv2_offset.weight": (18, 128, 3, 3)}, "deformable convolutions"),
        # ResNeXt-101 32x8d: as many blocks as a ResNet-101, of other widths.
        ({"backbone.bottom_up.res2.0.conv2.weight": (256, 8, 3, 3)}, "no ResNeXt"),
        ({"backbone.bottom_up.res2.3.conv1.weight": (64, 256, 1, 1)}, r"blocks|stages of \(4, 4, 6, 3\)"),
        ({f"{RPN}.objectness_logits.weight": (5, 256, 1, 1)}, "5 in a cell.*allowed: 3"),
        ({"roi_heads.box_predictor.cls_score.weight": (6, 1024)}, "5 classes, and no class names"),
    ],
)
def test_what_is_not_built_here(more: Mapping[str, tuple[int, ...]], said: str, layout: Layout) -> None:
    state = layout("faster_rcnn_R_50_FPN_1x")
    with pytest.raises(CheckpointError, match=said):
        recognise(state | {key: torch.zeros(()).expand(shape) for key, shape in more.items()})


def test_a_recipe_of_the_user_keeps_its_conventions(layout: Layout) -> None:
    given = edit(detectron2_catalogue.faster_rcnn_resnet50_caffe_fpn(), {"detector.backbone.style": "pytorch"})
    model = recognise(layout("faster_rcnn_R_50_FPN_1x"), Wanted(recipe_name="mine.yaml", recipe=given))
    assert (model.recipe_name, model.recipe) == ("mine.yaml", given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"detector.image.kernel": "bilinear_uint8"}, "detector.image.kernel: bilinear_uint8"),
        ({"detector.proposals.head.coder.symmetric_clamp": True}, "symmetric_clamp"),
        ({"detector.roi.pooling": RoIAlignSpec()}, "epsilon_place"),
    ],
)
def test_what_detectron2_cannot_compute_is_not_written(changes: dict[str, object], said: str, layout: Layout) -> None:
    model = recognise(layout("faster_rcnn_R_50_FPN_1x"))
    converted, _ = fitted(model)
    with pytest.raises(CheckpointError, match=said):
        SYSTEM.export(converted.state, edit(model.recipe, changes))


def test_a_head_that_detectron2_does_not_have() -> None:
    recipe = catalogue.RECIPES["fcos_resnet50_caffe_fpn_gn"]()
    assert isinstance(recipe.detector, OneStageSpec)
    with pytest.raises(CheckpointError, match=r"detector\.head\.type"):
        SYSTEM.export({}, recipe)
