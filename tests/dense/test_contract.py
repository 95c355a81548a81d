"""The contract of dense heads finds each fault, says the case and what is wrong, and lets a sound head pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from rcnn.dense.contract import CASES, assert_is_dense_head, examine_dense_head
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.dense.rpn import RPNHead
from rcnn.priors import AnchorGenerator
from rcnn.records import Levels, Losses, Target

STRIDES = (8, 32)
CHANNELS = 4


def rpn(num_classes: int) -> RPNHead:
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes_px=((32.0,), (64.0,)))
    return RPNHead(in_channels=CHANNELS, num_classes=num_classes, anchors=anchors)


class Faulty(AbstractDenseHead):
    """An RPN head that breaks the contract where it is told to."""

    def __init__(self, fault: str, num_classes: int) -> None:
        super().__init__()
        self.fault = fault
        self.num_classes = num_classes
        self.inner = rpn(num_classes)
        self.unused = nn.Parameter(torch.zeros(()), requires_grad=fault == "unused")

    def forward(self, levels: Levels) -> DensePrediction:
        if self.fault == "raises when small" and levels.padded_size.height < 64:
            raise IndexError("no cell")
        return self.inner(levels)

    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        count = sum(len(target.labels) for target in targets)
        if self.fault == "changes targets":
            targets[0].boxes_xyxy.add_(1)
        if self.fault == "forgets ignore regions":
            targets = [replace(target, ignore_xyxy=torch.zeros(0, 4)) for target in targets]
        losses = self.inner.loss(prediction, targets)
        edited = {
            "nan without boxes": lambda x: x / count if count else x * float("nan"),
            "vector": lambda x: x.reshape(1),
            "half": lambda x: x.to(torch.bfloat16),
            "single": lambda x: x.float(),
        }.get(self.fault, lambda x: x)
        losses = {name: edited(loss) for name, loss in losses.items()}
        if self.fault == "teaches nothing":
            return {name: 0 * loss for name, loss in losses.items()}
        if self.fault == "no loss":
            return {}
        if self.fault == "teaches boxes everywhere":
            losses["box"] = losses["box"] + torch.stack([x.abs().mean() for x in prediction.boxes]).sum()
        return losses

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        limit = None if self.fault == "forgets per_level" else per_level
        threshold = 0.0 if self.fault == "forgets the threshold" else score_threshold
        found = self.inner.decode(prediction, per_level=limit, score_threshold=threshold)
        if self.fault == "another kind" and self.training:
            return tuple(found)  # type: ignore[return-value]
        if self.fault == "one picture":
            return found[:1] if len(found) > 1 else []
        return [self._edited(candidates) for candidates in found]

    def _edited(self, found: Candidates) -> Candidates:
        last = len(found.scores) - 1
        edits: dict[str, dict[str, torch.Tensor]] = {
            "outside": {"boxes_xyxy": found.boxes_xyxy + 1},
            "turned": {"boxes_xyxy": found.boxes_xyxy[:, [2, 3, 0, 1]]},
            "logits": {"scores": found.scores + 1},
            "label": {"labels": found.labels + self.num_classes},
            "level": {"level": found.level + 1},
            "worst first": {"scores": found.scores.flip(0)},
            "levels backwards": {name: getattr(found, name).flip(0) for name in ("boxes_xyxy", "level")},
            "int32": {"labels": found.labels.int()},
            "short": {"labels": found.labels[:last]},
            "dtype": {"scores": found.scores.half()},
        }
        return replace(found, **edits.get(self.fault, {}))


# What is wrong, and words of what must be said of it.
FAULTS = {
    "unused": "no gradient for unused",
    "nan without boxes": "loss: classification is nan [float32, float64, mixed precision] (case: no boxes",
    "vector": "not that of a scalar",
    "half": "computed in torch.bfloat16",
    "single": "loss: classification is computed in torch.float32, not in torch.float64 [float64]",
    "no loss": "no loss",
    "changes targets": "targets of picture 0 were changed",
    "forgets ignore regions": "an ignore region without boxes [float32, float64, mixed precision] (case: all ignored)",
    "teaches nothing": "nothing is learnt of what is an object",
    "teaches boxes everywhere": "loss: the maps of boxes get a gradient where there is no box",
    "raises when small": "loss: raised IndexError: no cell",
    "forgets per_level": "per_level 7 gives",
    "forgets the threshold": "a threshold of 1.5",
    "another kind": "decode gives tuple",
    "one picture": "decode gives 1 results for 2 pictures",
    "outside": "not inside its picture",
    "turned": "not inside its picture",
    "logits": "no probabilities",
    "label": "labels beyond 0..",
    "level": "levels beyond 0..1",
    "worst first": "not best first",
    "levels backwards": "the levels are not one after the other",
    "int32": "torch.int32 instead of int64",
    "short": "labels, ",
    "dtype": "boxes or scores in torch.float16",
}


def test_a_sound_head_passes_in_both_roles_and_is_left_as_it_was() -> None:
    head = Faulty("none", 2)
    before = copy.deepcopy(head.state_dict())
    assert_is_dense_head(head, in_channels=CHANNELS, strides_px=STRIDES)
    assert_is_dense_head(lambda k: Faulty("none", k), in_channels=CHANNELS, strides_px=STRIDES)
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("fault", list(FAULTS))
def test_each_fault_is_found_and_named(fault: str) -> None:
    cases = [case for case in CASES if case.name in ("no boxes", "small picture", "all ignored")]
    with pytest.raises(AssertionError) as caught:
        assert_is_dense_head(Faulty(fault, 2), in_channels=CHANNELS, strides_px=STRIDES, cases=cases)
    assert FAULTS[fault] in str(caught.value)


def test_the_role_of_a_fault_is_named() -> None:
    def make(num_classes: int) -> AbstractDenseHead:
        return Faulty("outside" if num_classes == 1 else "none", num_classes)

    with pytest.raises(AssertionError) as caught:
        assert_is_dense_head(make, in_channels=CHANNELS, strides_px=STRIDES, cases=CASES[:1])
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert lines
    assert all(line.startswith("  - 1 class, ") for line in lines)


def test_a_function_that_ignores_the_number_of_classes() -> None:
    with pytest.raises(AssertionError, match="a head of 3 classes was asked for and has 1"):
        assert_is_dense_head(lambda _: rpn(1), in_channels=CHANNELS, strides_px=STRIDES)


def test_every_case_is_reported_even_without_fault() -> None:
    found = examine_dense_head(rpn(1), in_channels=CHANNELS, strides_px=STRIDES)
    assert found == {case.name: () for case in CASES}
