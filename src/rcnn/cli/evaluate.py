"""`rcnn eval`: every number of a checkpoint on a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rcnn.cli.options import CheckpointArgument, Device, DeviceOption, OverridesArgument, Precision, PrecisionOption
from rcnn.cli.processes import is_first_process, leave_group

if TYPE_CHECKING:
    from rcnn.recipes.judging import Evaluation


def command(
    checkpoint: CheckpointArgument,
    data: Annotated[str, typer.Option("--data", "-d", help="The folder: COCO, VOC or YOLO.")],
    overrides: OverridesArgument = None,
    split: Annotated[
        str | None, typer.Option("--split", help='Which split; without it the recipe\'s, "val", or "test".')
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page with every number and curve.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers as JSON.")] = None,
    detections: Annotated[
        Path | None, typer.Option("--detections", help="Write what was found as COCO results.")
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=0, help="Pictures on the page.")] = 16,
    errors: Annotated[bool, typer.Option("--errors", help="Print the kinds of mistakes.")] = False,
    precision: PrecisionOption = Precision.FLOAT32,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Evaluate a checkpoint: COCO AP, VOC mAP (11 points and area), per class; also under torchrun."""
    from rich.console import Console

    from rcnn.atomic_file import refuse_unwritable
    from rcnn.cli.output import error_table, number_table
    from rcnn.engine.progress import progress_for
    from rcnn.predict import evaluate_checkpoint

    refuse_unwritable(path for path in (report, json_file, detections) if path is not None)

    def evaluate(precision: Precision) -> Evaluation:
        progress = progress_for(Console(stderr=True))
        return evaluate_checkpoint(
            checkpoint, data=data, split=split, overrides=overrides or (), device=device.value,
            precision=precision.value, progress=progress,
        )  # fmt: skip

    evaluation = evaluate(precision)
    if is_first_process():
        typer.echo(number_table(evaluation))
        if errors:
            typer.echo(error_table(evaluation))
        for line in _write_files(evaluation, checkpoint, report, json_file, detections, pictures):
            typer.echo(line)
    if precision is not Precision.FLOAT32:
        # What the lower precision costs is never left unsaid: the same once more in float32.
        line = _difference(evaluation, evaluate(Precision.FLOAT32), precision)
        if is_first_process():
            typer.echo(line)
    leave_group(together=True)


def _difference(evaluation: Evaluation, plain: Evaluation, precision: Precision) -> str:
    names = ("AP", "AP50")
    pairs = [(name, plain.coco[name], evaluation.coco[name]) for name in names]
    texts = [f"{name} {before:.4f} -> {now:.4f} ({now - before:+.4f})" for name, before, now in pairs]
    return f"float32 -> {precision.value}: {', '.join(texts)}"


def _write_files(
    evaluation: Evaluation,
    checkpoint: Path,
    report: Path | None,
    json_file: Path | None,
    detections: Path | None,
    pictures: int,
) -> list[str]:
    """Writes what was asked for; lines that say where."""
    from rcnn.atomic_file import write_atomically
    from rcnn.evaluation.files import write_coco_results

    lines = []
    if report is not None:
        _write_page(report, evaluation, checkpoint, pictures)
        lines.append(f"report: {report}")
    if json_file is not None:
        write_atomically(json_file, json.dumps(numbers(evaluation), indent=2) + "\n")
        lines.append(f"numbers: {json_file}")
    if detections is not None:
        write_coco_results(detections, evaluation.found, evaluation.truth.classes)
        lines.append(f"detections: {detections}")
    return lines


def _write_page(path: Path, evaluation: Evaluation, checkpoint: Path, pictures: int) -> None:
    from rcnn.data.folder import describe
    from rcnn.recipes.judging import pictures_of, report

    report(
        path,
        evaluation,
        title=checkpoint.stem,
        facts={"checkpoint": str(checkpoint), "data": describe(evaluation.truth)},
        pictures=pictures_of(evaluation.truth, evaluation.found, count=pictures),
    )


def numbers(evaluation: Evaluation) -> dict[str, Any]:
    """All numbers by name, for a program."""
    eleven_points, area = evaluation.voc
    classes = {
        row.name: {"AP": row.ap, "AP50": row.ap50, "AP75": row.ap75, "AR": row.ar, "boxes": row.boxes}
        for row in evaluation.coco.per_class
    }
    for of_metric, name in ((eleven_points, "voc_11_points"), (area, "voc_area")):
        for row in of_metric.per_class:
            classes[row.name][name] = row.ap
    return {
        **dict(evaluation.coco.items()),
        "voc_11_points": eleven_points.mean_ap,
        "voc_area": area.mean_ap,
        "classes": classes,
    }
