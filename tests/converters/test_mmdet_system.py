"""MMDetection files as recipes: what keys and shapes say, what the file says beside them, and what is assumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.config.text import to_yaml
from rcnn.converters.coco_classes import coco_80_classes
from rcnn.converters.convert import convert_file
from rcnn.converters.interface import ForeignFile, ForeignModel, Wanted
from rcnn.converters.mmdet_system import MMDetectionSystem
from rcnn.engine.checkpoint import Checkpoint, CheckpointMeta, differences
from rcnn.errors import CheckpointError
from rcnn.recipes import dense_catalogue
from rcnn.recipes.heads import FCOSSpec, RetinaNetSpec, RPNSpec
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import (
    FirstStageSpec,
    FPNSpec,
    GivenProposalsSpec,
    OneStageSpec,
    ProposalsSpec,
    Recipe,
    ResNetSpec,
    TwoStageSpec,
)
from rcnn.recipes.regions import CascadeSpec, ConvFCSpec, RoIAlignSpec, TwoFCSpec
from rcnn.recipes.starts import StartFile
from rcnn.recipes.warm_start import start_first_stage
from rcnn.records import ClassTable

State = dict[str, Tensor]
Layout = Callable[[str], State]
CASES = (
    "atss_r50_fpn_1x",
    "cascade-rcnn_r50_fpn_1x",
    "faster-rcnn_r50-caffe_fpn_fcos-rpn_1x",
    "faster-rcnn_r50_fpn_1x",
    "faster-rcnn_r50_fpn_fcos-rpn_1x",
    "fcos_r50-caffe_fpn_gn-head_1x",
    "gfl_r50_fpn_1x",
    "retinanet_r50_fpn_1x",
    "rpn_r50_fpn_1x",
)
FASTER = "faster-rcnn_r50_fpn_1x"


@pytest.fixture(scope="module")
def layout(shared: Path) -> Layout:
    """A recorded state dict without its numbers."""

    def read(case: str) -> State:
        manifest = json.loads((shared / "oracles" / "mmdetection" / case / "manifest.json").read_text())
        return {key: torch.empty(shape, device="meta") for key, shape, _ in manifest["state_dict"]}

    return read


def recognised(
    state: Mapping[str, Tensor], *, name: str = "some.pth", wanted: Wanted | None = None, **meta: object
) -> ForeignModel:
    file = ForeignFile(path=Path(name), tensors=state, meta={"meta": meta})
    return MMDetectionSystem().recognise(file, wanted or Wanted())


def built_state(recipe: Recipe, num_classes: int) -> State:
    with torch.device("meta"):
        return build_detector(recipe.detector, num_classes=num_classes, pretrained=False).state_dict()


def misfits(model: ForeignModel) -> list[str]:
    converted = model.key_map(model.recipe).to_ours(model.tensors)
    return [str(problem) for problem in differences(built_state(model.recipe, len(model.classes)), converted.state)]


# ------------------------------------------------------------------------------------------------- structure of a file


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_layout_builds_and_goes_back(case: str, layout: Layout) -> None:
    state = layout(case)
    model = recognised(state, name=f"{case}.pth")
    assert misfits(model) == []
    exported = MMDetectionSystem().export(built_state(model.recipe, len(model.classes)), model.recipe)
    back = exported["state_dict"]
    assert isinstance(back, dict)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("case", CASES)
def test_numbers_go_back_unchanged(case: str, layout: Layout) -> None:
    """Of a numbered state dict, but for the counts of frozen norms, which start at 0."""
    state = {
        key: torch.tensor(float(number)).expand(value.shape) for number, (key, value) in enumerate(layout(case).items())
    }
    model = recognised(state, name=f"{case}.pth")
    converted = model.key_map(model.recipe).to_ours(model.tensors)
    back = MMDetectionSystem().export(converted.state, model.recipe)["state_dict"]
    assert isinstance(back, dict)
    assert back.keys() == state.keys()
    assert all(value is state[key] for key, value in back.items() if key not in converted.dropped)
    assert all(value == 0 for key, value in back.items() if key in converted.dropped)


def test_a_classifier_of_mmpretrain_is_a_backbone(tmp_path: Path) -> None:
    """`auto` finds the system, and what is written has torchvision's names."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18().state_dict()
    theirs = {f"backbone.{name}": value for name, value in resnet.items() if not name.startswith("fc.")}
    state = {**theirs, "head.fc.weight": resnet["fc.weight"], "head.fc.bias": resnet["fc.bias"]}
    torch.save({"meta": {"mmcls_version": "0.23.0"}, "state_dict": state}, tmp_path / "resnet18.pth")
    report = convert_file(tmp_path / "resnet18.pth", tmp_path / "out.safetensors")
    assert (report.system, len(report.converted.dropped)) == ("mmdet", 2)
    written = safetensors.torch.load_file(tmp_path / "out.safetensors")
    expected = {name: value for name, value in resnet.items() if not name.startswith("fc.")}
    torch.testing.assert_close(written, expected, rtol=0, atol=0)


def test_class_names_go_back(layout: Layout) -> None:
    """Where version 3 looks for them (`dataset_meta`) and where version 2 does (`CLASSES`)."""
    names = tuple(f"kind {number}" for number in range(80))
    model = recognised(layout(FASTER), CLASSES=names)
    state = built_state(model.recipe, 80)
    meta = MMDetectionSystem().export(state, model.recipe, model.classes)["meta"]
    assert isinstance(meta, dict)
    assert meta["dataset_meta"] == {"classes": names}
    assert meta["CLASSES"] == names
    assert recognised(layout(FASTER), **meta).classes == model.classes == ClassTable(names=names)


def test_classes_that_the_config_inside_chooses(layout: Layout) -> None:
    names = tuple(f"kind {number}" for number in range(80))
    chosen = edit(recognised(layout(FASTER)).recipe, {"data.classes": names})
    model = recognised(layout(FASTER), wanted=Wanted(recipe=chosen))
    assert model.classes.names == names
    named = recognised(layout(FASTER), wanted=Wanted(recipe=chosen, class_names=names[::-1]))
    assert named.classes.names == named.recipe.data.classes == names[::-1]


def test_signs(layout: Layout) -> None:
    system = MMDetectionSystem()
    for case in CASES:
        assert system.signs(ForeignFile(path=Path("x.pth"), tensors=layout(case)))
    theirs = {"backbone.bottom_up.stem.conv1.weight": torch.ones(1)}
    assert system.signs(ForeignFile(path=Path("x.pth"), tensors=theirs)) is None
    named = ForeignFile(path=Path("x.pth"), tensors=theirs, meta={"meta": {"mmdet_version": "2.11.0"}})
    assert system.signs(named) == "its meta has mmdet_version 2.11.0"


def of_two_fc(num_classes: int, boxes: int) -> State:
    """A second stage of 7x7 cells of 256 channels, with 64 features."""
    shapes = {
        "fc_cls.weight": (num_classes + 1, 64),
        "fc_cls.bias": (num_classes + 1,),
        "fc_reg.weight": (4 * boxes, 64),
        "fc_reg.bias": (4 * boxes,),
        "shared_fcs.0.weight": (64, 49 * 256),
        "shared_fcs.0.bias": (64,),
        "shared_fcs.1.weight": (64, 64),
        "shared_fcs.1.bias": (64,),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def with_regions(state: State, regions: State) -> State:
    own = {key: value for key, value in state.items() if not key.startswith("roi_head.")}
    return own | {f"roi_head.bbox_head.{key}": value for key, value in regions.items()}


def test_the_second_stage_by_its_shapes(layout: Layout) -> None:
    state = with_regions(layout(FASTER), of_two_fc(num_classes=3, boxes=1))
    model = recognised(state, CLASSES=["a", "b", "c"])
    assert misfits(model) == []
    detector = model.recipe.detector
    assert isinstance(detector, TwoStageSpec)
    assert detector.roi.regression == "agnostic"
    assert detector.roi.box_head == TwoFCSpec(features=64)
    assert model.classes.names == ("a", "b", "c")


def test_a_box_head_of_convolutions(layout: Layout) -> None:
    """Shared4Conv1FCBBoxHead with SyncBN, whose keys are those of batch norm; 5x5 cells."""
    regions = {key: value for key, value in of_two_fc(3, 3).items() if not key.startswith("shared_fcs")}
    for number in range(2):
        place = f"shared_convs.{number}"
        regions[f"{place}.conv.weight"] = torch.empty(32, 256 if number == 0 else 32, 3, 3, device="meta")
        for kind in ("weight", "bias", "running_mean", "running_var"):
            regions[f"{place}.bn.{kind}"] = torch.empty(32, device="meta")
        regions[f"{place}.bn.num_batches_tracked"] = torch.empty((), device="meta")
    regions |= {
        "shared_fcs.0.weight": torch.empty(64, 25 * 32, device="meta"),
        "shared_fcs.0.bias": torch.empty(64, device="meta"),
    }
    model = recognised(with_regions(layout(FASTER), regions), CLASSES=["a", "b", "c"])
    assert misfits(model) == []
    detector = model.recipe.detector
    assert isinstance(detector, TwoStageSpec)
    assert detector.roi.box_head == ConvFCSpec(num_convs=2, channels=32, features=64, norm="batch")
    assert detector.roi.pooling.output_size == 5


def test_a_second_stage_alone_is_given_its_proposals(layout: Layout) -> None:
    state = {key: value for key, value in layout(FASTER).items() if not key.startswith("rpn_head.")}
    model = recognised(state)
    assert misfits(model) == []
    detector = model.recipe.detector
    assert isinstance(detector, TwoStageSpec)
    assert isinstance(detector.proposals, GivenProposalsSpec)


def test_the_rpn_detector_of_version_2(layout: Layout) -> None:
    """It kept its head as `rpn_head`."""
    state = {key: value for key, value in layout(FASTER).items() if not key.startswith("roi_head.")}
    model = recognised(state)
    assert misfits(model) == []
    assert isinstance(model.recipe.detector, FirstStageSpec)
    assert model.recipe.detector.proposals.test.pre_nms == 2000
    assert model.classes.names == ("object",)
    assert model.recipe == recognised(layout("rpn_r50_fpn_1x")).recipe


@pytest.mark.parametrize("case", ["retinanet_r50_fpn_1x", "atss_r50_fpn_1x", "gfl_r50_fpn_1x"])
def test_any_dense_head_is_a_first_stage(case: str, layout: Layout) -> None:
    dense = {
        key.replace("bbox_head.", "rpn_head."): value
        for key, value in layout(case).items()
        if not re.search(r"_cls\.", key)
    }
    name = next(key for key in layout(case) if key.endswith("_cls.weight"))
    rows = 9 if case.startswith("retinanet") else 1
    outputs = {"weight": (rows, 256, 3, 3), "bias": (rows,)}
    prefix = name.replace("bbox_head.", "rpn_head.").removesuffix("weight")
    dense |= {f"{prefix}{kind}": torch.empty(shape, device="meta") for kind, shape in outputs.items()}
    model = recognised(with_regions(dense, of_two_fc(80, 80)))
    assert misfits(model) == []
    detector = model.recipe.detector
    assert isinstance(detector, TwoStageSpec)
    assert isinstance(detector.proposals, ProposalsSpec)
    assert (detector.proposals.head.type, detector.proposals.scope) == (case.split("_")[0], "joint")


def test_a_resnet_18_without_group_norms(layout: Layout) -> None:
    """FCOS on ResNet-18: what its recipe builds, exported, is recognised again."""
    recipe = dense_catalogue.fcos_resnet50_caffe_fpn_gn()
    small = edit(
        recipe,
        {
            "detector.backbone.depth": 18,
            "detector.neck.channels": 32,
            "detector.head.norm": "none",
            "detector.head.num_convs": 2,
            "detector.head.channels": 48,
        },
    )
    exported = MMDetectionSystem().export(built_state(small, 80), small)["state_dict"]
    assert isinstance(exported, dict)
    model = recognised(exported, name="fcos_r18_caffe.pth")
    assert misfits(model) == []
    assert model.recipe.detector == small.detector


# ------------------------------------------------------------------------------------------- what keys do not show


def test_pictures_by_style(layout: Layout) -> None:
    """From the file's name, the config inside, and for FCOS with group norm from what MMDetection publishes."""
    state, fcos = layout(FASTER), layout("fcos_r50-caffe_fpn_gn-head_1x")
    plain, caffe = recognised(state).recipe.detector, recognised(state, name="x_r50_caffe_fpn.pth").recipe.detector
    assert isinstance(plain.backbone, ResNetSpec)
    assert isinstance(caffe.backbone, ResNetSpec)
    assert (plain.image.channel_order, plain.backbone.style) == ("rgb", "pytorch")
    assert plain.backbone.norm == "fixed_statistics"
    assert (caffe.image.channel_order, caffe.image.mean) == ("bgr", (103.53, 116.28, 123.675))
    assert (caffe.backbone.style, caffe.backbone.norm) == ("caffe", "frozen")
    of_fcos = recognised(fcos).recipe.detector
    assert of_fcos.image.mean == (102.9801, 115.9465, 122.7717)
    inside = "model = dict(backbone=dict(style='pytorch'))"
    assert recognised(fcos, cfg=inside).recipe.detector.image.channel_order == "rgb"
    assert any("style caffe" in text for text in recognised(fcos).assumptions)
    assert not any("style" in text and "backbone" in text for text in recognised(fcos, cfg=inside).assumptions)


CONFIG_OF_2 = """
model = dict(
    type='FCOS',
    backbone=dict(type='ResNet', depth=50, norm_cfg=dict(type='BN', requires_grad=False), style='caffe'),
    neck=dict(type='FPN', relu_before_extra_convs=False),
    bbox_head=dict(
        type='FCOSHead', norm_on_bbox=True, centerness_on_reg=True, center_sampling=True, center_sample_radius=2.5))
img_norm_cfg = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)
data = dict(train=dict(pipeline=[dict(type=open('/nowhere'))]))
"""


def test_the_config_inside(layout: Layout) -> None:
    detector = recognised(layout("fcos_r50-caffe_fpn_gn-head_1x"), config=CONFIG_OF_2).recipe.detector
    assert isinstance(detector, OneStageSpec)
    assert (detector.image.mean, detector.image.std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert detector.image.channel_order == "rgb"
    assert isinstance(detector.neck, FPNSpec)
    assert detector.neck.p7_activation == "none"
    head = detector.head
    assert isinstance(head, FCOSSpec)
    assert (head.distances, head.centerness_branch, head.matcher.radius_strides) == ("relu", "boxes", 2.5)


# What MMDetection 3 writes beside `model` in the text of a config: here the least that says the rest.
CONFIG_OF_3 = """
train_dataloader = dict(batch_size=2, dataset=dict(type='CocoDataset', data_root='/nowhere', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True), dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')]))
val_dataloader = dict(batch_size=1, dataset=dict(type='CocoDataset', data_root='/nowhere', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]))
val_evaluator = dict(type='CocoMetric', metric='bbox')
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=7)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001))
param_scheduler = [dict(type='MultiStepLR', begin=0, end=7, by_epoch=True, milestones=[4, 6], gamma=0.1)]
load_from = '/nowhere/else.pth'
"""


def as_text(value: object) -> str:
    """As mmengine writes it."""
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key}={as_text(inner)}' for key, inner in value.items())})"
    return f"[{', '.join(map(as_text, value))}]" if isinstance(value, list) else repr(value)


@pytest.mark.parametrize("case", CASES)
def test_the_config_inside_says_what_the_keys_do(case: str, shared: Path, layout: Layout) -> None:
    """Two ways to one detector: the converter's own of the keys, and that of configs, on the recorded config."""
    manifest = json.loads((shared / "oracles" / "mmdetection" / case / "manifest.json").read_text())
    text = f"model = {as_text(manifest['config']['model'])}\n{CONFIG_OF_3}"
    inside = recognised(layout(case), cfg=text)
    assert inside.recipe_name.endswith("by the config inside")
    detector = recognised(layout(case), name=f"{case}.pth").recipe.detector
    assert inside.recipe.detector == detector
    # Where its data and its start were is not the user's.
    assert (inside.recipe.data.path, inside.recipe.train.init_from) == (None, None)
    assert inside.recipe.train.epochs == 7


def test_a_config_inside_of_another_structure(layout: Layout, shared: Path) -> None:
    manifest = json.loads((shared / "oracles" / "mmdetection" / FASTER / "manifest.json").read_text())
    manifest["config"]["model"]["backbone"]["depth"] = 101
    model = recognised(layout(FASTER), cfg=f"model = {as_text(manifest['config']['model'])}\n{CONFIG_OF_3}")
    assert any("of another structure than the tensors" in text for text in model.assumptions)
    assert isinstance(model.recipe.detector.backbone, ResNetSpec)
    assert model.recipe.detector.backbone.depth == 50
    reads_files = recognised(layout(FASTER), cfg="_base_ = ['/etc/passwd']\nmodel = dict(backbone=dict(style='caffe'))")
    assert reads_files.recipe.detector.image.channel_order == "bgr"


@pytest.mark.parametrize("text", ["model = [" * 300, "x = " + "-" * 20000 + "1", "model = 1\0", "model = {[]: 1}", "("])
def test_a_config_inside_that_is_none(text: str, layout: Layout) -> None:
    assert recognised(layout(FASTER), config=text).recipe == recognised(layout(FASTER)).recipe


def test_a_head_that_has_the_keys_of_another(layout: Layout) -> None:
    with pytest.raises(CheckpointError, match="the head PAAHead; allowed: ATSSHead"):
        recognised(layout("atss_r50_fpn_1x"), cfg="model = dict(bbox_head=dict(type='PAAHead'))")


def test_classes(layout: Layout) -> None:
    state = layout(FASTER)
    coco = coco_80_classes()
    # COCO's ids have gaps: person is 1, stop sign 13, toothbrush 90.
    assert (coco.names[0], coco.names[-1], coco.category_ids[11], coco.category_ids[-1]) == (
        "person",
        "toothbrush",
        13,
        90,
    )
    assert recognised(state).classes == coco
    own = tuple(f"part {number}" for number in range(80))
    assert recognised(state, CLASSES=list(own)).classes.names == own
    assert recognised(state, dataset_meta={"classes": own}).classes.names == own
    assert recognised(state, dataset_meta={"CLASSES": own}, wanted=Wanted(class_names=coco.names)).classes == coco
    # Version 1 wrote traffic_light.
    assert recognised(state, CLASSES=[name.replace(" ", "_") for name in coco.names]).classes == coco
    with pytest.raises(CheckpointError, match="80 outputs, 2 in the file; allowed: 80 names"):
        recognised(state, CLASSES=["a", "b"])
    with pytest.raises(CheckpointError, match="80 outputs, 80 in the file, part 0 more than once; allowed: 80 names"):
        recognised(state, CLASSES=[*own[:79], "part 0"])
    chosen = edit(recognised(state).recipe, {"data.classes": ("a", "b")})
    with pytest.raises(CheckpointError, match=r"80 outputs, 2 in the config \(classes\)"):
        recognised(state, wanted=Wanted(recipe=chosen))
    with pytest.raises(CheckpointError, match="3 outputs, no names in the file"):
        recognised(with_regions(state, of_two_fc(3, 3)))
    # One class is a plain text in some files.
    assert recognised(with_regions(state, of_two_fc(1, 1)), CLASSES="cell").classes.names == ("cell",)


def test_a_recipe_that_the_user_names(layout: Layout) -> None:
    """The keys of FCOS with one class are those of a first stage alone."""
    state = layout("fcos_r50-caffe_fpn_gn-head_1x")
    state |= {
        "bbox_head.conv_cls.weight": torch.empty(1, 256, 3, 3, device="meta"),
        "bbox_head.conv_cls.bias": torch.empty(1, device="meta"),
    }
    alone = recognised(state, CLASSES="cell")
    assert isinstance(alone.recipe.detector, OneStageSpec)
    assert any("--recipe fcos_rpn_resnet50_fpn" in text for text in alone.assumptions)
    named = Wanted(recipe_name="fcos_rpn_resnet50_fpn", recipe=dense_catalogue.fcos_rpn_resnet50_fpn())
    first = recognised(state, wanted=named)
    assert isinstance(first.recipe.detector, FirstStageSpec)
    assert misfits(first) == []


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("backbone.layer2.0.conv2.conv_offset.weight", "deformable convolutions"),
        ("backbone.stem.0.weight", "another stem"),
        ("backbone.layer1.0.downsample.2.weight", "V1d"),
        ("backbone.layer1.0.gn1.weight", "group norms in the backbone"),
        ("neck.pafpn_convs.0.conv.weight", "PAFPN"),
        ("neck.1.refine.conv.weight", "several necks"),
        ("roi_head.shared_head.layer4.0.conv1.weight", r"\(C4\)"),
        ("roi_head.grid_head.convs.0.conv.weight", "grids"),
        ("roi_head.bbox_head.cls_fcs.0.weight", "apart in the second stage"),
        ("roi_head.bbox_head.shared_convs.0.gn.weight", "group norms in the second stage"),
        ("ema_backbone_conv1_weight", "averaged weights"),
    ],
)
def test_parts_that_are_not_built_here_are_named(key: str, name: str, layout: Layout) -> None:
    with pytest.raises(CheckpointError, match=name):
        recognised(layout(FASTER) | {key: torch.ones(1)})


def test_other_shapes_are_named(layout: Layout) -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    resnext = layout(FASTER) | {"backbone.layer1.0.conv2.weight": meta(128, 4, 3, 3)}
    with pytest.raises(CheckpointError, match="a ResNeXt or a RegNet"):
        recognised(resnext)
    many = layout(FASTER) | {
        "rpn_head.rpn_cls.weight": meta(15, 256, 1, 1),
        "rpn_head.rpn_reg.weight": meta(60, 256, 1, 1),
    }
    with pytest.raises(CheckpointError, match=r"15 anchors in each cell; allowed: 3.*--config"):
        recognised(many)
    shallow = {key: value for key, value in layout(FASTER).items() if "layer4.2" not in key}
    with pytest.raises(CheckpointError, match=r"layers of \(3, 4, 6, 2\) bottlenecks"):
        recognised(shallow)
    for key in ("rpn_head.rpn_reg.weight", "roi_head.bbox_head.fc_reg.weight", "neck.lateral_convs.0.conv.weight"):
        state = layout(FASTER)
        for broken in (meta(), meta(0, 0), meta(7, 7, 7, 7), meta(5, 5)):
            with pytest.raises(CheckpointError):
                recognised(state | {key: broken})
        del state[key]
        with pytest.raises(CheckpointError, match=re.escape(f"{key}: missing")):
            recognised(state)


def test_masks_are_left_out(layout: Layout) -> None:
    """The boxes of Mask R-CNN are those of Faster R-CNN."""
    model = recognised(layout(FASTER) | {"roi_head.mask_head.convs.0.conv.weight": torch.ones(1)})
    assert model.key_map(model.recipe).to_ours(model.tensors).dropped == {
        "roi_head.mask_head.convs.0.conv.weight": "masks: boxes are found here"
    }


# ----------------------------------------------------------------------------------------------------------- version 1


def test_version_1(layout: Layout) -> None:
    """A second stage outside roi_head, background first; and conventions of that time."""
    state = {key.removeprefix("roi_head."): value for key, value in layout(FASTER).items()}
    state["bbox_head.fc_reg.weight"] = torch.empty(324, 1024, device="meta")
    state["bbox_head.fc_reg.bias"] = torch.empty(324, device="meta")
    model = recognised(state)
    assert misfits(model) == []
    detector = model.recipe.detector
    assert isinstance(detector, TwoStageSpec)
    assert isinstance(detector.roi.pooling, RoIAlignSpec)
    assert (detector.roi.pooling.sampling_ratio, detector.roi.pooling.aligned) == (2, False)
    assert isinstance(detector.proposals, ProposalsSpec)
    assert isinstance(detector.proposals.head, RPNSpec)
    anchors = detector.proposals.head.anchors
    assert (anchors.rounded, anchors.centre_offset) == (True, 0.5)
    assert any("MMDetection 1" in text for text in model.assumptions)
    cascade = {key.removeprefix("roi_head."): value for key, value in layout("cascade-rcnn_r50_fpn_1x").items()}
    of_cascade = recognised(cascade)
    assert misfits(of_cascade) == []
    assert isinstance(of_cascade.recipe.detector, TwoStageSpec)
    assert isinstance(of_cascade.recipe.detector.roi, CascadeSpec)
    retina = recognised(layout("retinanet_r50_fpn_1x"), mmdet_version="1.2.0+abc").recipe.detector
    assert isinstance(retina, OneStageSpec)
    assert isinstance(retina.head, RetinaNetSpec)
    assert retina.head.anchors is not None
    # 4 strides of 8 px, and a third of an octave more.
    assert retina.head.anchors.sizes_px[0] == pytest.approx((32.0, 40.3175, 50.7968), abs=1e-4)


def test_a_softmax_rpn(layout: Layout) -> None:
    state = layout(FASTER) | {
        "rpn_head.rpn_cls.weight": torch.empty(6, 256, 1, 1, device="meta"),
        "rpn_head.rpn_cls.bias": torch.empty(6, device="meta"),
    }
    model = recognised(state)
    assert misfits(model) == []
    assert isinstance(model.recipe.detector, TwoStageSpec)
    assert isinstance(model.recipe.detector.proposals, ProposalsSpec)
    assert isinstance(model.recipe.detector.proposals.head, RPNSpec)
    assert model.recipe.detector.proposals.head.objectness == "softmax"
    assert any("since version 2.5" in text for text in model.assumptions)
    assert not any("since version 2.5" in text for text in recognised(state, mmdet_version="2.11.0").assumptions)


# ----------------------------------------------------------------------------------------------------------- and onward


def test_a_converted_fcos_starts_a_first_stage(shared: Path, layout: Layout) -> None:
    """The how-to's warm start: what MMDetection loads is taken, and the classes, which it leaves random, collapse."""
    manifest = json.loads((shared / "oracles/mmdetection/checkpoint_bridges/manifest.json").read_text())
    bridge = manifest["results"][0]
    assert (bridge["source"], bridge["loaded"]) == ("fcos_r50-caffe_fpn_gn-head_1x", 367)
    source = recognised(layout(bridge["source"]), name="fcos_r50_caffe_fpn_gn-head_1x_coco.pth")
    converted = source.key_map(source.recipe).to_ours(source.tensors)
    checkpoint = Checkpoint(
        state_dict=converted.state, meta=CheckpointMeta(recipe=to_yaml(source.recipe), classes=source.classes)
    )
    recipe = dense_catalogue.faster_rcnn_resnet50_caffe_fpn_fcos_rpn()
    with torch.device("meta"):
        detector = build_detector(recipe.detector, num_classes=80, pretrained=False)
    start = StartFile(path=Path("fcos.safetensors"), checkpoint=checkpoint)
    lines = start_first_stage(detector, recipe, start)
    counts = [int(number) for number in re.findall(r"(?:backbone|neck|proposals\.head) (\d+)", lines[0])]
    # MMDetection's 367 without the 53 counts of frozen norms, and the two of the classes.
    assert sum(counts) == 367 - 53 + 2
    assert lines[1].endswith("proposals.head.tower.classes.weight, proposals.head.tower.classes.bias")
    left = {"rpn_head.conv_cls.weight", "rpn_head.conv_cls.bias"}
    assert {name for name in bridge["left_at_initialisation"] if not name.startswith("roi_head.")} == left
    # Nothing of the checkpoint is left behind. It was trained with Detectron's mean, where the how-to has detectron2's.
    assert lines[2:] == ["trained with detector.image.mean=[102.9801, 115.9465, 122.7717]; this recipe has others"]
