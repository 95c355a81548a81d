"""Learning-rate schedules as pure functions: from the number of steps already done to a factor of the learning rate.

A factor that depends on the step alone needs no state in a checkpoint, and a resumed training cannot get it wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

Schedule = Callable[[int], float]


# The way from the first factor to 1: a straight line, or the first factor until the last step of the warm-up.
WarmUpShape = Literal["linear", "constant"]


def warm_up(step: int, *, steps: int, start_factor: float, shape: WarmUpShape = "linear") -> float:
    """From `start_factor` at step 0 to 1 at step `steps`, and 1 from there on."""
    if step >= steps:
        return 1.0
    if shape == "constant":
        return start_factor
    return start_factor + (1.0 - start_factor) * step / steps


def multi_step(step: int, *, milestones: Sequence[int], gamma: float) -> float:
    """`gamma` to the power of the milestones (in steps) that are reached."""
    return gamma ** sum(step >= milestone for milestone in milestones)


def cosine(step: int, *, total_steps: int, end_factor: float = 0.0) -> float:
    """Half a cosine from 1 at step 0 to `end_factor` at `total_steps`."""
    done = min(step / total_steps, 1.0) if total_steps else 1.0
    return end_factor + (1.0 - end_factor) * 0.5 * (1.0 + math.cos(math.pi * done))


def multi_step_schedule(
    *,
    milestones: Sequence[int],
    gamma: float = 0.1,
    warm_up_steps: int = 0,
    warm_up_factor: float = 0.001,
    warm_up_shape: WarmUpShape = "linear",
) -> Schedule:
    """Warm-up times multi-step, as torchvision, MMDetection and detectron2 multiply them."""

    def factor(step: int) -> float:
        rise = warm_up(step, steps=warm_up_steps, start_factor=warm_up_factor, shape=warm_up_shape)
        return rise * multi_step(step, milestones=milestones, gamma=gamma)

    return factor


def cosine_schedule(
    *,
    total_steps: int,
    end_factor: float = 0.0,
    warm_up_steps: int = 0,
    warm_up_factor: float = 0.001,
    warm_up_shape: WarmUpShape = "linear",
) -> Schedule:
    """Warm-up, then a cosine over the steps that are left after it."""

    def factor(step: int) -> float:
        if step < warm_up_steps:
            return warm_up(step, steps=warm_up_steps, start_factor=warm_up_factor, shape=warm_up_shape)
        return cosine(step - warm_up_steps, total_steps=total_steps - warm_up_steps, end_factor=end_factor)

    return factor


def constant_schedule(*, warm_up_steps: int = 0, warm_up_factor: float = 0.001) -> Schedule:
    """Warm-up, then no change."""
    return multi_step_schedule(milestones=(), warm_up_steps=warm_up_steps, warm_up_factor=warm_up_factor)
