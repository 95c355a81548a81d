"""What every dense head owes to detectors and proposal stages, as a check that can be run on any of them.

Letters: N images, L levels, K classes.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.records import Levels, LevelShape, Losses, Size, Target

# x1, y1, x2, y2 in shares of the picture's sides.
Boxes = tuple[tuple[float, float, float, float], ...]
# From the number of classes to a head: what a recipe does for a detector (K classes) and for a first stage (one).
MakeDenseHead = Callable[[int], AbstractDenseHead]


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """One picture of a case, sides in shares of the case's unit (the largest stride, at least 64 pixels)."""

    height: float = 1.5
    width: float = 1.25
    boxes: Boxes = ()
    ignore: Boxes = ()


_ONE: Boxes = ((0.1, 0.15, 0.6, 0.55),)
# Large and small, overlapping, two with one centre, one of a few pixels, one on two edges, one as large as the picture.
_MANY: Boxes = (
    (0.1, 0.15, 0.6, 0.55),
    (0.2, 0.2, 0.7, 0.7),
    (0.2, 0.4, 0.7, 0.5),
    (0.8, 0.8, 0.83, 0.82),
    (0.7, 0.0, 1.0, 0.3),
    (0.0, 0.0, 1.0, 1.0),
)
# So far beyond the picture that every anchor lies in it, whatever its size.
_EVERYWHERE: Boxes = ((-50.0, -50.0, 50.0, 50.0),)
# The same score comes out with another last bit where a vector of another length is computed.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class DenseHeadCase:
    """One situation that a head must master, named, with what is in it.

    `teaches_classes` and `teaches_boxes` say whether there is something to learn of them; None: that is not asked (the
    loss of a box far from its truth may have no gradient).
    """

    name: str
    about: str
    pictures: tuple[_Picture, ...]
    teaches_classes: bool | None = True
    teaches_boxes: bool | None = None


CASES: tuple[DenseHeadCase, ...] = (
    DenseHeadCase(
        name="no boxes",
        about="two pictures without boxes: all is background, and there is nothing to learn of boxes",
        pictures=(_Picture(), _Picture(height=0.75, width=1.0)),
        teaches_boxes=False,
    ),
    DenseHeadCase(
        name="one box",
        about="a picture with one box beside one without",
        pictures=(_Picture(boxes=_ONE), _Picture(height=0.75, width=1.0)),
    ),
    DenseHeadCase(
        name="many boxes",
        about="overlapping boxes, two with one centre, one of a few pixels, one as large as the picture",
        pictures=(_Picture(boxes=_MANY), _Picture(height=0.75, width=1.0, boxes=_ONE)),
        teaches_boxes=True,
    ),
    DenseHeadCase(
        name="small picture",
        about="a batch of one picture smaller than the largest stride: levels of a single cell",
        pictures=(_Picture(height=0.3, width=0.2, boxes=_ONE),),
    ),
    DenseHeadCase(
        name="box without area",
        about="a box of no width beside an ordinary one",
        pictures=(_Picture(boxes=((0.3, 0.2, 0.3, 0.6), *_ONE)),),
    ),
    DenseHeadCase(
        name="all ignored",
        about="no boxes, and an ignore region over everything: no class is learnt anywhere",
        pictures=(_Picture(ignore=_EVERYWHERE), _Picture(height=0.75, width=1.0, ignore=_EVERYWHERE)),
        teaches_classes=False,
        teaches_boxes=False,
    ),
    DenseHeadCase(
        name="ignored beside boxes",
        about="ignore regions beside boxes, over a box, and over a whole picture with a box",
        pictures=(
            _Picture(boxes=_MANY[:3], ignore=((0.5, 0.5, 1.0, 1.0), (0.1, 0.1, 0.4, 0.3))),
            _Picture(height=0.75, width=1.0, boxes=_ONE, ignore=((0.0, 0.0, 1.0, 1.0),)),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class _Precision:
    name: str
    dtype: torch.dtype
    mixed: bool = False

    def context(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.mixed else nullcontext()


_PRECISIONS = (
    _Precision(name="float32", dtype=torch.float32),
    _Precision(name="float64", dtype=torch.float64),
    _Precision(name="mixed precision", dtype=torch.float32, mixed=True),
)


def assert_is_dense_head(
    head: AbstractDenseHead | MakeDenseHead,
    *,
    in_channels: int,
    strides_px: Sequence[int],
    num_classes: int = 3,
    cases: Sequence[DenseHeadCase] = CASES,
) -> None:
    """Raise AssertionError, with everything that was found, unless the head keeps the contract of `AbstractDenseHead`.

    Given a function from the number of classes to a head, both roles are examined: `num_classes` as a detector's head
    and one as a first stage; given a head, the role that it has. `in_channels` and `strides_px` are those of the maps
    it was built for. The head itself is left as it was: copies are worked on.
    """
    if isinstance(head, AbstractDenseHead):
        heads = {f"{head.num_classes} class{'es' if head.num_classes > 1 else ''}": head}
    else:
        heads = {f"{num_classes} classes": head(num_classes), "1 class": head(1)}
        for asked, built in zip((num_classes, 1), heads.values(), strict=True):
            assert built.num_classes == asked, f"a head of {asked} classes was asked for and has {built.num_classes}"
    places: dict[str, list[str]] = {}
    for role, built in heads.items():
        examined = examine_dense_head(built, in_channels=in_channels, strides_px=strides_px, cases=cases)
        for case, found in examined.items():
            for fault in found:
                places.setdefault(f"{role}, {fault}", []).append(case)
    lines = "\n".join(f"  - {fault} (case: {', '.join(dict.fromkeys(of))})" for fault, of in places.items())
    assert not places, f"the head does not keep the contract of dense heads ({len(places)} faults):\n{lines}"


def examine_dense_head(
    head: AbstractDenseHead,
    *,
    in_channels: int,
    strides_px: Sequence[int],
    cases: Sequence[DenseHeadCase] = CASES,
) -> dict[str, tuple[str, ...]]:
    """What is wrong with the head, by name of the case; nothing where it keeps the contract.

    Each case is run in float32, float64 and mixed precision, trained and decoded in training and in evaluation mode.
    """
    found: dict[str, tuple[str, ...]] = {}
    for case in cases:
        faults: dict[str, list[str]] = {}
        for precision in _PRECISIONS:
            levels = _levels(case, in_channels, strides_px, precision.dtype)
            working = copy.deepcopy(head).to(precision.dtype)
            checks = {
                "loss": _loss_faults(working.train(), levels, case, precision),
                "decode": _decode_faults(working, levels, precision),
            }
            for name, check in checks.items():
                for fault in dict.fromkeys(_all_of(check)):
                    faults.setdefault(f"{name}: {fault}", []).append(precision.name)
        found[case.name] = tuple(f"{fault} [{', '.join(precisions)}]" for fault, precisions in faults.items())
    return found


def _all_of(check: Iterator[str]) -> list[str]:
    """Every fault that a check finds, an exception among them with the line it came from."""
    faults: list[str] = []
    try:
        faults.extend(check)
    except Exception as error:  # whatever a user's head raises is a fault of its case, not the end of the examination
        place = traceback.extract_tb(error.__traceback__)[-1]
        faults.append(f"raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})")
    return faults


# ------------------------------------------------------------------------------------------------------------- material


def _levels(case: DenseHeadCase, in_channels: int, strides_px: Sequence[int], dtype: torch.dtype) -> Levels:
    """Random maps of a pyramid for the case's pictures, each level rounded up as convolutions with stride do."""
    sizes = _sizes(case, strides_px)
    padded = Size(
        height=32 * math.ceil(max(size.height for size in sizes) / 32),
        width=32 * math.ceil(max(size.width for size in sizes) / 32),
    )
    shapes = tuple(
        LevelShape(height=math.ceil(padded.height / stride), width=math.ceil(padded.width / stride), stride_px=stride)
        for stride in strides_px
    )
    generator = torch.Generator().manual_seed(0)
    return Levels(
        maps=tuple(
            torch.randn(len(sizes), in_channels, shape.height, shape.width, generator=generator).to(dtype)
            for shape in shapes
        ),
        shapes=shapes,
        padded_size=padded,
        image_sizes=sizes,
        image_scales=(1.0,) * len(sizes),
        num_roi_levels=len(shapes),
    )


def _sizes(case: DenseHeadCase, strides_px: Sequence[int]) -> tuple[Size, ...]:
    unit = max(64, *strides_px)
    return tuple(Size(height=round(p.height * unit), width=round(p.width * unit)) for p in case.pictures)


def _targets(case: DenseHeadCase, sizes: Sequence[Size], num_classes: int) -> list[Target]:
    """As a data loader gives them: float32, whatever the precision of the head."""
    return [
        Target(
            boxes_xyxy=_pixels(picture.boxes, size),
            labels=torch.arange(len(picture.boxes)) % num_classes,
            ignore_xyxy=_pixels(picture.ignore, size),
        )
        for picture, size in zip(case.pictures, sizes, strict=True)
    ]


def _pixels(shares: Boxes, size: Size) -> Tensor:
    sides = torch.tensor((size.width, size.height, size.width, size.height), dtype=torch.float32)
    return torch.tensor(shares, dtype=torch.float32).reshape(-1, 4) * sides


# ----------------------------------------------------------------------------------------------------------------- loss


def _loss_faults(head: AbstractDenseHead, levels: Levels, case: DenseHeadCase, precision: _Precision) -> Iterator[str]:
    targets = _targets(case, levels.image_sizes, head.num_classes)
    before = copy.deepcopy(targets)
    with precision.context():
        prediction = head(levels)
        losses = head.loss(prediction, targets)
    if not losses:
        yield "no loss"
        return
    yield from _term_faults(losses, precision)
    for number, (target, original) in enumerate(zip(targets, before, strict=True)):
        same = torch.equal(target.boxes_xyxy, original.boxes_xyxy) and torch.equal(target.labels, original.labels)
        if not same:
            yield f"the targets of picture {number} were changed"
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    yield from _gradient_faults(head)
    yield from _teaching_faults(head, prediction, targets, case, precision)


def _term_faults(losses: Losses, precision: _Precision) -> Iterator[str]:
    for name, loss in losses.items():
        if loss.ndim != 0:
            yield f"{name} has shape {tuple(loss.shape)}, not that of a scalar"
        if not bool(loss.isfinite().all()):
            yield f"{name} is {loss.tolist()}"
        if loss.dtype != precision.dtype:
            yield f"{name} is computed in {loss.dtype}, not in {precision.dtype}"


def _gradient_faults(head: AbstractDenseHead) -> Iterator[str]:
    gradients = {name: parameter.grad for name, parameter in head.named_parameters() if parameter.requires_grad}
    without = [name for name, gradient in gradients.items() if gradient is None]
    if without:
        yield f"no gradient for {', '.join(without)}"
    spoilt = [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
    if spoilt:
        yield f"gradients that are not finite, of {', '.join(spoilt)}"


def _teaching_faults(
    head: AbstractDenseHead,
    prediction: DensePrediction,
    targets: Sequence[Target],
    case: DenseHeadCase,
    precision: _Precision,
) -> Iterator[str]:
    """Whether the class and box maps are taught where the case has something to teach, and nowhere else."""
    leaves = replace(
        prediction,
        classes=tuple(x.detach().requires_grad_() for x in prediction.classes),
        boxes=tuple(x.detach().requires_grad_() for x in prediction.boxes),
        quality=tuple(x.detach().requires_grad_() for x in prediction.quality),
    )
    with precision.context():
        losses = head.loss(leaves, targets)
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    taught = {"classes": _is_taught(leaves.classes + leaves.quality), "boxes": _is_taught(leaves.boxes)}
    if case.teaches_classes is True and not taught["classes"]:
        yield "the maps of classes and quality get no gradient: nothing is learnt of what is an object"
    if case.teaches_classes is False and taught["classes"]:
        yield "the maps of classes and quality get a gradient inside an ignore region without boxes"
    if case.teaches_boxes is True and not taught["boxes"]:
        yield "the maps of boxes get no gradient: nothing is learnt of boxes"
    if case.teaches_boxes is False and taught["boxes"]:
        yield "the maps of boxes get a gradient where there is no box"


def _is_taught(maps: Sequence[Tensor]) -> bool:
    return any(x.grad is not None and bool(x.grad.any()) for x in maps)


# --------------------------------------------------------------------------------------------------------------- decode


@torch.no_grad()
def _decode_faults(head: AbstractDenseHead, levels: Levels, precision: _Precision) -> Iterator[str]:
    for training in (True, False):
        mode = "in training mode" if training else "in evaluation mode"
        with precision.context():
            prediction = head.train(training)(levels)
            if not isinstance(prediction, DensePrediction):
                yield f"forward gives {type(prediction).__name__} {mode}, not DensePrediction"
                return
            found = head.decode(prediction, per_level=None, score_threshold=0.0)
            few = head.decode(prediction, per_level=7, score_threshold=0.0)
        for candidates in (found, few):
            for fault in _candidate_faults(candidates, levels, head.num_classes, precision.dtype):
                yield f"{mode}: {fault}"
        yield from _count_faults(found, few, levels)
        if not training:
            yield from _threshold_faults(head, prediction, found, precision)
            yield from _wild_faults(head, prediction, levels, precision)


def _candidate_faults(found: list[Candidates], levels: Levels, num_classes: int, dtype: torch.dtype) -> Iterator[str]:
    if not isinstance(found, list) or not all(isinstance(candidates, Candidates) for candidates in found):
        yield f"decode gives {type(found).__name__}, not a list of Candidates"
        return
    if len(found) != len(levels.image_sizes):
        yield f"decode gives {len(found)} results for {len(levels.image_sizes)} pictures"
        return
    for candidates, size in zip(found, levels.image_sizes, strict=True):
        yield from _record_faults(candidates, size, len(levels.shapes), num_classes, dtype)


def _record_faults(
    candidates: Candidates, size: Size, num_levels: int, num_classes: int, dtype: torch.dtype
) -> Iterator[str]:
    boxes, scores, labels, level = candidates.boxes_xyxy, candidates.scores, candidates.labels, candidates.level
    if boxes.shape != (len(scores), 4) or not len(scores) == len(labels) == len(level):
        yield f"{tuple(boxes.shape)} boxes, {len(scores)} scores, {len(labels)} labels, {len(level)} levels"
        return
    x1, y1, x2, y2 = boxes.unbind(-1)
    inside = (x1 >= 0) & (y1 >= 0) & (x1 <= x2) & (y1 <= y2) & (x2 <= size.width) & (y2 <= size.height)
    if not bool(inside.all()):
        yield f"a box {[round(x, 3) for x in boxes[~inside][0].tolist()]} that is not inside its picture of {size}"
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        yield "scores that are no probabilities"
    for name, values, limit in (("labels", labels, num_classes), ("levels", level, num_levels)):
        if values.dtype != torch.int64 or not bool(((values >= 0) & (values < limit)).all()):
            yield f"{name} beyond 0..{limit - 1}, or {values.dtype} instead of int64"
    if not bool((level[:-1] <= level[1:]).all()):
        yield "the levels are not one after the other"
    if not bool(((scores[:-1] + _ROUNDING >= scores[1:]) | (level[:-1] != level[1:])).all()):
        yield "candidates of a level are not best first"
    for values in (boxes, scores):
        if values.dtype != dtype:
            yield f"boxes or scores in {values.dtype}, not in {dtype}"


def _count_faults(found: list[Candidates], few: list[Candidates], levels: Levels) -> Iterator[str]:
    for every, best in zip(found, few, strict=True):
        for level in range(len(levels.shapes)):
            there, kept = int((every.level == level).sum()), int((best.level == level).sum())
            if kept != min(there, 7):
                yield f"per_level 7 gives {kept} candidates of level {level}, which has {there}"
        if not _is_part(best, every):
            yield "per_level 7 gives candidates that are not among all"


def _threshold_faults(
    head: AbstractDenseHead, prediction: DensePrediction, found: list[Candidates], precision: _Precision
) -> Iterator[str]:
    """A threshold only leaves out, maybe by another number than the score: MMDetection's heads use the class score."""
    middle = float(torch.cat([candidates.scores for candidates in found]).median())
    with precision.context():
        above = head.decode(prediction, per_level=None, score_threshold=middle)
        none = head.decode(prediction, per_level=None, score_threshold=1.5)
    if not all(_is_part(some, every) for some, every in zip(above, found, strict=True)):
        yield f"a threshold of {middle:.3g} gives candidates that are not there without it"
    if any(candidates.boxes_xyxy.shape != (0, 4) for candidates in none):
        yield "a threshold of 1.5 leaves candidates, or not [0, 4] boxes"


def _is_part(some: Candidates, every: Candidates) -> bool:
    if len(some.scores) == 0:
        return True
    if len(some.scores) > len(every.scores):
        return False
    known = every.scores.sort().values
    above = torch.searchsorted(known, some.scores.contiguous()).clamp(max=len(known) - 1)
    difference = torch.minimum(
        (known[above] - some.scores).abs(), (known[(above - 1).clamp(min=0)] - some.scores).abs()
    )
    return bool((difference <= _ROUNDING).all())


def _wild_faults(
    head: AbstractDenseHead, prediction: DensePrediction, levels: Levels, precision: _Precision
) -> Iterator[str]:
    """Numbers as they are when a training goes astray: boxes far out, and scores that are not numbers."""
    wild = replace(
        prediction,
        boxes=tuple(1e3 * x for x in prediction.boxes),
        classes=(torch.full_like(prediction.classes[0], math.nan), *prediction.classes[1:]),
    )
    with precision.context():
        found = head.decode(wild, per_level=None, score_threshold=0.0)
    for fault in _candidate_faults(found, levels, head.num_classes, precision.dtype):
        yield f"maps that are a thousandfold or not a number: {fault}"
    if any(bool((candidates.level == 0).any()) for candidates in found):
        yield "candidates of the first level, whose scores are not numbers"
