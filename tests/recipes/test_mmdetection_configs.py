"""MMDetection's own configs, those of its wheel, as recipes: each resolves and builds, or is refused for a reason.

The wheel comes from the package index, or from $RCNN_MMDET_CONFIGS (its folder `configs`); without either the tests are
skipped, and `.ci/run` fails where they are. `RCNN_UPDATE_GOLDEN=1` writes docs/mmdetection-configs.md anew.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch

from rcnn import download as download_of_weights
from rcnn.config.edit import edit
from rcnn.config.text import diff, flatten, from_yaml, to_yaml
from rcnn.converters.convert import export_file
from rcnn.data.shapes import draw_shapes_dataset
from rcnn.engine.checkpoint import CheckpointMeta, save_weights
from rcnn.engine.run_folder import RunFolder
from rcnn.errors import RcnnError, RecipeError
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.mmdetection.config import Translation, read_mmdetection_config
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import DetectorSpec, ImageSpec, OneStageSpec, Recipe, TwoStageSpec
from rcnn.recipes.resolve import resolve_recipe
from rcnn.records import ClassTable

pytestmark = pytest.mark.xdist_group("configs of MMDetection")
VERSION = "3.3.0"
FOLDERS = ("faster_rcnn", "rpn", "fast_rcnn", "cascade_rcnn", "retinanet", "fcos", "atss", "gfl")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "mmdetection-configs.md"


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `configs` of MMDetection's wheel."""
    if given := os.environ.get("RCNN_MMDET_CONFIGS"):
        return Path(given)
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rcnn-tests" / f"mmdet-{VERSION}"
    found = cache_folder / "mmdet" / ".mim" / "configs"
    if not found.is_dir():
        download(tmp_path_factory.mktemp("wheel"), cache_folder)
    return found


def download(folder: Path, target: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--retries",
        "1",
        "--no-deps",
        f"mmdet=={VERSION}",
        "-d",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(
            f"the configs of MMDetection are absent: its wheel cannot be fetched ({done.stderr.strip()[-200:]})"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.startswith("mmdet/.mim/configs/")]
        wheel.extractall(folder / "content", members)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():  # another process may have been faster
        shutil.move(folder / "content", target)


def count_parameters(spec: DetectorSpec) -> int:
    """Parameters of the detector, built without memory for them."""
    with torch.device("meta"):
        detector = build_detector(spec, num_classes=80, pretrained=False)
    return sum(parameter.numel() for parameter in detector.parameters())


# Cast: a spec is hashable, whatever pyright thinks of it.
built = cast(Callable[[DetectorSpec], int], cache(count_parameters))


def structure(spec: DetectorSpec) -> DetectorSpec:
    """The detector without what no layer depends on, so that few have to be built."""
    spec = spec.model_copy(update={"image": ImageSpec()})
    backbone = spec.backbone.model_copy(update={"weights": None, "norm": "batch", "frozen_stages": 0})
    return spec.model_copy(update={"backbone": backbone})


@dataclass(kw_only=True)
class Outcome:
    """What became of a config."""

    name: str
    translation: Translation | None = None
    millions: float = 0.0
    problems: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def outcomes(configs: Path) -> list[Outcome]:
    """Of every config of the eight folders that is about boxes."""
    files = [file for folder in FOLDERS for file in sorted((configs / folder).glob("*.py")) if "mask" not in file.name]
    return [outcome(file, configs) for file in files]


def outcome(file: Path, root: Path) -> Outcome:
    found = Outcome(name=file.relative_to(root).as_posix())
    try:
        found.translation = read_mmdetection_config(file)
        found.millions = built(structure(found.translation.recipe.detector)) / 1e6
    except RcnnError as error:
        texts = [str(problem) for problem in error.problems if "--allow-unmapped" not in problem.remedy]
        found.problems = [re.sub(rf"{re.escape(str(file))}:(\d+):", r"line \1:", text) for text in texts]
        found.problems = [text.replace(f"{file}: ", "").replace(f"{root}/", "") for text in found.problems]
    return found


def test_nine_of_ten_configs_resolve_and_build(outcomes: list[Outcome]) -> None:
    assert len(outcomes) == 118  # counted by hand: 40, 11, 6, 13, 25, 12, 5 and 6 files
    done = [each for each in outcomes if not each.problems]
    assert len(done) >= 0.9 * len(outcomes)
    assert all(each.problems or each.translation for each in outcomes)


def test_a_translation_is_a_valid_recipe_and_reads_back(outcomes: list[Outcome]) -> None:
    for each in outcomes[::7]:
        if each.translation is not None:
            recipe = each.translation.recipe
            assert from_yaml(to_yaml(recipe), Recipe) == recipe


def test_parameters_counted_by_hand(outcomes: list[Outcome]) -> None:
    millions = {each.name: round(each.millions, 2) for each in outcomes}
    # ResNet-50 23,508,032; FPN 984,064 + 2,360,320; RPN 590,080 + 3,855; fc6, fc7 12,846,080 + 1,049,600; 81 classes
    # 83,025; 320 deltas 328,000: 41,753,056.
    assert millions["faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"] == 41.75
    # ResNet-50; C3 to C5 918,272 + 1,770,240; P6 from C5 4,718,848; P7 590,080; two towers 4,720,640; 720 classes
    # 1,659,600; 36 deltas 82,980: 37,968,692.
    assert millions["retinanet/retinanet_r50_fpn_1x_coco.py"] == 37.97


# ------------------------------------------------------------------------------------- our recipes and their configs

NAMED = {
    "atss_resnet50_fpn": "atss/atss_r50_fpn_1x_coco.py",
    "gfl_resnet50_fpn": "gfl/gfl_r50_fpn_1x_coco.py",
    "retinanet_resnet50_fpn": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "fcos_resnet50_caffe_fpn_gn": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "rpn_resnet50_fpn": "rpn/rpn_r50_fpn_1x_coco.py",
    "fast_rcnn_resnet50_fpn": "fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py",
    "cascade_rcnn_resnet50_fpn": "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "faster_rcnn_resnet50_fpn_fcos_rpn": "faster_rcnn/faster-rcnn_r50_fpn_fcos-rpn_1x_coco.py",
}
# Where our recipe leaves a detail of MMDetection out, with the reason.
EXPLAINED = {
    "min_side_px": "MMDetection drops boxes without area; ours leaves them (0 px)",
    "border_ends": "of no effect where anchors may reach over the border",
    "level_map": "MMDetection counts maps from the finest, ours by their stride: the same on P2 to P5; on P3 to P7, of "
    "FCOS as first stage, ours takes the map that the FPN paper has for a size, MMDetection one coarser",
    "backbone.weights": "MMDetection names a file that has to be fetched; ours starts from random numbers, or a file",
    "proposals.test_limit": "MMDetection takes all proposals of the file in evaluation",
}


@pytest.mark.parametrize("name", list(NAMED))
def test_our_recipe_of_a_config_is_the_config(configs: Path, name: str) -> None:
    theirs = read_mmdetection_config(configs / NAMED[name]).recipe
    differences = [each for each in diff(RECIPES[name](), theirs) if each.path.startswith("detector.")]
    unexplained = [each for each in differences if not any(part in each.path for part in EXPLAINED)]
    assert unexplained == []


# ------------------------------------------------------------------------------------------------------------- how-to


@pytest.fixture(scope="module")
def how_to(configs: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three configs of the how-to over the wheel's tree."""
    folder = tmp_path_factory.mktemp("how-to") / "configs"
    for name in ("_base_", "rpn", "faster_rcnn"):
        shutil.copytree(configs / name, folder / name)
    shutil.copytree(shared / "reference" / "how-to-configs" / "configs", folder, dirs_exist_ok=True)
    return folder


def test_the_how_to_as_written(how_to: Path) -> None:
    plain = resolve_recipe(how_to / "faster_rcnn" / "faster-rcnn_r50_fpn_fcos-rpn_1x_coco.py").spec
    caffe = resolve_recipe(how_to / "faster_rcnn" / "faster-rcnn_r50-caffe_fpn_fcos-rpn_1x_coco.py").spec
    alone = resolve_recipe(how_to / "rpn" / "fcos-rpn_r50_fpn_1x_coco.py").spec
    for recipe in (plain, caffe, alone):
        values = flatten(recipe)
        assert values["detector.proposals.head.type"] == "fcos"
        assert values["detector.proposals.scope"] == "joint"
        assert values["detector.neck.extra"] == "convs_on_p5"
        assert built(structure(recipe.detector)) > 30e6
    assert plain.train.warm_up is not None
    assert plain.train.warm_up.steps == 1000
    assert alone.evaluate.metric == "proposals"
    values = flatten(caffe)
    assert values["detector.image.mean"] == "[103.53, 116.28, 123.675]"
    assert values["detector.image.channel_order"] == "bgr"
    assert values["detector.backbone.style"] == "caffe"
    assert values["detector.backbone.norm"] == "frozen"
    assert values["detector.backbone.weights"] == "null"
    assert "fcos_r50_caffe_fpn_gn-head_1x_coco-821213aa.pth" in values["detector.proposals.init_from"]
    assert caffe.train.init_from is None


# A ResNet-18 and thumbnails in place of a ResNet-50 and 800 pixels; nothing else of the configs changes.
SMALL = (
    "detector.backbone.depth=18",
    "detector.backbone.weights=null",
    "detector.neck.channels=32",
    "detector.image.short_side=64",
    "detector.image.max_long_side=96",
    "detector.proposals.head.channels=32",
    "detector.proposals.head.num_convs=1",
    "data.workers=0",
    "train.batch_size=2",
    "train.max_steps=3",
    "evaluate.pictures=1",
)
MODEL = "fcos_r50_caffe_fpn_gn-head_1x_coco"
ADDRESS = f"https://download.openmmlab.com/mmdetection/v2.0/fcos/{MODEL}/{MODEL}-821213aa.pth"


@pytest.fixture
def fetched_fcos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MMDetection's FCOS of the same small size, where the file of `load_from` lies once it is fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    # No file of this size has the digest that MMDetection's has in its name.
    monkeypatch.setattr(download_of_weights, "digest_in", lambda name: None)
    sizes = {"detector.backbone.depth": 18, "detector.backbone.weights": None, "detector.neck.channels": 32}
    sizes |= {"detector.head.channels": 32, "detector.head.num_convs": 1}
    recipe = edit(RECIPES["fcos_resnet50_caffe_fpn_gn"](), sizes)
    detector = build_detector(recipe.detector, num_classes=3, pretrained=False)
    # Names that no data of the test has, which MMDetection's file may or may not keep.
    meta = CheckpointMeta(recipe=to_yaml(recipe), classes=ClassTable(names=("cat", "dog", "horse")))
    save_weights(tmp_path / "fcos.safetensors", detector.state_dict(), meta)
    path = download_of_weights.place_of(ADDRESS)
    path.parent.mkdir(parents=True)
    export_file(tmp_path / "fcos.safetensors", path, system="mmdet")
    return path


@pytest.mark.parametrize(
    "name",
    [
        "faster_rcnn/faster-rcnn_r50_fpn_fcos-rpn_1x_coco.py",
        "faster_rcnn/faster-rcnn_r50-caffe_fpn_fcos-rpn_1x_coco.py",
        "rpn/fcos-rpn_r50_fpn_1x_coco.py",
    ],
)
def test_the_how_to_trains_evaluates_and_evaluates_proposals(
    how_to: Path, fetched_fcos: Path, tmp_path: Path, rcnn_command: Callable[..., tuple[int, str, str]], name: str
) -> None:
    draw_shapes_dataset(tmp_path / "data", train_images=6, val_images=2)
    arguments = ["train", how_to / name, "--data", tmp_path / "data", "--device", "cpu", *SMALL]
    if name.startswith("faster_rcnn"):
        arguments.append("detector.roi.box_head.features=64")
    code, out, err = rcnn_command(*arguments, "-o", tmp_path / "run")
    assert code == 0, err
    told = " ".join(err.split())
    assert ("classes collapsed to one objectness" in told) == ("caffe" in name)
    if "caffe" in name:
        assert "was fetched before" in told
        assert f"{fetched_fcos.name}: mmdet, because it has neck.lateral_convs." in told
    written = set().union(*RunFolder(tmp_path / "run").rows())
    assert {"loss/rpn_classification", "loss/rpn_box", "loss/rpn_centerness"} <= written
    checkpoint = tmp_path / "run" / "checkpoints" / "last.safetensors"
    for command in (("eval",), ("proposals", "eval")):
        code, out, err = rcnn_command(*command, checkpoint, "--data", tmp_path / "data", "--device", "cpu")
        assert code == 0, err
        assert "AR@1000" in out or "AP" in out


# ------------------------------------------------------------------------------------------------- names of version 2

OLD = """
model = dict(
    type='FasterRCNN',
    pretrained='torchvision://resnet50',
    backbone=dict(type='ResNet', depth=50, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1,
                  norm_cfg=dict(type='BN', requires_grad=True), norm_eval=True, style='pytorch'),
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
    rpn_head=dict(
        type='RPNHead', in_channels=256, feat_channels=256,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.], target_stds=[1., 1., 1., 1.]),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=256, featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(
            type='Shared2FCBBoxHead', in_channels=256, fc_out_channels=1024, roi_feat_size=7, num_classes=80,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.], target_stds=[.1, .1, .2, .2]),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0))))
train_cfg = dict(
    rpn=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, ignore_iof_thr=-1),
        sampler=dict(type='RandomSampler', num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
        allowed_border=-1, pos_weight=-1, debug=False),
    rpn_proposal=dict(nms_across_levels=False, nms_pre=2000, nms_post=1000, max_num=1000, nms_thr=0.7, min_bbox_size=0),
    rcnn=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5,
                      match_low_quality=False, ignore_iof_thr=-1),
        sampler=dict(type='RandomSampler', num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
        pos_weight=-1, debug=False))
test_cfg = dict(
    rpn=dict(nms_across_levels=False, nms_pre=1000, nms_post=1000, max_num=1000, nms_thr=0.7, min_bbox_size=0),
    rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_thr=0.5), max_per_img=100))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', img_scale=(1333, 800), keep_ratio=True), dict(type='RandomFlip', flip_ratio=0.5),
    dict(type='Normalize', **img_norm_cfg), dict(type='Pad', size_divisor=32), dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels'])]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1333, 800), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'), dict(type='Normalize', **img_norm_cfg),
        dict(type='Pad', size_divisor=32), dict(type='ImageToTensor', keys=['img']),
        dict(type='Collect', keys=['img'])])]
data = dict(
    samples_per_gpu=2, workers_per_gpu=2,
    train=dict(type='CocoDataset', ann_file='a.json', img_prefix='train2017/', pipeline=train_pipeline),
    val=dict(type='CocoDataset', ann_file='b.json', img_prefix='val2017/', pipeline=test_pipeline),
    test=dict(type='CocoDataset', ann_file='b.json', img_prefix='val2017/', pipeline=test_pipeline))
evaluation = dict(interval=1, metric='bbox')
optimizer = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001)
optimizer_config = dict(grad_clip=None)
lr_config = dict(policy='step', warmup='linear', warmup_iters=500, warmup_ratio=0.001, step=[8, 11])
total_epochs = 12
checkpoint_config = dict(interval=1)
log_config = dict(interval=50, hooks=[dict(type='TextLoggerHook')])
dist_params = dict(backend='nccl')
log_level = 'INFO'
load_from = None
resume_from = None
workflow = [('train', 1)]
"""


def test_version_2_says_the_same_as_version_3(configs: Path, tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(OLD)
    old = read_mmdetection_config(tmp_path / "old.py").recipe
    new = read_mmdetection_config(configs / "faster_rcnn" / "faster-rcnn_r50_fpn_1x_coco.py").recipe
    # 2.x names the folder of the data in each file name.
    assert {each.path for each in diff(old, new)} == {"source", "data.path"}


def chosen(version: int, train: str, evaluation: str) -> str:
    """Classes of a config, as version 3 or 2 names them."""
    if version == 2:
        return f"data = dict(train=dict(classes={train}), val=dict(classes={evaluation}))"
    each = (("train", train), ("val", evaluation))
    metainfos = [f"{name}_dataloader = dict(dataset=dict(metainfo=dict(classes={given})))" for name, given in each]
    return "\n".join(metainfos)


def test_classes_that_a_config_chooses_are_those_of_the_recipe(configs: Path, tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(OLD)
    bases = {3: configs / "faster_rcnn" / "faster-rcnn_r50_fpn_1x_coco.py", 2: tmp_path / "old.py"}
    for version, base in bases.items():
        file = written(tmp_path, base, chosen(version, "('person', 'car')", "('person', 'car')"))
        assert read_mmdetection_config(file).recipe.data.classes == ("person", "car")
    for given, reason in (
        ("('car', 'person')", "training and evaluation have other classes"),
        ("'car'", "a list of names is wanted"),
    ):
        with pytest.raises(RecipeError, match=reason):
            read_mmdetection_config(written(tmp_path, bases[3], chosen(3, "('person', 'car')", given)))


# ----------------------------------------------------------------------------------------- what has no counterpart


def written(folder: Path, base: Path, text: str) -> Path:
    (folder / "main.py").write_text(f"_base_ = {str(base)!r}\n{text}\n")
    return folder / "main.py"


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("model = dict(backbone=dict(dcn=dict(type='DCN')))", "model.backbone.dcn", 2),
        ("model = dict(\n    roi_head=dict(mask_head=dict(type='FCNMaskHead')))", "model.roi_head.mask_head", 3),
        ("model = dict(backbone=dict(norm_cfg=dict(type='GN')))", "model.backbone.norm_cfg.type", 2),
        ("model = dict(train_cfg=dict(rpn=dict(nms_typo=1)))", "model.train_cfg.rpn.nms_typo", 2),
        ("model = dict(neck=dict(num_outs=9))", "model.neck.num_outs", 2),
        ("custom_hooks = [dict(type='EMAHook')]", "custom_hooks[0]", 2),
        ("optim_wrapper = dict(optimizer=dict(lr='x'))", None, None),
        ("model = dict(type='YOLOX')", None, None),
        ("model = dict(backbone=dict(type='Swin'))", None, None),
    ],
)
def test_what_has_no_counterpart_is_named_with_its_line(
    configs: Path, tmp_path: Path, text: str, path: str | None, line: int | None
) -> None:
    file = written(tmp_path, configs / "faster_rcnn" / "faster-rcnn_r50_fpn_1x_coco.py", text)
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(file)
    if path is None:
        with pytest.raises(RecipeError):  # nothing can be built without it
            resolve_recipe(file, allow_unmapped=True)
        return
    assert f"{file}:{line}: {path}" in [problem.where for problem in caught.value.problems]
    unmapped = read_mmdetection_config(file, allow_unmapped=True).unmapped
    assert path in [finding.path for finding in unmapped]
    assert resolve_recipe(file, ["train.epochs=3"], allow_unmapped=True).spec.train.epochs == 3


def test_every_value_of_a_config_is_accounted_for(configs: Path) -> None:
    """None of the values that count is ignored: all reasons are of the list that the page shows."""
    translation = read_mmdetection_config(configs / "faster_rcnn" / "faster-rcnn_r50_fpn_1x_coco.py")
    paths = [finding.path for finding in translation.ignored]
    assert len(paths) == len(set(paths))
    assert not [path for path in paths if path.split(".")[-1] in {"lr", "iou_threshold", "scale", "nms_pre", "depth"}]


def test_a_patch_can_stand_on_a_config_and_the_command_line_shows_it(
    configs: Path, tmp_path: Path, rcnn_command: Callable[..., tuple[int, str, str]]
) -> None:
    patch = tmp_path / "mine.yaml"
    patch.write_text(f"base: {configs / 'retinanet' / 'retinanet_r18_fpn_1x_coco.py'}\nset:\n  train.epochs: 2\n")
    recipe = resolve_recipe(patch).spec
    assert isinstance(recipe.detector, OneStageSpec)
    assert (recipe.train.epochs, flatten(recipe)["detector.backbone.depth"]) == (2, "18")
    code, out, _ = rcnn_command("recipes", "check", configs / "faster_rcnn" / "faster-rcnn_r50_fpn_1x_coco.py")
    assert code == 0
    assert "ignored:" in out
    code, _, err = rcnn_command("recipes", "show", configs / "faster_rcnn" / "faster-rcnn_r50_fpn_ciou_1x_coco.py")
    assert code == 1
    assert "CIoULoss" in err
    code, out, _ = rcnn_command(
        *("recipes", "show", configs / "faster_rcnn" / "faster-rcnn_r50_fpn_ciou_1x_coco.py", "--allow-unmapped")
    )
    assert code == 0
    assert "type: two_stage" in out


def test_load_from_starts_the_whole_detector_of_others(configs: Path, tmp_path: Path) -> None:
    file = written(tmp_path, configs / "retinanet" / "retinanet_r18_fpn_1x_coco.py", "load_from = 'mine.safetensors'")
    assert resolve_recipe(file).spec.train.init_from == "mine.safetensors"
    recipe = edit(resolve_recipe(file).spec, {"train.init_from": None})
    assert not isinstance(recipe.detector, TwoStageSpec)


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_lists_every_config(outcomes: list[Outcome]) -> None:
    text = page(outcomes)
    if os.environ.get("RCNN_UPDATE_GOLDEN") == "1":
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, (
        "run RCNN_UPDATE_GOLDEN=1 pytest tests/recipes/test_mmdetection_configs.py"
    )


def page(outcomes: list[Outcome]) -> str:
    done = sum(not each.problems for each in outcomes)
    share = 100 * done / len(outcomes)
    lines = [
        *INTRODUCTION.format(version=VERSION, folders=", ".join(f"`{name}`" for name in FOLDERS)).splitlines(),
        "",
        f"Of {len(outcomes)} configs {done} ({share:.0f}%) resolve, validate and build a detector; others are refused.",
        "",
        "| config | outcome | parameters |",
        "|---|---|---|",
    ]
    for each in outcomes:
        outcome = "; ".join(each.problems).replace("|", "\\|") if each.problems else said(each.translation)
        parameters = "" if each.problems else f"{each.millions:.1f} M"
        lines.append(f"| {each.name} | {'refused: ' if each.problems else ''}{outcome} | {parameters} |")
    lines += ["", "## Our recipes of the same name", "", *COMPARED.splitlines(), ""]
    lines += [f"* `{path}`: {reason}" for path, reason in EXPLAINED.items()]
    return "\n".join(lines) + "\n"


def said(translation: Translation | None) -> str:
    assert translation is not None
    differing = [f"{each.path.rsplit('.', 1)[-1]}: {each.reason}" for each in translation.differing]
    return "builds" if not differing else f"builds; {'; '.join(differing)}"


INTRODUCTION = """# MMDetection's configs

A config of MMDetection 3 or 2.x (`.py`) is accepted wherever a recipe is: `rcnn train CONFIG.py --data DIR`,
`rcnn recipes show CONFIG.py`, `rcnn convert FILE --config CONFIG.py`, or as the `base` of a patch. It is read as data:
nothing in it is executed, and a file that needs execution (imports, functions, conditions) is refused with its line.

Every value of a config is accounted for. What maps is part of the recipe; what does not change what is computed (hooks,
logs, visualizers, processes) is ignored; what has no counterpart is an error with its file and line, which
`--allow-unmapped` lets pass. `rcnn recipes check CONFIG.py` lists all of it.

The table is written by `tests/recipes/test_mmdetection_configs.py` from the configs in the wheel of MMDetection
{version}: all `.py` files of {folders}, but for those with `mask` in their names (Cascade Mask R-CNN, which is not
about boxes alone). Each was resolved, validated and its detector built; parameters are those of 80 classes."""

COMPARED = """The detectors of these configs are those of our recipes (`rcnn recipes`), but for:"""
