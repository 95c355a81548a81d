"""One step: what it adds up, and that nothing is touched where a number is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from fake_training import FakeDetector, FakeLoader
from torch import Tensor, nn
from torch.optim import Optimizer

from rcnn.detectors.interface import AbstractDetector
from rcnn.engine.accelerator import build_accelerator
from rcnn.engine.optimizer import parameter_groups, sgd
from rcnn.engine.step import MAX_OVERFLOWS, Stepper, StepResult
from rcnn.errors import RunError
from rcnn.records import Detections, ImageBatch, Losses, Target


class SquareRootOfZero(torch.autograd.Function):
    """Finite forward, not finite backward."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value * 1

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


class SpoiltDetector(AbstractDetector):
    """A FakeDetector whose loss or gradient is spoilt."""

    def __init__(self, spoil: str) -> None:
        super().__init__()
        self.inner = FakeDetector()
        self.spoil = spoil

    def loss(self, images: ImageBatch, targets: Sequence[Target]) -> Losses:
        losses = self.inner.loss(images, targets)
        if self.spoil == "loss":
            losses["box"] = losses["box"] * float("nan")
        elif self.spoil == "gradient":
            losses["score"] = SquareRootOfZero.apply(losses["score"])
        return losses

    def predict(self, images: ImageBatch) -> list[Detections]:
        return self.inner.predict(images)


def stepper(
    detector: AbstractDetector, *, clip_norm: float | None = None, scaled: bool = False
) -> tuple[Stepper, Optimizer]:
    accelerator = build_accelerator(device="cpu")
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu")  # accelerate itself makes one for GPUs only
    optimizer = sgd(parameter_groups(detector, lr=0.1, weight_decay=0.0))
    return Stepper(detector=detector, optimizer=optimizer, accelerator=accelerator, clip_norm=clip_norm), optimizer


def take(stepper: Stepper, *indices: Sequence[int]) -> StepResult:
    batches = [FakeLoader().batch(batch) for batch in indices]
    return stepper.step(batches, number=7, stop_signal=0, save_due=False)


def values(detector: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in detector.state_dict().items()}


def seeded() -> FakeDetector:
    torch.manual_seed(0)
    return FakeDetector()


def test_a_step_is_plain_gradient_descent() -> None:
    detector, reference = seeded(), seeded()
    result = take(stepper(detector)[0], [0, 1, 2])
    losses = reference.loss(*FakeLoader().batch([0, 1, 2]))
    sum(losses.values(), torch.zeros(())).backward()
    assert result.losses == pytest.approx({name: loss.item() for name, loss in losses.items()})
    assert result.images == 3
    norm = sum(parameter.grad.square().sum().item() for parameter in reference.parameters()) ** 0.5
    assert result.gradient_norm == pytest.approx(norm)
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in reference.named_parameters()}
    torch.testing.assert_close(values(detector), expected)


def test_accumulated_batches_are_one_larger_batch() -> None:
    """The fake's losses are means over pictures, so two batches of two are one of four."""
    split, whole = seeded(), seeded()
    of_split = take(stepper(split)[0], [0, 1], [2, 3])
    of_whole = take(stepper(whole)[0], [0, 1, 2, 3])
    assert of_split.losses == pytest.approx(of_whole.losses)
    assert of_split.images == of_whole.images == 4
    torch.testing.assert_close(values(split), values(whole))


def test_clipping_bounds_the_update() -> None:
    detector = seeded()
    before = values(detector)
    result = take(stepper(detector, clip_norm=0.01)[0], [0, 1])
    moved = torch.cat([(before[name] - tensor).flatten() for name, tensor in values(detector).items()])
    assert result.gradient_norm > 0.01
    # learning rate 0.1 times the bound 0.01
    assert moved.norm().item() == pytest.approx(0.001, rel=1e-3)


def test_pictures_without_boxes_give_every_parameter_a_gradient() -> None:
    detector = seeded()
    take(stepper(detector)[0], [2, 5])
    assert all(parameter.grad is not None for parameter in detector.parameters())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_is_not_finite_stops_before_the_update(scaled: bool) -> None:
    detector = SpoiltDetector("loss")
    before = values(detector)
    trainer, optimizer = stepper(detector, scaled=scaled)
    with pytest.raises(RunError) as caught:
        take(trainer, [4, 1])
    message = str(caught.value)
    for part in (
        "step 7, loss term box: nan on pictures 104, 101",
        "train.optimizer.lr",
        "train.warm_up.steps",
        "train.clip_norm",
    ):
        assert part in message
    torch.testing.assert_close(values(detector), before, rtol=0, atol=0)
    assert not optimizer.state


def test_a_gradient_that_is_not_finite_stops_before_the_update() -> None:
    detector = SpoiltDetector("gradient")
    before = values(detector)
    trainer, optimizer = stepper(detector, clip_norm=1.0)
    with pytest.raises(RunError, match=r"step 7, gradients: not finite \(norm (inf|nan)\) .* 100;"):
        take(trainer, [0])
    torch.testing.assert_close(values(detector), before, rtol=0, atol=0)
    assert not optimizer.state


def test_a_scaled_step_is_the_plain_step() -> None:
    plain, scaled = seeded(), seeded()
    take(stepper(plain, clip_norm=0.2)[0], [0, 1])
    take(stepper(scaled, clip_norm=0.2, scaled=True)[0], [0, 1])
    torch.testing.assert_close(values(scaled), values(plain))


def test_overflows_are_skipped_by_the_scaler_but_not_for_ever() -> None:
    detector = SpoiltDetector("gradient")
    before = values(detector)
    trainer, _ = stepper(detector, scaled=True)
    for _ in range(MAX_OVERFLOWS):
        take(trainer, [0])
    torch.testing.assert_close(values(detector), before, rtol=0, atol=0)
    with pytest.raises(RunError, match="gradients: not finite"):
        take(trainer, [0])


def test_bfloat16_autocast_reaches_the_loss() -> None:
    seen: list[torch.dtype] = []
    detector = seeded()
    detector.box.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    accelerator = build_accelerator(precision="bf16", device="cpu")
    optimizer = sgd(parameter_groups(detector, lr=0.1, weight_decay=0.0))
    trainer = Stepper(detector=detector, optimizer=optimizer, accelerator=accelerator, clip_norm=None)
    before = values(detector)
    take(trainer, [0, 1])
    assert seen == [torch.bfloat16]
    assert all(tensor.dtype == torch.float32 for tensor in values(detector).values())
    assert not torch.equal(values(detector)["box.weight"], before["box.weight"])
