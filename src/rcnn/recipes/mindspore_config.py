"""A YAML config of MindSpore RCNN with its base files as a recipe of ours: every key accounted for.

What maps becomes the recipe. What has no effect there is ignored for a reason. What has no counterpart, or a value that
is not known here, is listed with file and line, and is an error unless it is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rcnn.config.document import Table, identity_of, load, read_text
from rcnn.config.draft import Draft, Origin, branch_of
from rcnn.config.edit import edit
from rcnn.errors import Problem, RecipeError
from rcnn.recipes.mindspore_catalogue import faster_rcnn_resnet50_fpn_mindspore
from rcnn.recipes.recipe import Recipe

BASES = "__BASE__"
_MOST_FILES, _MOST_VALUES = 50, 5000


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A value of a config and where it stands."""

    value: Any
    file: Path
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def shown(self) -> str:
        plain = not isinstance(self.value, list) or all(not isinstance(one, list | dict) for one in self.value[:20])
        return repr(self.value)[:80] if plain else "a list"


@dataclass(frozen=True, kw_only=True)
class MindSporeTranslation:
    """The recipe that a config becomes, and what of it did not become part: a line each, with its file and line."""

    recipe: Recipe
    ignored: tuple[str, ...]
    unmapped: tuple[str, ...]
    """Empty, unless what has no counterpart was allowed."""

    def lines(self) -> list[str]:
        """For people."""
        return [*(f"no counterpart: {text}" for text in self.unmapped), *(f"ignored: {text}" for text in self.ignored)]


def is_mindspore_config(data: Any) -> bool:
    """Whether the data of a YAML file are such a config: base files in its spelling, or its parts by name."""
    return isinstance(data, Table) and (BASES in data or {"net", "backbone", "rpn_head"} <= set(map(str, data)))


def read_mindspore_config(path: Path, *, allow_unmapped: bool = False) -> MindSporeTranslation:
    """The recipe in a YAML config and its base files.

    Errors: `RecipeError` with every problem of the files, or with every value that has no counterpart.
    """
    values = _read(path, ())
    if "net" not in values or not any(name.startswith("backbone.") for name in values):
        problem = Problem(where=str(path), given="no `net` or no `backbone`", allowed="a config of MindSpore RCNN")
        raise RecipeError(problem)
    translator = _Translator(values)
    changes = translator.changes()
    if translator.unmapped and not allow_unmapped:
        count = len(translator.unmapped)
        given = f"{count} value{'s have' if count > 1 else ' has'} no counterpart here"
        remedy = Problem(where=str(path), given=given, remedy="--allow-unmapped takes the config without")
        raise RecipeError([*translator.unmapped, remedy])
    source = {"expected": "not stated in the config", "source": f"MindSpore RCNN's config {path.name}"}
    draft = Draft(branch_of(edit(faster_rcnn_resnet50_fpn_mindspore(), source), str(path)), {})
    for name, (value, origin) in changes.items():
        draft.set(name, value, Origin(name=str(origin.file), line=origin.line))
    return MindSporeTranslation(
        recipe=cast(Recipe, draft.build()),
        ignored=tuple(translator.ignored),
        unmapped=tuple(map(str, translator.unmapped)),
    )


# ------------------------------------------------------------------------------------------------------------- reading


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, _Value]:
    """The values of a file on top of those of its bases, by dotted name: the last writer wins, value by value."""
    here = identity_of(path)
    if here in above or len(above) >= _MOST_FILES:
        given = "the files are bases of each other: " + " -> ".join(file.name for file in (*above, here))
        raise RecipeError(Problem(where=str(path), given=given))
    data = load(read_text(path), str(path))
    if not isinstance(data, Table):
        raise RecipeError(Problem(where=str(path), given="no mapping of names to values", allowed="a YAML config"))
    values: dict[str, _Value] = {}
    for base in _bases(data, path):
        _merge(values, _read(path.parent / base, (*above, here)), path)
    own = {name: value for name, value in _flat(data, "", path, [0]) if name != BASES}
    _merge(values, own, path)
    return values


def _bases(data: Table, path: Path) -> list[str]:
    bases = data.get(BASES, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases) or len(bases) > _MOST_FILES:
        where = f"{path}:{data.lines[BASES]}: {BASES}"
        raise RecipeError(Problem(where=where, given="no list of files", allowed="files, relative to this one"))
    return bases


def _merge(values: dict[str, _Value], others: Mapping[str, _Value], path: Path) -> None:
    if len(values) + len(others) > _MOST_VALUES:
        raise RecipeError(Problem(where=str(path), given=f"more than {_MOST_VALUES} values"))
    for name, value in others.items():
        parts = name.split(".")
        # A value where there was a mapping, or the other way about, replaces it whole.
        for end in range(1, len(parts)):
            values.pop(".".join(parts[:end]), None)
        if name not in values:
            for below in [other for other in values if other.startswith(f"{name}.")]:
                del values[below]
        values[name] = value


def _flat(table: Table, above: str, path: Path, count: list[int]) -> Iterator[tuple[str, _Value]]:
    for key, value in table.items():
        count[0] += 1
        if count[0] > _MOST_VALUES:  # also of a few lines that refer to each other
            raise RecipeError(Problem(where=str(path), given=f"more than {_MOST_VALUES} values"))
        name = f"{above}{key}"
        if isinstance(value, Table) and value:
            yield from _flat(value, f"{name}.", path, count)
        else:
            yield name, _Value(value=value, file=path, line=table.lines[key])


# --------------------------------------------------------------------------------------------------------- translating

_RPN, _ROI = "detector.proposals.head", "detector.roi"
# The config's name and ours, of values that mean the same.
_SAME = {
    "backbone.out_channels": "detector.neck.channels",
    "backbone.fpn.upsample_mode": "detector.neck.upsampling",
    "rpn_head.feat_channel": f"{_RPN}.channels",
    "rpn_head.anchor_generator.aspect_ratios": f"{_RPN}.anchors.heights_over_widths",
    "rpn_head.anchor_generator.anchor_sizes": f"{_RPN}.anchors.sizes_px",
    "rpn_head.rpn_label_assignment.rnp_sample_batch": f"{_RPN}.sampler.total",
    "rpn_head.rpn_label_assignment.fg_fraction": f"{_RPN}.sampler.positive_fraction",
    "rpn_head.rpn_label_assignment.negative_overlap": f"{_RPN}.matcher.negative_iou",
    "rpn_head.rpn_label_assignment.positive_overlap": f"{_RPN}.matcher.positive_iou",
    "rpn_head.train_proposal.min_size": "detector.proposals.min_side_px",
    "rpn_head.train_proposal.nms_thresh": "detector.proposals.nms_iou",
    "bbox_head.resolution": f"{_ROI}.pooling.output_size",
    "bbox_head.head.out_channel": f"{_ROI}.box_head.features",
    "bbox_head.bbox_assigner.rois_per_batch": f"{_ROI}.sampler.total",
    "bbox_head.bbox_assigner.bg_thresh": f"{_ROI}.matcher.negative_iou",
    "bbox_head.bbox_assigner.fg_thresh": f"{_ROI}.matcher.positive_iou",
    "bbox_head.bbox_assigner.fg_fraction": f"{_ROI}.sampler.positive_fraction",
    "optimizer.weight_decay": "train.optimizer.weight_decay",
    "optimizer.momentum": "train.optimizer.momentum",
    "optimizer.nesterov": "train.optimizer.nesterov",
    "lr_init": "train.optimizer.lr",
    "lr.decay_rate": "train.schedule.gamma",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "seed": "train.seed",
    "infer.conf_threshold": f"{_ROI}.score_threshold",
    "infer.nms_threshold": f"{_ROI}.nms_iou",
    "data.dataset_dir": "data.path",
    "data.num_parallel_workers": "data.workers",
}
# What must be so, because nothing else is known here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "net": ("FasterRCNN",),
    "backbone.frozen": (False,),
    "backbone.fpn.level_index": ([0, 1, 2, 3],),
    "backbone.fpn.norm": ("none",),
    "backbone.fpn.act": ("none",),
    "rpn_head.anchor_generator.strides": ([4, 8, 16, 32, 64],),
    "rpn_head.rpn_label_assignment.use_random": (True,),
    "bbox_head.bbox_loss": (None, "None"),
    "bbox_head.add_gt_as_proposals": (True,),
    "bbox_head.head.name": ("RCNNBBoxTwoFCHead",),
    "bbox_head.roi_extractor.featmap_strides": ([4, 8, 16, 32],),
    "bbox_head.bbox_assigner.name": ("BBoxAssigner",),
    "optimizer.type": ("momentum", "sgd"),
    "clip_grads": (False, None),
    "data.is_segment": (False,),
    "data.detection_require_poly": (False,),
    "infer.predict_box_format": ("xyxy",),
}
_DERIVED = "follows from the rest"
_CLASSES = "classes come with the data"
_FOLDER = "the folder that --data names is read whole"
_RUN = "of a run, not of a detector"
_IGNORED = {
    "backbone.in_channels": _DERIVED,
    "bbox_head.head.in_channel": _DERIVED,
    "rpn_head.test_proposal": "not read there either: proposals are made by train_proposal in evaluation, too",
    "data.nc": _CLASSES,
    "data.names": _CLASSES,
    **dict.fromkeys(
        [
            "data.dataset_name",
            *(f"data.{split}_{what}" for split in ("train", "val", "test") for what in ("img_dir", "anno_path")),
        ],
        _FOLDER,
    ),
    "infer.max_box_num": "read there, but not applied",
    **dict.fromkeys(("infer.eval_parallel", "infer.with_postprocess", "rank", "rank_size", "save_dir"), _RUN),
    **dict.fromkeys(("ms_mode", "device_target", "log_interval", "run_eval", "run_profilor", "eval_parallel"), _RUN),
    **dict.fromkeys(("num_parallel_workers", "resume_ckpt", "enable_modelarts", "data_url", "ckpt_url"), _RUN),
    **dict.fromkeys(("train_url", "data_dir", "config", "ms_loss_scaler", "ms_loss_scaler_value"), _RUN),
}
_DEPTHS = {"det_resnet18": 18, "det_resnet34": 34, "det_resnet50": 50, "det_resnet101": 101}
_Changes = dict[str, Any]


@dataclass
class _Translator:
    """Takes each value once; what is left over has no counterpart."""

    values: Mapping[str, _Value]
    ignored: list[str] = field(default_factory=list)
    unmapped: list[Problem] = field(default_factory=list)

    def changes(self) -> dict[str, tuple[Any, _Value]]:
        """Our values by our names, each with where it was stated."""
        return {name: (ours, value) for value, found in self._each() for name, ours in found.items()}

    def _each(self) -> Iterator[tuple[_Value, _Changes]]:
        for name, value in self.values.items():
            reason = next((why for key, why in _IGNORED.items() if name == key or name.startswith(f"{key}.")), None)
            if name in _SAME:
                yield value, {_SAME[name]: value.value}
            elif name in _ONLY:
                if value.value not in _ONLY[name]:
                    self._report(name, value, " or ".join(map(str, _ONLY[name])))
            elif reason is not None:
                self.ignored.append(f"{value.where}: {name} ({reason})")
            elif name in _SPECIAL:
                special = _SPECIAL[name](value.value, self.values)
                if isinstance(special, str):
                    self._report(name, value, special)
                else:
                    yield value, special
            elif name in (_TRAIN, _EVAL):
                yield value, self._transforms(name, value)
            else:
                self._report(name, value, "")

    def _report(self, name: str, value: _Value, allowed: str) -> None:
        self.unmapped.append(Problem(where=f"{value.where}: {name}", given=value.shown(), allowed=allowed))

    def _transforms(self, name: str, value: _Value) -> _Changes:
        """A list of transforms, each a mapping of its name to its settings."""
        if not isinstance(value.value, list):
            self._report(name, value, "a list of transforms")
            return {}
        found: _Changes = {}
        for each in value.value:
            for kind, settings in each.items() if isinstance(each, Table) else [(None, None)]:
                line = each.lines[kind] if isinstance(each, Table) else value.line
                special = _transform(kind, settings if isinstance(settings, Table) else {}, name)
                if isinstance(special, str):
                    place = _Value(value=settings, file=value.file, line=line)
                    self._report(f"{name}.{kind}", place, special)
                else:
                    found |= special
        return self._agreeing(name, found, value)

    def _agreeing(self, name: str, found: _Changes, value: _Value) -> _Changes:
        """A picture has one size and one normalisation here: those of the evaluation, which those of training are."""
        if name == _TRAIN and _EVAL in self.values:
            evaluation = _Translator({}).picture(self.values[_EVAL])
            for key in sorted(set(found) & set(evaluation)):
                if found[key] != evaluation[key]:
                    self._report(f"{name} ({key.removeprefix('detector.image.')})", value, "that of eval_transforms")
            return {key: ours for key, ours in found.items() if key not in evaluation}
        return found

    def picture(self, value: _Value) -> _Changes:
        """What a list of transforms makes of the picture, its problems aside."""
        found = self._transforms(_EVAL, value)
        return {key: ours for key, ours in found.items() if key.startswith("detector.image.")}


_TRAIN, _EVAL = "data.train_transforms.item_transforms", "data.eval_transforms.item_transforms"


def _transform(kind: Any, settings: Mapping[Any, Any], name: str) -> _Changes | str:
    """What a transform means here, or a text: what would be allowed."""
    match kind:
        case "RandomFlip" if name == _TRAIN and set(settings) <= {"prob"}:
            return {"data.flip": settings.get("prob", 0.5)}
        case "Resize" if settings.get("keep_ratio", True) is True and set(settings) <= {"target_size", "keep_ratio"}:
            size = settings.get("target_size")
            return {"detector.image.canvas": [size, size] if isinstance(size, int) else size}
        case "NormalizeImage" if settings.get("norm_type", "mean_std") == "mean_std":
            return _normalisation(settings)
        case "TransposeImage" if settings.get("hwc2chw", True) is True:
            return {"detector.image.channel_order": "bgr" if settings.get("bgr2rgb", False) is True else "rgb"}
        case "LabelsPadding":
            return {}
    return "RandomFlip (training), Resize with keep_ratio, NormalizeImage with mean_std, TransposeImage, LabelsPadding"


def _normalisation(settings: Mapping[Any, Any]) -> _Changes | str:
    factor = 255.0 if settings.get("is_scale", True) is True else 1.0
    found = {}
    for ours, theirs in (("detector.image.mean", "mean"), ("detector.image.std", "std")):
        numbers = settings.get(theirs)
        if not isinstance(numbers, list) or len(numbers) != 3:
            return "a mean and a std of three numbers each"
        if not all(isinstance(each, int | float) for each in numbers):
            return "a mean and a std of three numbers each"
        found[ours] = [round(each * factor, 6) for each in numbers]
    return found


def _depth(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    if not isinstance(value, str) or value not in _DEPTHS:
        return ", ".join(_DEPTHS)
    return {"detector.backbone.depth": _DEPTHS[value]}


def _pretrained(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    return {"detector.backbone.weights": "imagenet" if value else None} if isinstance(value, bool) else "true or false"


def _frozen(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    return {"detector.backbone.frozen_stages": 2 if value else 0} if isinstance(value, bool) else "true or false"


def _norm(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    return {"detector.backbone.norm": "frozen" if value else "batch"} if isinstance(value, bool) else "true or false"


def _num_outs(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    return {"detector.neck.extra": {4: "none", 5: "pool"}[value]} if value in (4, 5) else "4 or 5"


def _pre_nms(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    return {"detector.proposals.train.pre_nms": value, "detector.proposals.test.pre_nms": value}


def _post_nms(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    return {"detector.proposals.train.post_nms": value, "detector.proposals.test.post_nms": value}


def _decay_of_vectors(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    decay = 0.0 if value is True else None
    return {"train.optimizer.norm_weight_decay": decay, "train.optimizer.bias_weight_decay": decay}


def _milestones(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    epochs = values["epochs"].value if "epochs" in values else None
    numbers = isinstance(value, list) and all(isinstance(each, int | float) for each in value)
    if not isinstance(epochs, int) or epochs < 1 or not numbers:
        return "a list of epochs, and their number under `epochs`"
    return {"train.schedule.milestones": [each / epochs for each in value]}


def _warm_up(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    if value == 0:
        return {"train.warm_up": None}
    factor = values["lr.warmup_ratio"].value if "lr.warmup_ratio" in values else 1.0
    return {"train.warm_up": {"steps": value, "factor": factor}}


def _precision(value: Any, values: Mapping[str, _Value]) -> _Changes | str:
    return {"train.precision": "fp16" if value else "float32"} if isinstance(value, bool) else "true or false"


_SPECIAL: dict[str, Callable[[Any, Mapping[str, _Value]], _Changes | str]] = {
    "backbone.name": _depth,
    "backbone.pretrained": _pretrained,
    "backbone.frozen_2stage": _frozen,
    "backbone.frozen_bn": _norm,
    "backbone.fpn.num_outs": _num_outs,
    "rpn_head.train_proposal.pre_nms_top_n": _pre_nms,
    "rpn_head.train_proposal.post_nms_top_n": _post_nms,
    "optimizer.filter_bias_and_bn": _decay_of_vectors,
    "lr.milestones": _milestones,
    "lr.warmup_step": _warm_up,
    "lr.warmup_ratio": lambda value, values: {},
    "mix": _precision,
}
