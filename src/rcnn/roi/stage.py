"""The second stage: pooled regions to classes and boxes.

Letters: N images, R regions of a batch, K classes (K is background), B = K or 1 boxes per region.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.boxes.loss import BoxLoss, box_term, smooth_l1_ninth
from rcnn.matching.iou import IoUMatcher
from rcnn.matching.sampling import BalancedSampler, EverySampler, HardExampleSampler
from rcnn.records import Detections, Levels, Losses, Proposals, Size, Target
from rcnn.roi.box_head import BoxPredictor
from rcnn.roi.classification import Classification, SoftmaxClassification
from rcnn.roi.decoding import ClipOrder, deltas_of, find_detections, moved_boxes
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
        clip_order: ClipOrder = "before_nms",
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
        self.clip_order: ClipOrder = clip_order
        predictor.check_logits(self.classification.num_logits(num_classes))

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
        mine = deltas_of(deltas, foreground, labels[foreground])
        box = box_term(self.box_loss, self.coder, mine, references[foreground], truth[foreground])
        return {"classification": self.classification.loss(logits, labels) / count, "box": box / count}

    @torch.no_grad()
    def draw(self, levels: Levels, proposals: Sequence[Proposals], targets: Sequence[Target]) -> list[SampledRegions]:
        """The regions of each picture that the losses are taken over."""
        sampler = self.sampler
        if not isinstance(sampler, HardExampleSampler):
            return [self.sample(found, target) for found, target in zip(proposals, targets, strict=True)]
        # OHEM: all regions go through the network, and the draw is by their class loss. A batch norm that is trained
        # sees them too, as in MMDetection.
        labelled = [self._label(found, target) for found, target in zip(proposals, targets, strict=True)]
        boxes = [some.regions.boxes_xyxy for some in labelled]
        logits = self(levels, boxes)[0].to(boxes[0].dtype)
        losses = self.classification.region_losses(logits, torch.cat([some.regions.labels for some in labelled]))
        parts = zip(labelled, losses.split([len(some) for some in boxes]), strict=True)
        return [some.drawn(sampler(some.matches, of_image)) for some, of_image in parts]

    def sample(self, proposals: Proposals, target: Target) -> SampledRegions:
        """The regions of one picture, by a sampler that looks at the matches alone."""
        assert not isinstance(self.sampler, HardExampleSampler), "its losses need the levels: draw"
        labelled = self._label(proposals, target)
        return labelled.drawn(self.sampler(labelled.matches))

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
        parts = zip(scores.split(counts), deltas.to(boxes[0].dtype).split(counts), boxes, image_sizes, strict=True)
        find = partial(
            find_detections, coder=self.coder, detection_filter=self.detection_filter, clip_order=self.clip_order
        )
        return [find(*part) for part in parts]

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
        return moved_boxes(deltas, labels, boxes, image_sizes, coder=self.coder)
