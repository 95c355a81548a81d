"""`rcnn proposals`: a detector's proposals as a file, and what proposals are worth."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rcnn.cli.options import CheckpointArgument, Device, DeviceOption, OverridesArgument
from rcnn.cli.processes import is_first_process, leave_group

if TYPE_CHECKING:
    from rcnn.recipes.proposing import ProposalEvaluation

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, help="Write a detector's proposals to a file, and judge proposals."
)


class Rule(enum.StrEnum):
    """How proposals and true boxes are paired."""

    OVERLAP = "overlap"
    SCORE = "score"


DataOption = Annotated[str, typer.Option("--data", "-d", help="The folder: COCO, VOC or YOLO.")]


@app.command()
def dump(
    checkpoint: CheckpointArgument,
    data: DataOption,
    overrides: OverridesArgument = None,
    split: Annotated[
        str | None, typer.Option("--split", help='Which split; without it the recipe\'s, "val", or "test".')
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file (default: proposals-SPLIT.safetensors).")
    ] = None,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Write the proposals of a detector, one-stage ones too, for every picture of a split; also under torchrun."""
    from rich.console import Console

    from rcnn.engine.progress import progress_for
    from rcnn.recipes.proposing import dump_proposals

    done = dump_proposals(
        checkpoint, out, data=data, split=split, overrides=overrides or (), device=device.value,
        progress=progress_for(Console(stderr=True)),
    )  # fmt: skip
    if is_first_process():
        size = done.path.stat().st_size / 1e6
        typer.echo(f"{done.proposals:,} proposals of {done.pictures:,} pictures: {done.path} ({size:.1f} MB)")
    leave_group(together=True)


@app.command("eval")
def evaluate(
    source: Annotated[
        Path, typer.Argument(metavar="FILE|CHECKPOINT", help="A file of proposals, or a checkpoint that makes them.")
    ],
    data: DataOption,
    overrides: OverridesArgument = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which split; without it the file's pictures, or the recipe's split.")
    ] = None,
    pairing: Annotated[
        Rule,
        typer.Option(
            "--pairing", help="overlap: as MMDetection's proposal_fast and detectron2; score: as COCO without classes."
        ),
    ] = Rule.OVERLAP,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers as JSON.")] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Draw recall by IoU (.svg).")] = None,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Judge proposals: AR by size and class, recall by IoU, and the AP that a perfect second stage would reach."""
    from rich.console import Console

    from rcnn.atomic_file import refuse_unwritable
    from rcnn.engine.progress import progress_for
    from rcnn.evaluation.recall import Pairing
    from rcnn.recipes.proposing import evaluate_proposals

    if chart is not None and chart.suffix != ".svg":
        raise typer.BadParameter(f"{chart} does not end in .svg", param_hint="--chart")
    refuse_unwritable(path for path in (json_file, chart) if path is not None)
    evaluation = evaluate_proposals(
        source, data=data, split=split, overrides=overrides or (), device=device.value,
        pairing=Pairing(pairing.value), progress=progress_for(Console(stderr=True)),
    )  # fmt: skip
    if is_first_process():
        for line in (*tables(evaluation), *_write_files(evaluation, json_file, chart)):
            typer.echo(line)
    leave_group(together=True)


def tables(evaluation: ProposalEvaluation) -> list[str]:
    """The numbers for a terminal: by the number of proposals, by IoU, by class."""
    recall = evaluation.recall
    mean = recall.proposals / recall.pictures if recall.pictures else 0.0
    return [
        f"{recall.pictures:,} pictures, {recall.boxes:,} boxes; proposals in a picture: {mean:,.1f} on average, "
        f"{evaluation.most_proposals:,} at most",
        _count_table(evaluation),
        _iou_table(evaluation),
        _class_table(evaluation),
    ]


def _count_table(evaluation: ProposalEvaluation) -> str:
    from rich.table import Table

    from rcnn.cli.output import rendered
    from rcnn.evaluation.report import number_text

    recall = evaluation.recall
    table = Table(
        title="Average recall (IoU 0.50 to 0.95), and the AP if the second stage were perfect", title_justify="left"
    )
    table.add_column("proposals")
    for column in ("AR", *recall.average_by_size, "at IoU 0.5", "AP, right classes", "AP, right boxes too"):
        table.add_column(column, justify="right")
    table.add_row(
        "(boxes)", f"{recall.boxes:,}", *(f"{count:,}" for count in recall.boxes_by_size.values()), end_section=True
    )
    for place, (count, perfect) in enumerate(zip(recall.counts, evaluation.perfect, strict=True)):
        sizes = (values[place] for values in recall.average_by_size.values())
        aps = (perfect.classified["AP"], perfect.refined["AP"])
        table.add_row(f"{count:,}", *map(number_text, (recall.average[place], *sizes, recall.at(0.5)[place], *aps)))
    return rendered(table)


def _iou_table(evaluation: ProposalEvaluation) -> str:
    from rich.table import Table

    from rcnn.cli.output import rendered
    from rcnn.evaluation.report import number_text

    recall = evaluation.recall
    table = Table(title="Recall by IoU", title_justify="left")
    table.add_column("proposals")
    for threshold in recall.iou_thresholds:
        table.add_column(f"{threshold:.2f}", justify="right")
    for count, row in zip(recall.counts, recall.recall, strict=True):
        table.add_row(f"{count:,}", *map(number_text, row))
    return rendered(table)


def _class_table(evaluation: ProposalEvaluation) -> str:
    from rich.table import Table

    from rcnn.cli.output import rendered
    from rcnn.evaluation.report import number_text

    recall = evaluation.recall
    table = Table(title="Average recall of each class", title_justify="left")
    table.add_column("class")
    table.add_column("boxes", justify="right")
    for count in recall.counts:
        table.add_column(f"AR@{count}", justify="right")
    for row in recall.per_class:
        table.add_row(row.name, f"{row.boxes:,}", *map(number_text, row.average))
    return rendered(table)


def _write_files(evaluation: ProposalEvaluation, json_file: Path | None, chart: Path | None) -> list[str]:
    """Writes what was asked for; lines that say where."""
    from rcnn.atomic_file import write_atomically

    lines = []
    if json_file is not None:
        write_atomically(json_file, json.dumps(numbers(evaluation), indent=2) + "\n")
        lines.append(f"numbers: {json_file}")
    if chart is not None:
        write_atomically(chart, recall_chart(evaluation))
        lines.append(f"chart: {chart}")
    return lines


def recall_chart(evaluation: ProposalEvaluation) -> str:
    """Recall by IoU, a line for each number of proposals, as an SVG file."""
    from rcnn.evaluation.charts import Series, line_chart, standalone

    recall = evaluation.recall
    thresholds = recall.iou_thresholds.tolist()
    series = [
        Series(name=f"{count:,} proposals", x=thresholds, y=row.tolist())
        for count, row in zip(recall.counts, recall.recall, strict=True)
    ]
    chart = line_chart(series, x_label="IoU", y_label="recall", x_range=(0.5, 0.95), y_range=(0.0, 1.0))
    return standalone(chart)


def numbers(evaluation: ProposalEvaluation) -> dict[str, Any]:
    """All numbers by name, for a program; null where there is no such box."""
    recall = evaluation.recall
    counts = [str(count) for count in recall.counts]
    perfect = {
        count: {
            "right_classes": {name: _number(one.classified[name]) for name in ("AP", "AP50", "AP75")},
            "right_boxes_too": {name: _number(one.refined[name]) for name in ("AP", "AP50", "AP75")},
        }
        for count, one in zip(counts, evaluation.perfect, strict=True)
    }
    return {
        "pictures": recall.pictures,
        "boxes": recall.boxes,
        "proposals": recall.proposals,
        "most_proposals": evaluation.most_proposals,
        "pairing": recall.pairing.value,
        **{f"AR@{count}": _number(value) for count, value in zip(counts, recall.average, strict=True)},
        **{
            f"AR_{size}@{count}": _number(value)
            for size, values in recall.average_by_size.items()
            for count, value in zip(counts, values, strict=True)
        },
        "boxes_by_size": recall.boxes_by_size,
        "recall": {
            count: {f"{iou:.2f}": _number(value) for iou, value in zip(recall.iou_thresholds, row, strict=True)}
            for count, row in zip(counts, recall.recall, strict=True)
        },
        "classes": {
            row.name: {
                "boxes": row.boxes,
                **{f"AR@{count}": _number(value) for count, value in zip(counts, row.average, strict=True)},
            }
            for row in recall.per_class
        },
        "perfect_second_stage": perfect,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN; COCO's numbers have -1 for it."""
    return None if value != value or value == -1 else float(value)
