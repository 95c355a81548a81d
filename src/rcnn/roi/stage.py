"""The second stage: pooled regions to classes and boxes.

Letters: N images, R regions of a batch, K classes (K is background), B = K or 1 boxes per region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.boxes.geometry import clip
from rcnn.matching.iou import IoUMatcher
from rcnn.matching.sampling import BalancedSampler, EverySampler
from rcnn.records import Detections, Levels, Losses, Proposals, Size, Target
from rcnn.roi.box_head import BoxPredictor
from rcnn.roi.pooling import RoIPooling

BoxLoss = Callable[[Tensor, Tensor], Tensor]
# torchvision's bend of smooth L1, summed.
smooth_l1_ninth: BoxLoss = partial(F.smooth_l1_loss, beta=1 / 9, reduction="sum")


@dataclass(frozen=True, kw_only=True)
class SampledRegions:
    """The regions of one picture that a loss is taken over, with their truth. `labels` are K for background."""

    boxes_xyxy: Float[Tensor, "r 4"]
    labels: Int[Tensor, " r"]
    gt_boxes_xyxy: Float[Tensor, "r 4"]  # meaningful for foreground alone


class RoIStage(nn.Module):
    """Pooling, box head, predictor; and in training a matcher, a sampler, a coder and the two losses.

    Cross-entropy is averaged over the sampled regions, the box loss summed and divided by their number, as Fast R-CNN.
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
        sampler: BalancedSampler | EverySampler | None = None,
        box_loss: BoxLoss = smooth_l1_ninth,
        detection_filter: DetectionFilter | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pooling = pooling
        self.box_head = box_head
        self.predictor = predictor
        self.coder = coder or DeltaCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.matcher = matcher or IoUMatcher(positive_iou=0.5, negative_iou=0.5)
        self.sampler = sampler or BalancedSampler(total=512, positive_fraction=0.25)
        self.box_loss = box_loss
        self.detection_filter = detection_filter or DetectionFilter()

    def forward(self, levels: Levels, boxes_xyxy: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [R, K + 1] and deltas [R, B, 4] of the regions of all pictures, one picture after the other."""
        return self.predictor(self.box_head(self.pooling(levels, boxes_xyxy)))

    def loss(self, levels: Levels, proposals: Sequence[Proposals], targets: Sequence[Target]) -> Losses:
        regions = [self.sample(found, target) for found, target in zip(proposals, targets, strict=True)]
        logits, deltas = self(levels, [region.boxes_xyxy for region in regions])
        labels = torch.cat([region.labels for region in regions])
        truth = torch.cat([region.gt_boxes_xyxy for region in regions])
        references = torch.cat([region.boxes_xyxy for region in regions])
        logits, deltas = logits.to(references.dtype), deltas.to(references.dtype)
        count = max(len(labels), 1)
        foreground = (labels < self.num_classes).nonzero().flatten()
        column = labels[foreground] if deltas.shape[1] > 1 else torch.zeros_like(foreground)
        wanted = self.coder.encode(truth[foreground], references[foreground])
        return {
            "roi_classification": F.cross_entropy(logits, labels, reduction="sum") / count,
            # Also where there is no foreground: a sum over no regions is zero, and keeps the parameters in the graph.
            "roi_box": self.box_loss(deltas[foreground, column], wanted) / count,
        }

    @torch.no_grad()
    def sample(self, proposals: Proposals, target: Target) -> SampledRegions:
        """A balanced draw from the proposals and the ground truth, which joins them (Fast R-CNN's practice)."""
        gt_boxes = target.boxes_xyxy.to(proposals.boxes_xyxy.dtype)
        boxes = torch.cat((proposals.boxes_xyxy, gt_boxes))
        matches = self.matcher(boxes, Target(boxes_xyxy=gt_boxes, labels=target.labels, ignore_xyxy=target.ignore_xyxy))
        sample = self.sampler(matches)
        labels = torch.full((len(boxes),), self.num_classes, dtype=torch.int64, device=boxes.device)
        labels[sample.positive] = target.labels[matches.gt_index[sample.positive]]
        truth = boxes.clone()
        truth[sample.positive] = gt_boxes[matches.gt_index[sample.positive]]
        # In the order of the proposals, best first: a known order makes runs comparable.
        chosen = torch.cat((sample.positive, sample.negative)).sort().values
        return SampledRegions(boxes_xyxy=boxes[chosen], labels=labels[chosen], gt_boxes_xyxy=truth[chosen])

    def predict(self, levels: Levels, proposals: Sequence[Proposals]) -> list[Detections]:
        """Detections per picture in network-input pixels, best first."""
        boxes = [found.boxes_xyxy for found in proposals]
        logits, deltas = self(levels, boxes)
        return self.detect(logits, deltas, boxes, levels.image_sizes)

    def detect(
        self, logits: Tensor, deltas: Tensor, boxes: Sequence[Tensor], image_sizes: Sequence[Size]
    ) -> list[Detections]:
        """Detections per picture from the predictor's output for `boxes`."""
        counts = [len(of_image) for of_image in boxes]
        scores = F.softmax(logits.to(boxes[0].dtype), dim=1)[:, : self.num_classes]
        deltas = deltas.to(boxes[0].dtype)
        parts = zip(deltas.split(counts), boxes, scores.split(counts), image_sizes, strict=True)
        return [self._detect(of_image, references, some, size) for of_image, references, some, size in parts]

    def _detect(self, deltas: Tensor, references_xyxy: Tensor, scores: Tensor, size: Size) -> Detections:
        index = (scores > self.detection_filter.score_threshold).flatten().nonzero().flatten()
        region, label = index // self.num_classes, index % self.num_classes
        column = label if deltas.shape[1] > 1 else torch.zeros_like(label)
        boxes = clip(self.coder.decode(deltas[region, column], references_xyxy[region]), size)
        return self.detection_filter(boxes, scores.flatten()[index], label)
