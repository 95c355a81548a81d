"""The first stage: which candidates become proposals, and what the head is told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.errors import SetupError
from rcnn.proposals import GivenProposals, ProposalFilter, ProposalStage
from rcnn.records import Levels, LevelShape, Losses, Proposals, Size, Target

SQUARE = (0.0, 0.0, 100.0, 100.0)
NEARLY = (0.0, 0.0, 100.0, 90.0)  # IoU 0.9 with the square
FAR = (200.0, 200.0, 300.0, 300.0)
Row = tuple[tuple[float, float, float, float], float, int]


def candidates(*rows: Row) -> Candidates:
    return Candidates(
        boxes_xyxy=torch.tensor([row[0] for row in rows]).reshape(-1, 4),
        scores=torch.tensor([row[1] for row in rows], dtype=torch.float32),
        labels=torch.zeros(len(rows), dtype=torch.int64),
        level=torch.tensor([row[2] for row in rows], dtype=torch.int64),
    )


def run(chosen: ProposalFilter, *rows: Row, image_scale: float = 1.0) -> list[tuple[tuple[float, ...], float]]:
    found = chosen(candidates(*rows), num_levels=3, image_scale=image_scale)
    return list(zip(map(tuple, found.boxes_xyxy.tolist()), found.scores.tolist(), strict=True))


MANY = ProposalFilter(pre_nms=100, post_nms=100)


def test_nothing_gives_nothing() -> None:
    assert run(MANY) == []


def test_levels_do_not_suppress_each_other() -> None:
    rows: tuple[Row, ...] = ((NEARLY, 0.5, 0), (SQUARE, 0.75, 0), (NEARLY, 0.25, 1))
    assert run(MANY, *rows) == [(SQUARE, 0.75), (NEARLY, 0.25)]
    assert run(ProposalFilter(pre_nms=100, post_nms=100, scope="joint"), *rows) == [(SQUARE, 0.75)]


def test_equal_scores_keep_the_order_of_levels() -> None:
    rows = [((float(i), 0.0, i + 50.0, 50.0), 0.5, i % 3) for i in range(0, 900, 100)]
    assert [box[0] for box, _ in run(MANY, *rows)] == [float(i) for i in range(0, 900, 100)]


def test_the_best_of_all_levels_are_kept() -> None:
    rows: tuple[Row, ...] = ((SQUARE, 0.5, 0), (FAR, 0.25, 0), (SQUARE, 0.75, 1), (FAR, 0.625, 2))
    kept = run(ProposalFilter(pre_nms=100, post_nms=3), *rows)
    assert [score for _, score in kept] == [0.75, 0.625, 0.5]


def test_small_boxes() -> None:
    small: Row = ((0.0, 0.0, 19.0, 50.0), 0.75, 0)
    in_network = ProposalFilter(pre_nms=9, post_nms=9, min_side_px=16)
    assert len(run(in_network, small, image_scale=1.25)) == 1
    # 16 px of the original picture are 20 px of one enlarged by 1.25.
    in_original = ProposalFilter(pre_nms=9, post_nms=9, min_side_px=16, side_frame="original")
    assert run(in_original, small, image_scale=1.25) == []


def test_boxes_that_are_no_numbers() -> None:
    assert run(MANY, ((math.nan, 0.0, 10.0, 10.0), 0.75, 0), (SQUARE, 0.5, 0)) == [(SQUARE, 0.5)]


def test_when_small_boxes_leave() -> None:
    """Before the best were chosen they leave their places to others."""
    rows: tuple[Row, ...] = (((0.0, 0.0, 1.0, 1.0), 0.75, 0), (SQUARE, 0.5, 0), (FAR, 0.25, 0))
    before = ProposalFilter(pre_nms=2, post_nms=9, min_side_px=16, side_test="before_pre_nms")
    assert before.candidates_per_level is None
    assert run(before, *rows) == [(SQUARE, 0.5), (FAR, 0.25)]
    assert ProposalFilter(pre_nms=2, post_nms=9).candidates_per_level == 2


def test_places_are_counted_by_level() -> None:
    rows: tuple[Row, ...] = ((SQUARE, 0.5, 0), (FAR, 0.75, 0), (SQUARE, 0.25, 1))
    before = ProposalFilter(pre_nms=1, post_nms=9, side_test="before_pre_nms")
    assert run(before, *rows) == [(FAR, 0.75), (SQUARE, 0.25)]


class OneBox(AbstractDenseHead):
    """A head whose every candidate is one box, and which remembers what it was given."""

    def __init__(self, num_classes: int = 1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.ones(()))
        self.targets: list[Target] = []
        self.asked: list[tuple[int | None, float]] = []

    def forward(self, levels: Levels) -> DensePrediction:
        return DensePrediction(classes=(), boxes=(self.weight * torch.tensor(SQUARE),), levels=levels)

    def loss(self, prediction: DensePrediction, targets: list[Target]) -> Losses:
        self.targets = targets
        return {"some": self.weight * 2}

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        self.asked.append((per_level, score_threshold))
        found = Candidates(
            boxes_xyxy=prediction.boxes[0][None],
            scores=self.weight[None] / 2,
            labels=torch.zeros(1, dtype=torch.int64),
            level=torch.zeros(1, dtype=torch.int64),
        )
        return [found] * len(prediction.levels.image_sizes)


def levels() -> Levels:
    maps: tuple[Tensor, ...] = (torch.zeros(2, 1, 1, 1),)
    return Levels(
        maps=maps,
        shapes=(LevelShape(height=1, width=1, stride_px=16),),
        padded_size=Size(16, 16),
        image_sizes=(Size(16, 16),) * 2,
        image_scales=(1.0, 2.0),
        num_roi_levels=1,
    )


def stage(head: AbstractDenseHead) -> ProposalStage:
    return ProposalStage(
        head=head,
        train_filter=ProposalFilter(pre_nms=7, post_nms=5, score_threshold=0.125),
        test_filter=ProposalFilter(pre_nms=3, post_nms=2),
    )


def test_the_head_sees_one_class_and_the_loss_its_stage() -> None:
    head = OneBox()
    ignored = torch.tensor([[1.0, 2, 3, 4]])
    truth = Target(boxes_xyxy=torch.tensor([SQUARE, FAR]), labels=torch.tensor([4, 2]), ignore_xyxy=ignored)
    losses, proposals = stage(head).loss(levels(), [truth, truth])
    assert set(losses) == {"rpn_some"}
    assert [target.labels.tolist() for target in head.targets] == [[0, 0]] * 2
    assert head.targets[0].ignore_xyxy is ignored
    assert truth.labels.tolist() == [4, 2]
    assert len(proposals) == 2
    assert head.asked == [(7, 0.125)]


def test_proposals_are_detached() -> None:
    _, proposals = stage(OneBox()).loss(levels(), [])
    assert not proposals[0].boxes_xyxy.requires_grad
    assert not proposals[0].scores.requires_grad


def test_propose_uses_the_other_filter_whatever_the_mode() -> None:
    head = OneBox()
    for mode in (True, False):
        assert len(stage(head).train(mode).propose(levels())) == 2
    assert head.asked == [(3, 0.0)] * 2


def test_a_head_of_several_classes_is_refused() -> None:
    with pytest.raises(SetupError, match="a head of 3 classes"):
        stage(OneBox(num_classes=3))


# ------------------------------------------------------------------------------------------------------ given proposals


def test_given_proposals_are_cut_to_the_best() -> None:
    given = [Proposals(boxes_xyxy=torch.tensor([SQUARE, FAR]), scores=torch.tensor([0.75, 0.5]))] * 2
    losses, trained_on = GivenProposals(train_limit=1).loss(levels(), [], given)
    assert losses == {}
    assert [found.boxes_xyxy.tolist() for found in trained_on] == [[list(SQUARE)]] * 2
    assert [len(found) for found in GivenProposals(train_limit=1).propose(levels(), given)] == [2, 2]


@pytest.mark.parametrize(("maps", "boxes"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
def test_given_proposals_have_the_precision_of_boxes(maps: str, boxes: str) -> None:
    """That of the maps, at least float32: what a head's proposals have."""
    pyramid = replace(levels(), maps=(torch.zeros(2, 1, 1, 1, dtype=getattr(torch, maps)),))
    given = [
        Proposals(boxes_xyxy=torch.tensor([SQUARE]), scores=torch.ones(1)),
        Proposals(boxes_xyxy=torch.tensor([SQUARE]), scores=None),
    ]
    first, second = GivenProposals().propose(pyramid, given)
    assert first.boxes_xyxy.dtype == second.boxes_xyxy.dtype == getattr(torch, boxes)
    assert first.scores is not None and first.scores.dtype == getattr(torch, boxes)
    assert second.scores is None


def test_pictures_without_proposals_are_refused() -> None:
    with pytest.raises(SetupError, match="2 pictures and no proposals"):
        GivenProposals().propose(levels())
    given = [Proposals(boxes_xyxy=torch.zeros(0, 4), scores=None)]
    with pytest.raises(SetupError, match="2 pictures and proposals for 1"):
        GivenProposals().loss(levels(), [], given)
    with pytest.raises(SetupError, match="one or the other"):
        stage(OneBox()).propose(levels(), given * 2)
