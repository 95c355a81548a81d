"""MMDetection's dataloaders, datasets and evaluators (3.x and 2.x) as our data and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rcnn.recipes.mmdetection.ledger import Part
from rcnn.recipes.mmdetection.parts import FIXED
from rcnn.recipes.mmdetection.pipelines import Pipeline, pipeline
from rcnn.recipes.mmdetection.schedules import NUM_DEVICES
from rcnn.recipes.recipe import DataSpec

_DATASETS = ("CocoDataset", "VOCDataset")
_FILES = "where the annotations lie is found in the folder of the data"
Metric = Literal["coco", "voc", "proposals"]


@dataclass(frozen=True, kw_only=True)
class Loader:
    """What pictures are loaded, and how many at a time on each device."""

    pipeline: Pipeline
    batch: int
    workers: int
    repeats: int
    root: str | None
    skip_empty: bool
    grouped: bool
    classes: tuple[str, ...] | None
    """None: all that the data have."""
    part: Part
    """Where the config says it."""


def loader(part: Part) -> Loader:
    """`train_dataloader` or `val_dataloader` (3.x)."""
    part.ignore("a matter of speed", "persistent_workers", "pin_memory", "prefetch_factor")
    part.only("drop_last", False)
    order = part.part("sampler")
    order.only("type", "DefaultSampler", "InfiniteSampler")
    order.ignore("training is shuffled, evaluation is not", "shuffle", "round_up", "seed")
    order.close()
    groups = part.part("batch_sampler")
    groups.only("type", "AspectRatioBatchSampler", None)
    groups.ignore(FIXED, "drop_last")
    groups.close()
    batch, workers = part.whole("batch_size", 1), part.whole("num_workers", 0)
    found = dataset(part.part("dataset"), batch=batch, workers=workers, grouped=bool(groups.section), is_old=False)
    part.close()
    return found


def old_loaders(part: Part) -> tuple[Loader, Loader]:
    """`data` (2.x): training and evaluation."""
    each = part.whole("samples_per_gpu", 1), part.whole("workers_per_gpu", 0)
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        inner = part.part(name)
        each = inner.whole("samples_per_gpu", each[0]), inner.whole("workers_per_gpu", each[1])
        inner.ignore("a matter of speed", *inner.section)
    part.ignore("the evaluation of a run is that of val", "test")
    train = dataset(part.part("train"), batch=each[0], workers=each[1], grouped=True, is_old=True)
    evaluation = dataset(part.part("val"), batch=1, workers=each[1], grouped=False, is_old=True)
    part.close()
    return train, evaluation


def dataset(part: Part, *, batch: int, workers: int, grouped: bool, is_old: bool) -> Loader:
    """A dataset; RepeatDataset around it makes each epoch longer."""
    kind = part.kind()
    if kind == "RepeatDataset":
        inner = dataset(part.part("dataset"), batch=batch, workers=workers, grouped=grouped, is_old=is_old)
        times = part.count("times", 1)
        part.close()
        return replace(inner, repeats=inner.repeats * times)
    if kind not in _DATASETS:
        part.refuse("type", f"the data are those of {' or '.join(_DATASETS)}, or RepeatDataset of one")
    part.ignore(_FILES, "ann_file", "data_prefix", "img_prefix", "ann_subdir", "img_subdir")
    part.ignore(FIXED, "backend_args", "file_client_args", "test_mode", "lazy_init", "serialize_data")
    part.ignore("files of proposals are written by rcnn proposals dump: data.train_proposals", "proposal_file")
    classes = _classes(part)
    root = part.take("data_root")
    # Version 3 leaves out what its filter_cfg says, and nothing without one.
    skip = is_old and part.truth("filter_empty_gt", True) and not part.peek("test_mode", False)
    rules = part.part("filter_cfg")
    if rules.section:
        skip = rules.truth("filter_empty_gt", False)
        rules.ignore("pictures are taken whatever their size", "min_size")
        rules.ignore("difficult boxes are ignore regions", "bbox_min_size")
    rules.close()
    found = Loader(
        pipeline=pipeline(part.parts("pipeline")),
        batch=batch,
        workers=workers,
        repeats=1,
        root=root if isinstance(root, str) else None,
        skip_empty=skip,
        grouped=grouped,
        classes=classes,
        part=part,
    )
    part.close()
    return found


def _classes(part: Part) -> tuple[str, ...] | None:
    """`metainfo=dict(classes=...)` (3.x) or `classes` (2.x); None for all that the data have."""
    metainfo = part.part("metainfo")
    found = _names(metainfo, "classes") or _names(metainfo, "CLASSES") or _names(part, "classes")
    metainfo.ignore("the colours of boxes in pictures", "palette", "PALETTE")
    metainfo.close()
    return found


def _names(part: Part, key: str) -> tuple[str, ...] | None:
    given = part.take(key)
    if given is None:
        return None
    if isinstance(given, list) and given and all(isinstance(name, str) for name in given):
        return tuple(given)
    part.refuse(key, "a list of names is wanted; one name alone is ('name',), with its comma")
    return None


def refuse_other_classes(train: Loader, evaluation: Loader) -> None:
    """Classes that are chosen for one of training and evaluation alone, or that differ."""
    if train.classes != evaluation.classes:
        part = (train if evaluation.classes is None else evaluation).part
        part.refuse("metainfo" if "metainfo" in part else "classes", "training and evaluation have other classes")


def batch_of_all_devices(part: Part, train: Loader) -> int:
    """`auto_scale_lr` says for how many pictures the learning rate was chosen; without it there are eight devices."""
    part.only("enable", False, why="the learning rate is never scaled: set train.optimizer.lr and train.batch_size")
    given = part.whole("base_batch_size", 0)
    part.close()
    return given if given > 0 else train.batch * NUM_DEVICES


def data_spec(train: Loader, *, train_divisor: int | None) -> DataSpec:
    found = train.pipeline
    jitter = found.jitter
    sides = None if jitter is not None else found.short_sides
    return DataSpec(
        path=train.root,
        classes=train.classes,
        flip=found.flip,
        short_sides=sides,
        short_side_draw="between" if sides is not None and found.drawn_between else "listed",
        jitter=jitter,
        train_divisor=train_divisor,
        # Wide pictures and tall ones. One more group on each side than MMDetection has, the least that there is here.
        aspect_ratio_groups=1 if train.grouped else 0,
        skip_empty=train.skip_empty,
        workers=train.workers,
    )


def evaluator(parts: list[Part], *, first_stage: bool) -> tuple[Metric, Literal["11_points", "area"]]:
    """`val_evaluator` (3.x) or `evaluation` (2.x)."""
    metric: Metric = "proposals" if first_stage else "coco"
    interpolation: Literal["11_points", "area"] = "area"
    for part in parts:
        if part.kind("CocoMetric") == "VOCMetric":
            metric = "voc"
            interpolation = "11_points" if part.text("eval_mode", "area") == "11points" else "area"
            part.ignore("mAP is at IoU 0.5", "metric", "iou_thrs")
        elif part.section.get("type", "CocoMetric") == "CocoMetric":
            metric = _coco(part, metric, first_stage=first_stage)
        else:
            part.refuse("type", "CocoMetric or VOCMetric")
        part.ignore(_FILES, "ann_file")
        part.ignore("what evaluation writes is fixed here", "format_only", "outfile_prefix", "classwise", "save_best")
        part.ignore(FIXED, "backend_args", "interval", "dynamic_intervals", "proposal_nums", "prefix", "rule", "start")
        part.close()
    return metric, interpolation


def _coco(part: Part, metric: Metric, *, first_stage: bool) -> Metric:
    given = part.take("metric")
    names = given if isinstance(given, list) else [given]
    for name in names:
        if name in ("proposal", "proposal_fast") and first_stage:
            metric = "proposals"
        elif name == "bbox":
            # What a first stage finds has no classes: its recall stands for it.
            metric = "proposals" if first_stage else "coco"
        elif name == "mAP":
            metric = "voc"
        elif name is not None:
            given = "rcnn proposals eval judges the proposals of a detector" if name else ""
            part.refuse("metric", given if "proposal" in str(name) else "boxes are judged here: bbox")
    return metric
