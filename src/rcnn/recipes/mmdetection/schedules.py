"""MMDetection's optimizers, schedules and loops (3.x and 2.x) as our training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rcnn.recipes.mmdetection.ledger import Part
from rcnn.recipes.mmdetection.parts import FIXED
from rcnn.recipes.recipe import (
    AdamSpec,
    AdamWSpec,
    CosineSpec,
    MultiStepSpec,
    OptimizerSpec,
    SGDSpec,
    TrainSpec,
    WarmUpSpec,
)

# MMDetection's documentation: a config states the pictures on each of eight devices.
NUM_DEVICES = 8
_AMP = ("AmpOptimWrapper",)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How long a training lasts; `unit` is what its schedule counts."""

    length: int
    unit: Literal["epochs", "steps"]
    evaluated_every: int
    repeats: int
    """How often the pictures are gone through in one of its epochs (RepeatDataset)."""

    @property
    def epochs(self) -> int:
        """Each epoch has a step at least, so that this many suffice where steps are counted."""
        return self.length * (self.repeats if self.unit == "epochs" else 1)

    @property
    def every_epochs(self) -> int:
        return self.evaluated_every * self.repeats if self.unit == "epochs" else 1


def train_spec(
    loop: Loop, optimizer: OptimizerSpec, schedule: Schedule, *, batch: int, wrapper: Wrapper, seed: int
) -> TrainSpec:
    return TrainSpec(
        epochs=loop.epochs,
        max_steps=loop.length if loop.unit == "steps" else None,
        batch_size=batch,
        accumulate=wrapper.accumulate,
        optimizer=optimizer,
        schedule=schedule.spec,
        warm_up=schedule.warm_up,
        clip_norm=wrapper.clip_norm,
        precision=wrapper.precision,
        seed=seed,
    )


# ---------------------------------------------------------------------------------------------------------- optimizers


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """What surrounds the optimizer."""

    clip_norm: float | None
    precision: Literal["float32", "fp16", "bf16"]
    accumulate: int


def wrapper(part: Part) -> tuple[OptimizerSpec, Wrapper]:
    """`optim_wrapper` (3.x)."""
    kind = part.kind("OptimWrapper")
    if kind not in {"OptimWrapper", *_AMP}:
        part.refuse("type", "OptimWrapper or AmpOptimWrapper")
    precision: Literal["float32", "fp16", "bf16"] = "float32"
    if kind in _AMP:
        part.only("loss_scale", "dynamic")
        half = part.text("dtype", "float16")
        precision = "bf16" if half == "bfloat16" else "fp16"
    accumulate = part.count("accumulative_counts", 1)
    found = Wrapper(clip_norm=clip_norm(part, "clip_grad"), precision=precision, accumulate=accumulate)
    spec = optimizer(part.part("optimizer"), part.part("paramwise_cfg"))
    part.close()
    return spec, found


def clip_norm(part: Part, key: str) -> float | None:
    if part.peek(key) is None:
        part.take(key)
        return None
    inner = part.part(key)
    inner.only("norm_type", 2)
    limit = inner.number("max_norm", 0)
    inner.close()
    return float(limit) if limit > 0 else None


def optimizer(part: Part, by_kind: Part) -> OptimizerSpec:
    """`optimizer` with `paramwise_cfg`."""
    kind = part.kind("SGD")
    decay = float(part.number("weight_decay", 0.0 if kind != "AdamW" else 0.01))
    shared: dict[str, Any] = {
        "weight_decay": decay,
        "norm_weight_decay": _share_of(by_kind, "norm_decay_mult", decay),
        "bias_weight_decay": _share_of(by_kind, "bias_decay_mult", decay),
        "bias_lr_factor": float(by_kind.number("bias_lr_mult", 1.0)),
    }
    by_kind.ignore("a parameter under several names is taken once", "bypass_duplicate")
    by_kind.close()
    rate = part.number("lr", 0.0)
    if rate <= 0:
        raise part.fail("lr", ("a learning rate above 0",))
    shared["lr"] = float(rate)
    if kind == "SGD":
        spec: OptimizerSpec = SGDSpec(
            momentum=float(part.number("momentum", 0.0)), nesterov=part.truth("nesterov", False), **shared
        )
    elif kind in {"Adam", "AdamW"}:
        betas = part.numbers("betas", (0.9, 0.999))
        if len(betas) != 2:
            part.refuse("betas", "two numbers")
            betas = (0.9, 0.999)
        make = AdamWSpec if kind == "AdamW" else AdamSpec
        spec = make(betas=(float(betas[0]), float(betas[1])), **shared)
    else:
        raise part.fail("type", ("SGD", "Adam", "AdamW"))
    part.close()
    return spec


def _share_of(part: Part, key: str, decay: float) -> float | None:
    return decay * part.number(key, 1.0) if key in part else None


# ----------------------------------------------------------------------------------------------------------- schedules


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The rate's way, and its beginning."""

    spec: MultiStepSpec | CosineSpec
    warm_up: WarmUpSpec | None


def schedulers(parts: list[Part], loop: Loop, rate: float) -> Schedule:
    """`param_scheduler` (3.x)."""
    warm_up, spec = None, None
    for part in parts:
        kind = part.kind()
        by_epoch = part.truth("by_epoch", True)
        part.ignore(FIXED, "convert_to_iter_based", "verbose")
        if kind in {"LinearLR", "ConstantLR"} and not by_epoch and part.number("begin", 0) == 0 and warm_up is None:
            warm_up = _warm_up(part, kind)
        elif kind == "MultiStepLR" and by_epoch == (loop.unit == "epochs") and spec is None:
            spec = _multi_step(part, loop)
        elif kind == "CosineAnnealingLR" and by_epoch == (loop.unit == "epochs") and spec is None:
            spec = _cosine(part, loop, rate)
        else:
            part.refuse_whole("a warm-up by iterations, then MultiStepLR or CosineAnnealingLR over the whole training")
        part.close()
    return Schedule(spec=spec or MultiStepSpec(milestones=()), warm_up=warm_up)


def _warm_up(part: Part, kind: str) -> WarmUpSpec | None:
    key = "start_factor" if kind == "LinearLR" else "factor"
    factor = float(part.number(key, 1 / 3))
    part.only("end_factor", 1.0)
    steps = part.whole("end", 0)
    if steps < 1 or not 0 <= factor <= 1:
        part.refuse("end", "a number of steps, and a factor between 0 and 1")
        return None
    return WarmUpSpec(steps=steps, factor=factor, shape="linear" if kind == "LinearLR" else "constant")


def _multi_step(part: Part, loop: Loop) -> MultiStepSpec:
    begin, end = part.number("begin", 0), part.number("end", loop.length)
    given = part.numbers("milestones", ())
    gamma = float(part.number("gamma", 0.1))
    # A scheduler rests outside its span, and counts from its begin.
    reached = [begin + step for step in given if begin + step < end]
    if len(reached) < len(given):
        part.differs("milestones", f"those from its end ({end:g}) on are never reached, here as there")
    return multi_step(reached, loop.length, gamma)


def multi_step(steps: list[float], length: int, gamma: float) -> MultiStepSpec:
    return MultiStepSpec(milestones=tuple(step / length for step in steps if 0 <= step <= length), gamma=gamma)


def _cosine(part: Part, loop: Loop, rate: float) -> CosineSpec:
    final = part.number("eta_min_ratio", part.number("eta_min", 0.0) / rate)
    for key, whole in (("begin", 0), ("end", loop.length), ("T_max", loop.length)):
        if part.peek(key, whole) != whole:
            part.differs(key, "the cosine lasts from the beginning to the end of the training here")
        part.ignore("the cosine lasts as long as the training", key)
    return CosineSpec(final_factor=float(min(max(final, 0.0), 1.0)))


def learning_rate(part: Part, loop: Loop, rate: float) -> Schedule:
    """`lr_config` (2.x)."""
    policy = part.text("policy", "step")
    shape = part.text("warmup", "none")
    steps, factor = part.whole("warmup_iters", 0), float(part.number("warmup_ratio", 0.1))
    part.only("warmup_by_epoch", False)
    part.only("by_epoch", loop.unit == "epochs")
    warm_up = None
    if shape in {"linear", "constant"} and steps > 0 and 0 <= factor <= 1:
        warm_up = WarmUpSpec(steps=steps, factor=factor, shape="linear" if shape == "linear" else "constant")
    elif shape != "none":
        part.refuse("warmup", "linear or constant")
    spec: MultiStepSpec | CosineSpec = MultiStepSpec(milestones=())
    if policy == "step":
        spec = multi_step(list(part.numbers("step", ())), loop.length, float(part.number("gamma", 0.1)))
    elif policy == "CosineAnnealing":
        final = part.number("min_lr_ratio", part.number("min_lr", 0.0) / rate)
        spec = CosineSpec(final_factor=float(min(max(final, 0.0), 1.0)))
    elif policy != "fixed":
        part.refuse("policy", "step, CosineAnnealing or fixed")
    part.close()
    return Schedule(spec=spec, warm_up=warm_up)
