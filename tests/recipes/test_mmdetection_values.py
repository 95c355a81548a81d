"""Values that no config of MMDetection's own has: refused with their lines, said to differ, or what they are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcnn.config.text import flatten
from rcnn.errors import RecipeError
from rcnn.recipes.mmdetection.config import Translation, read_mmdetection_config

PLAIN = """
model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=50, num_stages=4, out_indices=(0, 1, 2, 3), style='pytorch'),
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5, start_level=0),
    rpn_head=dict(
        type='RPNHead', in_channels=256, feat_channels=256,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=8, scales_per_octave=1, strides=[4, 8, 16, 32, 64])),
    roi_head=dict(
        type='CascadeRoIHead', num_stages=2, stage_loss_weights=[1, 0.5],
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7), featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(type='Shared2FCBBoxHead')),
    train_cfg=dict(rpn=dict(assigner=dict(type='MaxIoUAssigner')), rcnn=[dict(), dict()]),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=1000), rcnn=dict()))
resize = dict(type='Resize', scale=(1333, 800), keep_ratio=True)
train_dataloader = dict(
    batch_size=2, dataset=dict(type='CocoDataset', pipeline=[resize, dict(type='RandomFlip', prob=0.5)]))
val_dataloader = dict(dataset=dict(type='CocoDataset', test_mode=True, pipeline=[resize]))
val_evaluator = dict(type='CocoMetric', metric='bbox')
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.02))
warm_up = dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500)
steps = dict(type='MultiStepLR', begin=0, end=12, milestones=[8, 11])
param_scheduler = [warm_up, steps]
"""


def read(folder: Path, changes: str = "") -> Translation:
    path = folder / "config.py"
    path.write_text(PLAIN + changes + "\n", encoding="utf-8")
    return read_mmdetection_config(path)


def test_the_config_itself(tmp_path: Path) -> None:
    translation = read(tmp_path)
    assert not translation.differing
    assert flatten(translation.recipe)["detector.roi.stages.1.loss_weight"] == "0.5"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("val_evaluator.metric = dict(a=1)", "val_evaluator.metric: dict(a=1)"),
        ("val_evaluator.metric = [['bbox']]", "val_evaluator.metric: [['bbox']]"),
        ("train_cfg.type = ['EpochBasedTrainLoop']", "train_cfg.type: ['EpochBasedTrainLoop']"),
        ("custom_hooks = [dict(type=['A'])]", "custom_hooks[0]: ['A']"),
        ("val_dataloader.dataset.pipeline = [dict(type='MultiScaleFlipAug', transforms=[dict(type=[])])]", "type: []"),
        ("train_cfg.val_interval = 0", "val_interval: 0; a whole number above 0"),
        ("model.backbone.num_stages = 0", "num_stages: 0; allowed: 1, 2, 3, 4"),
        ("model.backbone.num_stages = 5", "num_stages: 5; allowed: 1, 2, 3, 4"),
        ("model.backbone.out_indices = (0, 1, 2, 4)", "out_indices: [0, 1, 2, 4]; allowed: stages from 0 to 3"),
        ("model.backbone.out_indices = (1e999,)", "out_indices: [inf]; a list of numbers"),
        ("model.backbone.out_indices = (0, 1, 2, 3.5)", "out_indices: [0, 1, 2, 3.5]; whole numbers"),
        ("model.neck.start_level = 4", "start_level: 4; allowed: 0, 1, 2, 3"),
        ("model.rpn_head.anchor_generator.scales_per_octave = 10 ** 12", "scales_per_octave: 1000000000000"),
        ("model.rpn_head.anchor_generator.scales_per_octave = 0", "a whole number above 0"),
        ("model.roi_head.num_stages = 10 ** 12", "2 box heads, 2 of train_cfg.rcnn, 2 weights"),
        ("model.roi_head.bbox_roi_extractor.roi_layer.output_size = 1e999", "output_size: inf"),
        ("model.roi_head.bbox_roi_extractor.roi_layer.output_size = 7.5", "output_size: 7.5; whole numbers"),
        ("model.data_preprocessor.pad_size_divisor = 0", "pad_size_divisor: 0; a whole number above 0"),
        ("model.data_preprocessor.mean = [1e999, 0, 0]", "mean: [inf, 0, 0]; a list of numbers"),
        ("model.data_preprocessor.std = [1, 0, 1]", "std: [1, 0, 1]; numbers above 0"),
        ("model.train_cfg.rpn.assigner.ignore_iof_thr = 1.5", "ignore_iof_thr: 1.5; a share"),
        # There, zero and less stand for all candidates.
        ("model.test_cfg.rpn.nms_pre = -1", "nms_pre: -1; a whole number above 0"),
        ("train_dataloader.dataset.pipeline[1].prob = 1.5", "flip: 1.5"),
        ("resize.multiscale_mode = 'ranged'", "multiscale_mode: 'ranged'"),
        (
            "train_dataloader.dataset = dict(type='RepeatDataset', times=0, dataset=train_dataloader.dataset)",
            "times: 0",
        ),
        ("optim_wrapper.accumulative_counts = 0", "accumulative_counts: 0"),
        ("param_scheduler = [warm_up, warm_up, steps]", "param_scheduler[1]: 'LinearLR'"),
        ("param_scheduler = [steps, dict(type='CosineAnnealingLR', T_max=12)]", "param_scheduler[1]: 'CosineAnn"),
    ],
)
def test_refused(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, change)
    assert said in str(caught.value)


@pytest.mark.parametrize("pair", ["('a', 64)", "7", "(0, 'a')", "(0, [1])"])
def test_ranges_of_fcos_that_are_none(tmp_path: Path, pair: str) -> None:
    head = f"""
model.type = 'FCOS'
model.bbox_head = dict(type='FCOSHead', strides=[4, 8, 16, 32, 64],
    regress_ranges=({pair}, (32, 64), (64, 128), (128, 256), (256, 1e8)))
model.rpn_head = None
model.roi_head = None
"""
    with pytest.raises(RecipeError, match="regress_ranges"):
        read(tmp_path, head)


def test_pictures_without_boxes(tmp_path: Path) -> None:
    """Version 3 leaves them out where its filter_cfg says so alone."""
    assert not read(tmp_path).recipe.data.skip_empty
    assert read(tmp_path, "train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)").recipe.data.skip_empty
    assert not read(tmp_path, "train_dataloader.dataset.filter_cfg = dict(min_size=32)").recipe.data.skip_empty


def test_a_cosine_of_a_part_of_the_training(tmp_path: Path) -> None:
    whole = read(tmp_path, "param_scheduler = [warm_up, dict(type='CosineAnnealingLR', begin=0, end=12, T_max=12)]")
    assert not whole.differing
    part = read(tmp_path, "param_scheduler = [warm_up, dict(type='CosineAnnealingLR', begin=6, end=12, T_max=6)]")
    assert [finding.path for finding in part.differing] == ["param_scheduler[1].begin", "param_scheduler[1].T_max"]
    assert flatten(part.recipe)["train.schedule.type"] == "cosine"


# Version 2: the loop, the loaders and the optimizer have other names.
OLD = """
img = [dict(type='Resize', img_scale=(1333, 800), keep_ratio=True), dict(type='RandomFlip', flip_ratio=0.5)]
data = dict(samples_per_gpu=2, train=dict(type='CocoDataset', pipeline=img), val=dict(type='CocoDataset', pipeline=img))
runner = dict(type='EpochBasedRunner', max_epochs=12)
optimizer = dict(type='SGD', lr=0.02)
lr_config = dict(policy='step', step=[8, 11])
evaluation = dict(interval=1, metric='bbox')
"""


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ("fp16 = dict(loss_scale='dynamic')", []),
        ("fp16 = dict(loss_scale=512.)", ["fp16.loss_scale"]),
        ("optimizer_config = dict(type='Fp16OptimizerHook', loss_scale='dynamic')", []),
        ("optimizer_config = dict(type='Fp16OptimizerHook', loss_scale=512.)", ["optimizer_config.loss_scale"]),
    ],
)
def test_half_precision_of_version_2(tmp_path: Path, change: str, differing: list[str]) -> None:
    text = PLAIN
    for name in (
        "train_dataloader",
        "val_dataloader",
        "val_evaluator",
        "train_cfg",
        "optim_wrapper",
        "param_scheduler",
    ):
        text = text.replace(f"\n{name} =", f"\nunused_{name} =")
    path = tmp_path / "config.py"
    path.write_text(f"{text}{OLD}{change}\n", encoding="utf-8")
    translation = read_mmdetection_config(path)
    assert translation.recipe.train.precision == "fp16"
    assert [finding.path for finding in translation.differing] == differing
