"""Evaluation as a recipe asks for it: predictions of a split, its numbers, and pictures of what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rcnn.data.loading import DetectionDataset
from rcnn.data.pictures import distinct_names
from rcnn.data.table import AnnotationTable
from rcnn.drawing import side_by_side
from rcnn.evaluation.coco import CocoResult, ErrorResult, coco_metrics, error_kinds
from rcnn.evaluation.recall import proposal_recall
from rcnn.evaluation.report import ReportPicture, write_report
from rcnn.evaluation.table import DetectionTable
from rcnn.evaluation.voc import Interpolation, VocResult, voc_metrics
from rcnn.recipes.recipe import EvaluateSpec
from rcnn.records import Detections
from rcnn.transforms.geometry import no_change

if TYPE_CHECKING:
    from torch import Tensor

# The number that chooses the best checkpoint.
BEST_METRIC = {"coco": "AP", "voc": "mAP", "proposals": "AR@1000"}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found in a split, and every number about it."""

    truth: AnnotationTable
    found: DetectionTable
    coco: CocoResult
    voc: tuple[VocResult, VocResult]  # 11 points, area
    errors: ErrorResult

    def metrics(self, spec: EvaluateSpec) -> dict[str, float]:
        """The numbers by name: COCO's twelve, and `mAP`, VOC's by the recipe's interpolation.

        Of proposals: COCO's numbers, and their recall in the place of COCO's own.
        """
        if spec.metric == "proposals":
            recall = proposal_recall(self.truth, self.found)
            averages = zip(recall.counts, recall.average.tolist(), strict=True)
            return {**dict(self.coco.items()), **{f"AR@{count}": average for count, average in averages}}
        voc = self.voc[0] if spec.voc_interpolation == "11_points" else self.voc[1]
        return {**dict(self.coco.items()), "mAP": voc.mean_ap}


def judge(truth: AnnotationTable, found: DetectionTable) -> Evaluation:
    return Evaluation(
        truth=truth,
        found=found,
        coco=coco_metrics(truth, found),
        voc=(
            voc_metrics(truth, found, interpolation=Interpolation.ELEVEN_POINTS),
            voc_metrics(truth, found, interpolation=Interpolation.AREA),
        ),
        errors=error_kinds(truth, found),
    )


def pictures_of(
    truth: AnnotationTable, found: DetectionTable, *, count: int, threshold: float = 0.5
) -> dict[str, Image.Image]:
    """`count` pictures spread over the split, what was found beside the truth, by the name of their files."""
    dataset = DetectionDataset(truth, no_change)
    chosen = np.unique(np.linspace(0, len(truth) - 1, min(count, len(truth))).round().astype(int))
    names = distinct_names([Path(truth.file_names[index]) for index in chosen.tolist()])
    return {
        name: _picture(dataset, index, found, threshold) for name, index in zip(names, chosen.tolist(), strict=True)
    }


def _picture(dataset: DetectionDataset, index: int, found: DetectionTable, threshold: float) -> Image.Image:
    import torch

    sample = dataset[index]
    rows = found.image_ids == dataset.table.image_ids[index]

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values[rows]))

    detections = Detections(
        boxes_xyxy=column(found.boxes_xyxy).float(), scores=column(found.scores).float(), labels=column(found.labels)
    )
    return side_by_side(sample.image, detections, sample.target, dataset.table.classes, threshold=threshold)


def report(
    path: Path,
    evaluation: Evaluation,
    *,
    title: str,
    facts: Mapping[str, str],
    history: Sequence[Mapping[str, Any]] = (),
    pictures: Mapping[str, Image.Image] | None = None,
) -> None:
    """One page with every number, curve and picture."""
    write_report(
        path,
        title=title,
        facts=facts,
        coco=evaluation.coco,
        voc=evaluation.voc,
        errors=evaluation.errors,
        history=list(history),
        pictures=[ReportPicture(caption=name, picture=picture) for name, picture in (pictures or {}).items()],
    )
