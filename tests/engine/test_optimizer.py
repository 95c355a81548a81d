"""Parameter groups, and steps by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rcnn.engine.optimizer import adam, adamw, load_optimizer_state, parameter_groups, scale_learning_rate, sgd
from rcnn.errors import CheckpointError, SetupError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.GroupNorm(1, 2))


def test_groups_by_kind() -> None:
    module = net()
    groups = parameter_groups(
        module, lr=0.1, weight_decay=0.01, norm_weight_decay=0.0, bias_lr_factor=2.0, bias_weight_decay=0.5
    )
    summary = {g["name"]: ([p.shape for p in g["params"]], g["lr"], g["initial_lr"], g["weight_decay"]) for g in groups}
    assert summary == {
        "weights": ([(4, 3, 1, 1), (2, 4)], 0.1, 0.1, 0.01),
        "norms": ([(4,), (4,), (2,), (2,)], 0.1, 0.1, 0.0),
        "biases": ([(4,), (2,)], 0.2, 0.2, 0.5),
    }


def test_decay_is_one_number_unless_said_otherwise() -> None:
    assert {group["weight_decay"] for group in parameter_groups(net(), lr=0.1, weight_decay=0.01)} == {0.01}


def test_frozen_are_left_out_and_shared_taken_once() -> None:
    module = net()
    module[1].requires_grad_(False)
    module[3].requires_grad_(False)
    module.append(module[2])
    groups = parameter_groups(module, lr=0.1, weight_decay=0.0)
    assert [(group["name"], len(group["params"])) for group in groups] == [("weights", 2), ("biases", 2)]


def test_everything_frozen() -> None:
    with pytest.raises(SetupError, match="every parameter of the detector is frozen"):
        parameter_groups(net().requires_grad_(False), lr=0.1, weight_decay=0.0)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))


def test_two_steps_of_sgd_by_hand() -> None:
    module = Scalar()
    optimizer = sgd(parameter_groups(module, lr=0.1, weight_decay=0.1), momentum=0.9)
    values = []
    for _ in range(2):
        module.weight.grad = torch.tensor(0.5)
        optimizer.step()
        values.append(module.weight.item())
    # step 1: d = 0.5 + 0.1 * 1 = 0.6, w = 1 - 0.06; step 2: d = 0.9 * 0.6 + 0.5 + 0.094 = 1.134, w = 0.94 - 0.1134
    assert values == pytest.approx([0.94, 0.8266])


def test_one_step_of_adam_and_adamw_by_hand() -> None:
    for build, expected in ((adam, 1 - 0.1), (adamw, 1 * (1 - 0.1 * 0.1) - 0.1)):
        module = Scalar()
        optimizer = build(parameter_groups(module, lr=0.1, weight_decay=0.1))
        module.weight.grad = torch.tensor(0.5)
        optimizer.step()
        # the first step of Adam has the size lr whatever the gradient; AdamW shrinks the weight by lr * decay before
        assert module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_scale_learning_rate_keeps_the_ratio_of_groups() -> None:
    optimizer = sgd(parameter_groups(net(), lr=0.1, weight_decay=0.0, bias_lr_factor=2.0))
    for factor in (0.5, 0.1):
        scale_learning_rate(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01, 0.02])


def test_loaded_state_keeps_the_hyperparameters_of_the_recipe() -> None:
    module = Scalar()
    before = sgd(parameter_groups(module, lr=0.1, weight_decay=0.0))
    module.weight.grad = torch.tensor(0.5)
    before.step()
    after = sgd(parameter_groups(module, lr=0.3, weight_decay=0.2))
    load_optimizer_state(after, before.state_dict())
    assert after.param_groups[0]["initial_lr"] == 0.3
    assert after.state[module.weight]["momentum_buffer"].item() == 0.5


def test_state_of_other_groups_is_refused() -> None:
    saved = sgd(parameter_groups(Scalar(), lr=0.1, weight_decay=0.0)).state_dict()
    with pytest.raises(CheckpointError, match=r"groups of \[2, 4, 2\] parameters; allowed: groups of \[1\]"):
        load_optimizer_state(sgd(parameter_groups(net(), lr=0.1, weight_decay=0.0)), saved)
