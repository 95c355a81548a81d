"""Numbers as tables for a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from rcnn.recipes.judging import Evaluation


def rendered(table: Table, *, width: int = 110) -> str:
    """A rich table as plain text: what was asked for goes to stdout, where it may be piped."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n")


def number_table(evaluation: Evaluation) -> str:
    """All numbers of an evaluation: the twelve of COCO, VOC's two, and each class."""
    from rich.table import Table

    from rcnn.evaluation.report import number_text

    summary = Table(title=f"{len(evaluation.truth):,} pictures", title_justify="left")
    per_class = Table()
    for column in ("COCO", "", "VOC at IoU 0.5", ""):
        summary.add_column(column, justify="left" if column else "right")
    voc = [("mAP, 11 points", evaluation.voc[0].mean_ap), ("mAP, area", evaluation.voc[1].mean_ap)]
    for index, (name, value) in enumerate(evaluation.coco.items()):
        right = (voc[index][0], number_text(voc[index][1])) if index < len(voc) else ("", "")
        summary.add_row(name, number_text(value), *right)
    per_class.add_column("class")
    for column in ("boxes", "AP", "AP50", "AP75", "AR", "VOC 11 points", "VOC area"):
        per_class.add_column(column, justify="right")
    for row, eleven, area in zip(
        evaluation.coco.per_class, evaluation.voc[0].per_class, evaluation.voc[1].per_class, strict=True
    ):
        values = (row.ap, row.ap50, row.ap75, row.ar, eleven.ap, area.ap)
        per_class.add_row(row.name, f"{row.boxes:,}", *map(number_text, values))
    return rendered(summary) + "\n" + rendered(per_class)


def error_table(evaluation: Evaluation) -> str:
    """Kinds of mistakes, and what AP50 would be without each."""
    from rich.table import Table

    table = Table(title=f"mistakes at IoU {evaluation.errors.iou:g}, score {evaluation.errors.min_score:g} and up")
    table.add_column("kind")
    table.add_column("number", justify="right")
    table.add_column("AP50 gained without", justify="right")
    for kind, count in evaluation.errors.counts.items():
        gain = evaluation.errors.ap_gains.get(kind)
        table.add_row(kind, f"{count:,}", "" if gain is None else f"{gain:.3f}")
    return rendered(table)
