from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

from rcnn.ops.nms import Decay, best_kept, class_offset_nms, nms, soft_nms


@pytest.fixture(scope="module")
def oracle(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "oracles/torchvision/ops/arrays.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if "nms" in name}


def cluttered_boxes(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 300
    side = torch.rand(count, 2, generator=generator) * 150 + 1
    scores = torch.rand(count, generator=generator).mul(50).round() / 50  # with ties
    groups = torch.randint(0, 91, (count,), generator=generator)
    return torch.cat([corner, corner + side], 1), scores, groups


@pytest.mark.parametrize("threshold", ["0.3", "0.5", "0.7"])
def test_recorded_boxes(oracle: dict[str, Tensor], threshold: str) -> None:
    boxes, scores, labels = oracle["nms/boxes"], oracle["nms/scores"], oracle["nms/labels"]
    assert_close(nms(boxes, scores, float(threshold)), oracle[f"nms/keep/{threshold}"])
    assert_close(class_offset_nms(boxes, scores, labels, float(threshold)), oracle[f"batched_nms/keep/{threshold}"])


@pytest.mark.parametrize("threshold", ["0.0", "0.49", "0.5", "0.51", "1.0"])
def test_recorded_edges(oracle: dict[str, Tensor], threshold: str) -> None:
    kept = nms(oracle["nms_edge/boxes"], oracle["nms_edge/scores"], float(threshold))
    assert_close(kept, oracle[f"nms_edge/keep/{threshold}"])


def test_recorded_large_set(oracle: dict[str, Tensor]) -> None:
    boxes, scores, labels = (oracle[f"batched_nms_large/{name}"] for name in ("boxes", "scores", "labels"))
    assert_close(class_offset_nms(boxes, scores, labels, 0.5), oracle["batched_nms_large/keep/0.5"])


def test_groups_equal_a_loop_over_groups() -> None:
    boxes, scores, groups = cluttered_boxes(2000)
    kept = torch.zeros(2000, dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        kept[members[torchvision.ops.nms(boxes[members].double(), scores[members].double(), 0.5)]] = True
    expected = kept.nonzero()[:, 0]
    expected = expected[scores[expected].sort(stable=True, descending=True).indices]
    assert_close(class_offset_nms(boxes, scores, groups, 0.5), expected)


def test_moving_by_the_group_changes_no_decision() -> None:
    # Two boxes of IoU 1/2 exactly: [0,0,1,2] in [0,0,1,1] x2. Not above the threshold 0.5, whatever the group.
    boxes = torch.tensor([[0.1, 0.1, 0.2, 0.3], [0.1, 0.1, 0.2, 0.2], [0.0, 0.0, 4000.0, 4000.0]])
    scores = torch.tensor([0.9, 0.8, 0.1])
    alone = nms(boxes[:2].double(), scores[:2].double(), 0.5).tolist()
    for group in (0, 1, 1000):
        kept = class_offset_nms(boxes, scores, torch.tensor([group, group, 0]), 0.5).tolist()
        assert [index for index in kept if index < 2] == alone


def test_negative_coordinates_stay_in_their_group() -> None:
    # Same box in two groups, far from the origin on either side: both survive.
    boxes = torch.tensor([[-500.0, -500.0, -400.0, -400.0], [-500.0, -500.0, -400.0, -400.0], [90.0, 90.0, 91.0, 91.0]])
    kept = class_offset_nms(boxes, torch.tensor([0.5, 0.6, 0.7]), torch.tensor([0, 1, 2]), 0.1)
    assert kept.tolist() == [2, 1, 0]


@pytest.mark.parametrize("function", ["nms", "class_offset_nms"])
def test_no_box_and_one_box(function: str) -> None:
    for count in (0, 1):
        boxes, scores, groups = torch.ones(count, 4), torch.ones(count), torch.ones(count, dtype=torch.int64)
        kept = nms(boxes, scores, 0.5) if function == "nms" else class_offset_nms(boxes, scores, groups, 0.5)
        assert kept.dtype == torch.int64
        assert kept.tolist() == list(range(count))


def test_half_precision_keeps_what_float32_keeps() -> None:
    boxes, scores, groups = cluttered_boxes(300)
    boxes, scores = boxes.bfloat16(), scores.bfloat16()
    assert_close(nms(boxes, scores, 0.5), nms(boxes.float(), scores.float(), 0.5))
    assert_close(class_offset_nms(boxes, scores, groups, 0.5), class_offset_nms(boxes.float(), scores, groups, 0.5))


def test_double_scores_are_not_rounded_to_the_boxes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    scores = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)
    assert nms(boxes, scores, 0.5).tolist() == [1]


# ------------------------------------------------------------------------------------------------------------- soft NMS


def test_soft_by_hand() -> None:
    # The second overlaps the first by 1/2 (10 x 5 in 10 x 10), the third neither.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]])
    scores, groups = torch.tensor([0.8, 0.6, 0.2]), torch.zeros(3, dtype=torch.int64)
    kept, lowered = soft_nms(boxes, scores, groups, decay="linear", iou_threshold=0.5)
    assert kept.tolist() == [0, 1, 2]
    assert_close(lowered, torch.tensor([0.8, 0.3, 0.2]))  # from the threshold up: 0.6 x (1 - 1/2)
    kept, lowered = soft_nms(boxes, scores, groups, decay="linear", iou_threshold=0.51)
    assert_close(lowered, torch.tensor([0.8, 0.6, 0.2]))
    kept, lowered = soft_nms(boxes, scores, groups, decay="gaussian", sigma=0.5)
    assert_close(lowered, torch.tensor([0.8, 0.6 * math.exp(-0.5), 0.2]))
    kept, lowered = soft_nms(boxes, scores, groups, decay="linear", iou_threshold=0.5, min_score=0.25)
    assert kept.tolist() == [0, 1]
    kept, lowered = soft_nms(boxes, scores, torch.tensor([0, 4, 0]), decay="linear", iou_threshold=0.5)
    assert_close(lowered, scores)  # of another group


@pytest.fixture(scope="module")
def soft_oracle(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "oracles/mmdetection/maths/arrays.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if "soft_nms" in name}


@pytest.mark.parametrize(("decay", "name"), [("linear", "linear"), ("gaussian", "gaussian_sigma0.5")])
def test_soft_of_mmdetection(
    oracle: dict[str, Tensor], soft_oracle: dict[str, Tensor], decay: Decay, name: str
) -> None:
    """mmcv's operator with iou_threshold 0.5, sigma 0.5 and min_score 0.05."""
    boxes, scores = oracle["nms/boxes"].float(), oracle["nms/scores"].float()
    groups = torch.zeros(len(scores), dtype=torch.int64)
    kept, lowered = soft_nms(boxes, scores, groups, decay=decay, iou_threshold=0.5, sigma=0.5, min_score=0.05)
    assert kept.tolist() == soft_oracle[f"soft_nms_{name}/keep"].tolist()
    assert_close(lowered, soft_oracle[f"soft_nms_{name}/dets"][:, 4])


def soft_by_the_paper(boxes: Tensor, scores: Tensor, decay: Decay, min_score: float) -> dict[int, float]:
    """The pseudo-code of Bodla et al., figure 3, a box at a time."""
    left = dict(enumerate(scores.tolist()))
    done: dict[int, float] = {}
    while left:
        best = max(left, key=lambda index: (left[index], -index))
        done[best] = left.pop(best)
        for other in left:
            overlap = torchvision.ops.box_iou(boxes[best : best + 1], boxes[other : other + 1]).item()
            if decay == "linear":
                left[other] *= 1 - overlap if overlap >= 0.3 else 1.0
            else:
                left[other] *= math.exp(-(overlap**2) / 0.5)
        left = {index: score for index, score in left.items() if score >= min_score}
    return done


@pytest.mark.parametrize("decay", ["linear", "gaussian"])
def test_soft_is_the_papers_in_each_group(decay: Decay) -> None:
    boxes, _, groups = cluttered_boxes(90)
    boxes = boxes.double()
    # Scores without ties, whose order would not be defined.
    scores = torch.rand(90, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = groups % 3
    expected: dict[int, float] = {}
    for group in range(3):
        members = (groups == group).nonzero()[:, 0]
        found = soft_by_the_paper(boxes[members], scores[members], decay, 0.3)
        expected |= {int(members[index]): score for index, score in found.items()}
    kept, lowered = soft_nms(boxes, scores, groups, decay=decay, min_score=0.3)
    assert 0 < len(expected) < 90
    assert dict(zip(kept.tolist(), lowered.tolist(), strict=True)) == pytest.approx(expected)
    assert (lowered[:-1] >= lowered[1:]).all()


def test_soft_without_a_least_score_keeps_every_box_once() -> None:
    # Two are the same box: an IoU of 1 leaves a score of 0.
    boxes, scores = torch.tensor([[0.0, 0, 10, 10]]).expand(2, 4), torch.tensor([0.5, 0.25])
    kept, lowered = soft_nms(boxes, scores, torch.zeros(2, dtype=torch.int64), decay="linear", min_score=0.0)
    assert (kept.tolist(), lowered.tolist()) == ([0, 1], [0.5, 0.0])


def test_soft_on_little() -> None:
    for count in (0, 1):
        boxes, scores, groups = torch.ones(count, 4), torch.ones(count), torch.ones(count, dtype=torch.int64)
        kept, lowered = soft_nms(boxes, scores, groups, decay="gaussian")
        assert (kept.tolist(), lowered.tolist()) == (list(range(count)), [1.0] * count)
    # Boxes without area overlap nothing; a score that is no number leaves.
    kept, lowered = soft_nms(
        torch.zeros(3, 4), torch.tensor([0.5, 0.25, math.nan]), torch.zeros(3, dtype=torch.int64), decay="gaussian"
    )
    assert kept.tolist() == [0, 1]
    half = torch.tensor([0.5, 0.25]).bfloat16()
    _, lowered = soft_nms(torch.zeros(2, 4), half, torch.zeros(2, dtype=torch.int64), decay="linear")
    assert lowered.dtype == torch.bfloat16


class BothKinds(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        return nms(boxes, scores, 0.5), class_offset_nms(boxes, scores, groups, 0.5)


# torchvision's description of its operator for export
@pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated:FutureWarning")
def test_both_can_be_exported() -> None:
    arguments = cluttered_boxes(200)
    program = torch.export.export(BothKinds(), arguments)
    other = cluttered_boxes(200, seed=1)
    for exported, eager in zip(program.module()(*other), BothKinds()(*other), strict=True):
        assert_close(exported, eager)


@pytest.mark.parametrize("limit", [0, 1, 5, 40, 1000, None])
def test_the_best_kept_are_those_of_nms_over_all(limit: int | None) -> None:
    """Also where scores are equal, and where the first ones asked about are too few."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(600, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + 5 + torch.rand(600, 2, generator=generator) * 30), dim=1)
    scores = (torch.rand(600, generator=generator) * 50).round() / 50

    found = best_kept(lambda best: best[nms(boxes[best], scores[best], 0.3)], scores, limit)

    assert found.tolist() == torchvision.ops.nms(boxes, scores, 0.3)[:limit].tolist()


def test_nms_is_asked_about_no_more_than_it_takes() -> None:
    asked = []

    def suppress(best: Tensor) -> Tensor:
        asked.append(len(best))
        return best[::4]

    scores = torch.arange(1000.0)
    assert best_kept(suppress, scores, 10).tolist() == list(range(999, 959, -4))
    assert asked == [20, 80]
    asked.clear()
    assert len(best_kept(suppress, scores[:30], 10)) == 8
    assert asked == [20, 30]
    assert len(best_kept(suppress, scores[:0], 10)) == 0
