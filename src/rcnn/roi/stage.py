"""The second stage: pooled regions to classes and boxes.

Letters: N images, R regions of a batch, K classes (K is background), B = K or 1 boxes per region.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.boxes.geometry import clip
from rcnn.errors import Problem, SetupError
from rcnn.matching.iou import IoUMatcher
from rcnn.matching.sampling import BalancedSampler, EverySampler, HardExampleSampler
from rcnn.records import Detections, Levels, Losses, Proposals, Size, Target
from rcnn.roi.box_head import BoxPredictor
from rcnn.roi.box_loss import BoxLoss, box_term, smooth_l1_ninth
from rcnn.roi.classification import Classification, SoftmaxClassification
from rcnn.roi.fusion import ProposalFusion, fuse
from rcnn.roi.interface import AbstractRoIStage
from rcnn.roi.pooling import RoIPooling
from rcnn.roi.regions import LabelledRegions, SampledRegions, label_regions


class RoIStage(AbstractRoIStage):
    """Pooling, box head, predictor; and in training a matcher, a sampler, a coder and the two losses.

    The class loss is averaged over the sampled regions, the box loss summed and divided by their number, as Fast R-CNN.
    `join_truth`: the ground truth joins the proposals that are sampled. `fusion`: how the proposal's score enters the
    final one. A stage also serves as one of a `CascadeStage`.
    """

    def __init__(
        self,
        *,
        pooling: RoIPooling,
        box_head: nn.Module,
        predictor: BoxPredictor,
        num_classes: int,
        coder: DeltaCoder | None = None,
        matcher: IoUMatcher | None = None,
        sampler: BalancedSampler | EverySampler | HardExampleSampler | None = None,
        classification: Classification | None = None,
        box_loss: BoxLoss = smooth_l1_ninth,
        detection_filter: DetectionFilter | None = None,
        fusion: ProposalFusion = "none",
        join_truth: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pooling = pooling
        self.box_head = box_head
        self.predictor = predictor
        self.coder = coder or DeltaCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.matcher = matcher or IoUMatcher(positive_iou=0.5, negative_iou=0.5)
        self.sampler = sampler or BalancedSampler(total=512, positive_fraction=0.25)
        self.classification: Classification = classification or SoftmaxClassification()
        self.box_loss = box_loss
        self.detection_filter = detection_filter or DetectionFilter()
        self.fusion: ProposalFusion = fusion
        self.join_truth = join_truth
        _check_logits(predictor, self.classification.num_logits(num_classes))

    def forward(self, levels: Levels, boxes_xyxy: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [R, K + 1 or K] and deltas [R, B, 4] of the regions of all pictures, one picture after the other."""
        return self.predictor(self.box_head(self.pooling(levels, boxes_xyxy)))

    # -------------------------------------------------------------------------------------------------------- training

    def loss(self, levels: Levels, proposals: Sequence[Proposals], targets: Sequence[Target]) -> Losses:
        regions = self.draw(levels, proposals, targets)
        logits, deltas = self(levels, [some.boxes_xyxy for some in regions])
        return {f"roi_{name}": value for name, value in self.losses(logits, deltas, regions).items()}

    def losses(self, logits: Tensor, deltas: Tensor, regions: Sequence[SampledRegions]) -> Losses:
        """The two terms, unprefixed, of the predictor's output for `regions`."""
        labels = torch.cat([some.labels for some in regions])
        truth = torch.cat([some.gt_boxes_xyxy for some in regions])
        references = torch.cat([some.boxes_xyxy for some in regions])
        logits, deltas = logits.to(references.dtype), deltas.to(references.dtype)
        count = max(len(labels), 1)
        foreground = (labels < self.num_classes).nonzero().flatten()
        mine = deltas[foreground, _column(labels[foreground], deltas)]
        box = box_term(self.box_loss, self.coder, mine, references[foreground], truth[foreground])
        return {"classification": self.classification.loss(logits, labels) / count, "box": box / count}

    def draw(self, levels: Levels, proposals: Sequence[Proposals], targets: Sequence[Target]) -> list[SampledRegions]:
        """The regions of each picture that the losses are taken over."""
        if not isinstance(self.sampler, HardExampleSampler):
            return [self.sample(found, target) for found, target in zip(proposals, targets, strict=True)]
        return self._draw_hardest(self.sampler, levels, proposals, targets)

    def sample(self, proposals: Proposals, target: Target) -> SampledRegions:
        """The regions of one picture, by a sampler that looks at the matches alone."""
        assert not isinstance(self.sampler, HardExampleSampler), "its losses need the levels: draw"
        labelled = self._label(proposals, target)
        return labelled.drawn(self.sampler(labelled.matches))

    @torch.no_grad()
    def _draw_hardest(
        self,
        sampler: HardExampleSampler,
        levels: Levels,
        proposals: Sequence[Proposals],
        targets: Sequence[Target],
    ) -> list[SampledRegions]:
        """OHEM: all regions go through the network without a graph, and the draw is by their class loss."""
        labelled = [self._label(found, target) for found, target in zip(proposals, targets, strict=True)]
        boxes = [some.regions.boxes_xyxy for some in labelled]
        logits, _ = self(levels, boxes)
        labels = torch.cat([some.regions.labels for some in labelled])
        losses = self.classification.region_losses(logits.to(boxes[0].dtype), labels).split(
            [len(some) for some in boxes]
        )
        return [some.drawn(sampler(some.matches, hard)) for some, hard in zip(labelled, losses, strict=True)]

    def _label(self, proposals: Proposals, target: Target) -> LabelledRegions:
        return label_regions(
            proposals.boxes_xyxy,
            target,
            matcher=self.matcher,
            num_classes=self.num_classes,
            join_truth=self.join_truth,
        )

    # ------------------------------------------------------------------------------------------------------ prediction

    def predict(self, levels: Levels, proposals: Sequence[Proposals]) -> list[Detections]:
        boxes = [found.boxes_xyxy for found in proposals]
        logits, deltas = self(levels, boxes)
        return self.detect(logits, deltas, boxes, levels.image_sizes, [found.scores for found in proposals])

    def detect(
        self,
        logits: Tensor,
        deltas: Tensor,
        boxes: Sequence[Tensor],
        image_sizes: Sequence[Size],
        proposal_scores: Sequence[Tensor | None] = (),
    ) -> list[Detections]:
        """Detections per picture from the predictor's output for `boxes`, whose own scores a fusion needs."""
        scores = self.classification.scores(logits.to(boxes[0].dtype))
        return self.detect_scored(fuse(scores, proposal_scores, self.fusion), deltas, boxes, image_sizes)

    def detect_scored(
        self, scores: Tensor, deltas: Tensor, boxes: Sequence[Tensor], image_sizes: Sequence[Size]
    ) -> list[Detections]:
        """Detections per picture from final scores [R, K]."""
        counts = [len(of_image) for of_image in boxes]
        deltas = deltas.to(boxes[0].dtype)
        parts = zip(deltas.split(counts), boxes, scores.split(counts), image_sizes, strict=True)
        return [self._detect(of_image, references, some, size) for of_image, references, some, size in parts]

    def _detect(self, deltas: Tensor, references_xyxy: Tensor, scores: Tensor, size: Size) -> Detections:
        index = (scores > self.detection_filter.score_threshold).flatten().nonzero().flatten()
        region, label = index // self.num_classes, index % self.num_classes
        mine = deltas[region, _column(label, deltas)]
        boxes = clip(self.coder.decode(mine, references_xyxy[region]), size)
        return self.detection_filter(boxes, scores.flatten()[index], label)

    @torch.no_grad()
    def refine(
        self,
        logits: Tensor,
        deltas: Tensor,
        boxes: Sequence[Tensor],
        image_sizes: Sequence[Size],
        labels: Tensor | None = None,
    ) -> list[Tensor]:
        """Each region moved by its own deltas and clipped: the boxes of a cascade's next stage.

        Where there is a box per class it is that of the region's label, and of its best class where it has none.
        """
        best = self.classification.scores(logits).argmax(dim=1)
        labels = best if labels is None else torch.where(labels < self.num_classes, labels, best)
        mine = deltas[torch.arange(len(deltas), device=deltas.device), _column(labels, deltas)]
        moved = self.coder.decode(mine.to(boxes[0].dtype), torch.cat(list(boxes)))
        parts = moved.split([len(of_image) for of_image in boxes])
        return [clip(some, size) for some, size in zip(parts, image_sizes, strict=True)]


def _column(labels: Tensor, deltas: Tensor) -> Tensor:
    """Which of the B boxes is that of each label: its own, or the only one."""
    return labels if deltas.shape[1] > 1 else torch.zeros_like(labels)


def _check_logits(predictor: BoxPredictor, expected: int) -> None:
    given = predictor.classes.out_features
    if given != expected:
        raise SetupError(
            Problem(
                where="detector.roi, the predictor",
                given=f"{given} class logits",
                allowed=f"{expected}, which its classification asks for",
                remedy="build the predictor with the same classification",
            )
        )
