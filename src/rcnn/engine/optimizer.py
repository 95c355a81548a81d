"""Optimizers over parameter groups: weights, norms and biases, each with its own decay and learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import SGD, Adam, AdamW, Optimizer

from rcnn.errors import CheckpointError, Problem, SetupError

ParameterGroup = dict[str, Any]

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    bias_lr_factor: float = 1.0,
    bias_weight_decay: float | None = None,
) -> list[ParameterGroup]:
    """The trainable parameters of `module` in up to three groups named "weights", "norms" and "biases".

    A parameter that stands under several names is taken once. Both parameters of a norm count as norm, not as bias (as
    in torchvision's references). `bias_lr_factor=2, bias_weight_decay=0` is Caffe's rule and that of the first
    Faster R-CNN. Raises SetupError where everything is frozen.
    """
    by_kind: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "biases": []}
    for kind, parameter in _trainable(module):
        by_kind[kind].append(parameter)
    if not any(by_kind.values()):
        given = "every parameter of the detector is frozen"
        raise SetupError(Problem(where="optimizer", given=given, remedy="leave at least one part trainable"))
    rates = {"weights": lr, "norms": lr, "biases": lr * bias_lr_factor}
    decays = {"weights": weight_decay, "norms": norm_weight_decay, "biases": bias_weight_decay}
    return [
        {
            "name": kind,
            "params": parameters,
            "lr": rates[kind],
            "initial_lr": rates[kind],
            "weight_decay": weight_decay if decays[kind] is None else decays[kind],
        }
        for kind, parameters in by_kind.items()
        if parameters
    ]


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[nn.Parameter] = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            yield ("norms" if isinstance(part, NORMS) else "biases" if name == "bias" else "weights"), parameter


# `fused` is one pass over memory instead of one per operation, on the CPU as on CUDA.
def sgd(groups: Sequence[ParameterGroup], *, momentum: float = 0.9, nesterov: bool = False) -> Optimizer:
    """Stochastic gradient descent with momentum."""
    return SGD(list(groups), momentum=momentum, nesterov=nesterov, fused=True)


def adamw(groups: Sequence[ParameterGroup], *, betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    """Adam with decoupled weight decay."""
    return AdamW(list(groups), betas=betas, fused=True)


def adam(groups: Sequence[ParameterGroup], *, betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    """Adam with weight decay inside the gradient (the option of simple-faster-rcnn-pytorch)."""
    return Adam(list(groups), betas=betas, fused=True)


def scale_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Sets every group to its `initial_lr` times `factor`: the learning rate depends on the step alone."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Takes up momentum and the like from a saved `state_dict()`; learning rates and decays stay those of `optimizer`.

    Raises CheckpointError where the groups hold other numbers of parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != saved_sizes:
        given = f"groups of {sizes} parameters"
        allowed = f"groups of {saved_sizes} (as when it was saved)"
        raise CheckpointError(Problem(where="optimizer", given=given, allowed=allowed, remedy="resume as it began"))
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
