"""One optimizer step: forward, backward, agreement of the processes, finite check, clipping, update. In this order.

Letter: T loss terms.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from rcnn.detectors.interface import AbstractDetector
from rcnn.engine.processes import gather_objects
from rcnn.errors import Problem, RunError
from rcnn.records import ImageBatch, Losses, Target

Batch = tuple[ImageBatch, Sequence[Target]]

# GradScaler halves its scale at every overflow: after this many in a row the scale itself is next to nothing.
MAX_OVERFLOWS = 30
LOOK_AT = (
    "nothing was updated; lower train.optimizer.lr, lower train.clip_norm or give one, lengthen train.warm_up.steps or "
    "give a warm-up; look at these pictures"
)


class LossModule(nn.Module):
    """Lets wrappers that know `forward` only (DDP's hooks, autocast) call `detector.loss`."""

    def __init__(self, detector: AbstractDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: ImageBatch, targets: Sequence[Target]) -> Losses:
        return self.detector.loss(images, targets)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What all processes agree on after a step; `losses` are means over them, `images` is their sum."""

    losses: dict[str, float]
    gradient_norm: float
    images: int
    stop_signal: int
    save_due: bool


class Stepper:
    """Trains a detector by one step at a time. The optimizer is touched only after every number was found finite."""

    def __init__(
        self,
        *,
        detector: AbstractDetector,
        optimizer: Optimizer,
        accelerator: Accelerator,
        clip_norm: float | None,
        name_picture: Callable[[int], str] = str,
    ) -> None:
        self._accelerator = accelerator
        self._clip_norm = clip_norm
        self._bare_optimizer = optimizer
        self._module, self._optimizer = accelerator.prepare(LossModule(detector), optimizer)
        self._parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
        self._overflows = 0
        self._name_picture = name_picture

    def step(self, batches: Sequence[Batch], *, number: int, stop_signal: int, save_due: bool) -> StepResult:
        """One update from the mean loss of `batches`; `number` is for messages.

        Raises RunError where a loss or gradient is not finite, on all processes together and before the update.
        """
        self._optimizer.zero_grad()
        terms = self._backward(batches)
        gradient_norm = self._gradient_norm()
        images = sum(len(images) for images, _ in batches)
        result = self._agree(terms, gradient_norm, images=images, stop_signal=stop_signal, save_due=save_due)
        self._refuse_non_finite(result, terms, batches, number)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, gradient_norm)
        self._optimizer.step()
        return result

    def _backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Adds up gradients of the mean over `batches`; processes exchange them once, with the last batch."""
        sums: dict[str, Tensor] = {}
        for index, (images, targets) in enumerate(batches):
            images = images.to(self._accelerator.device, non_blocking=True)
            targets = [target.to(self._accelerator.device, non_blocking=True) for target in targets]
            is_last = index == len(batches) - 1
            with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self._module):
                losses = self._module(images, targets)
                self._accelerator.backward(torch.stack(list(losses.values())).sum() / len(batches))
            for name, loss in losses.items():
                share = loss.detach().float() / len(batches)
                sums[name] = sums[name] + share if name in sums else share
        return sums

    def _gradient_norm(self) -> Tensor:
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self._bare_optimizer)
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def _agree(
        self, terms: dict[str, Tensor], gradient_norm: Tensor, *, images: int, stop_signal: int, save_due: bool
    ) -> StepResult:
        """One small sum over the processes and one wait for the device carry everything that has to be known."""
        world = self._accelerator.num_processes
        flags = [stop_signal == signal.SIGINT, stop_signal == signal.SIGTERM, save_due, images]
        values = torch.stack([*terms.values(), gradient_norm.float()])
        facts = torch.cat([values.new_tensor([float(flag) for flag in flags]), values])
        if world > 1:
            torch.distributed.all_reduce(facts)
        interrupts, terminations, saves, all_images, *sums = facts.tolist()
        means = [value / world for value in sums]
        return StepResult(
            losses=dict(zip(terms, means, strict=False)),
            gradient_norm=means[-1],
            images=round(all_images),
            stop_signal=signal.SIGINT if interrupts else signal.SIGTERM if terminations else 0,
            save_due=bool(saves),
        )

    def _refuse_non_finite(
        self, result: StepResult, terms: dict[str, Tensor], batches: Sequence[Batch], number: int
    ) -> None:
        if not all(map(math.isfinite, result.losses.values())):
            mine = _non_finite_terms(terms, self._names(batches), number)
            raise RunError([problem for share in gather_objects(self._accelerator, mine) for problem in share])
        self._overflows = 0 if math.isfinite(result.gradient_norm) else self._overflows + 1
        # With a loss scaler an overflow is ordinary: the scaler skips the update and lowers its scale.
        if self._overflows > (MAX_OVERFLOWS if self._accelerator.scaler is not None else 0):
            where = f"step {number}, gradients"
            given = f"not finite (norm {result.gradient_norm}) though every loss is; pictures {self._names(batches)}"
            raise RunError(Problem(where=where, given=given, remedy=LOOK_AT))

    def _names(self, batches: Sequence[Batch]) -> str:
        return ", ".join(self._name_picture(image_id) for images, _ in batches for image_id in images.image_ids)


def _non_finite_terms(terms: dict[str, Tensor], pictures: str, number: int) -> list[Problem]:
    """One problem of this process, with all terms; none where all are finite."""
    values = {name: value.item() for name, value in terms.items()}
    spoilt = {name: value for name, value in values.items() if not math.isfinite(value)}
    if not spoilt:
        return []
    where = f"step {number}, loss term{'s' if len(spoilt) > 1 else ''} {', '.join(spoilt)}"
    given = f"{' and '.join(sorted({str(value) for value in spoilt.values()}))} on pictures {pictures}"
    return [Problem(where=where, given=given, remedy=LOOK_AT)]
