"""Learning-rate factors against hand arithmetic and against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, LinearLR, MultiStepLR

from rcnn.engine.schedule import constant_schedule, cosine, cosine_schedule, multi_step, multi_step_schedule, warm_up


def test_warm_up_is_a_line() -> None:
    # 0.1 + 0.9 * step / 4
    values = [warm_up(step, steps=4, start_factor=0.1) for step in range(6)]
    assert values == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0, 1.0])


def test_no_warm_up() -> None:
    assert warm_up(0, steps=0, start_factor=0.001) == 1.0


def test_multi_step_drops_at_the_milestone_itself() -> None:
    assert [multi_step(step, milestones=(3, 5), gamma=0.1) for step in (2, 3, 4, 5)] == pytest.approx(
        [1, 0.1, 0.1, 0.01]
    )


def test_cosine() -> None:
    # 0.2 + 0.8 * (1 + cos(pi * t)) / 2 at t = 0, 1/3, 1/2, 1, past the end
    values = [cosine(step, total_steps=6, end_factor=0.2) for step in (0, 2, 3, 6, 9)]
    assert values == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])


def test_cosine_schedule_begins_after_the_warm_up() -> None:
    schedule = cosine_schedule(total_steps=10, warm_up_steps=4, warm_up_factor=0.5)
    # warm-up 0.5 + 0.5 * step / 4; then the cosine's middle lies at 4 + 6 / 2
    assert [schedule(step) for step in (0, 2, 4, 7, 10)] == pytest.approx([0.5, 0.75, 1.0, 0.5, 0.0])


def test_constant_schedule() -> None:
    schedule = constant_schedule(warm_up_steps=2, warm_up_factor=0.0)
    assert [schedule(step) for step in (0, 1, 2, 1000)] == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_multi_step_schedule_is_torchvisions() -> None:
    """The product that torchvision's references build of LinearLR per step and MultiStepLR per epoch (5 steps each)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    by_epoch = MultiStepLR(optimizer, milestones=[2, 3], gamma=0.1)
    by_step = LinearLR(optimizer, start_factor=0.001, total_iters=4)
    theirs = []
    for _ in range(4):
        for _ in range(5):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            by_step.step()
        by_epoch.step()
    schedule = multi_step_schedule(milestones=(10, 15), warm_up_steps=4, warm_up_factor=0.001)
    assert [schedule(step) for step in range(20)] == pytest.approx(theirs)


def test_a_constant_warm_up_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    by_step = ConstantLR(optimizer, factor=1 / 3, total_iters=3)
    theirs = []
    for _ in range(6):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        by_step.step()
    schedule = multi_step_schedule(milestones=(), warm_up_steps=3, warm_up_factor=1 / 3, warm_up_shape="constant")
    assert [schedule(step) for step in range(6)] == pytest.approx(theirs)
