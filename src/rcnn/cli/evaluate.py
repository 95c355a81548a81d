"""`rcnn eval`: every number of a checkpoint on a data set."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from rcnn.cli.train import Device, DeviceOption


class Precision(enum.StrEnum):
    """Of the arithmetic on this machine."""

    FLOAT32 = "float32"
    BF16 = "bf16"


PrecisionOption = Annotated[Precision, typer.Option("--precision", help="bf16 is faster, and moves boxes a little.")]


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of ours (.safetensors).")],
    data: Annotated[str, typer.Option("--data", "-d", help="The folder: COCO, VOC or YOLO.")],
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

    from rcnn.cli.output import error_table, number_table
    from rcnn.cli.train import _is_first_process, _leave_process_group
    from rcnn.engine.progress import progress_for
    from rcnn.predict import evaluate_checkpoint

    evaluation = evaluate_checkpoint(
        checkpoint,
        data=data,
        split=split,
        device=device.value,
        precision=precision.value,
        progress=progress_for(Console(stderr=True)),
    )
    if _is_first_process():
        typer.echo(number_table(evaluation))
        if errors:
            typer.echo(error_table(evaluation))
        if precision is not Precision.FLOAT32:
            _compare_precisions(evaluation, checkpoint, data, split, device)
        _write_files(evaluation, checkpoint, report, json_file, detections, pictures)
    _leave_process_group()


def _compare_precisions(evaluation, checkpoint: Path, data: str, split: str | None, device: Device) -> None:  # type: ignore[no-untyped-def]
    """What the lower precision costs: the same evaluation in float32."""
    import os

    from rcnn.predict import evaluate_checkpoint

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    plain = evaluate_checkpoint(checkpoint, data=data, split=split, device=device.value)
    before, now = plain.coco["AP"], evaluation.coco["AP"]
    typer.echo(f"AP in float32 {before:.4f}, here {now:.4f}: {now - before:+.4f}")


def _write_files(evaluation, checkpoint, report, json_file, detections, pictures) -> None:  # type: ignore[no-untyped-def]
    import json

    from rcnn.atomic_file import write_atomically
    from rcnn.data.folder import describe
    from rcnn.evaluation.files import write_coco_results
    from rcnn.recipes.judging import pictures_of
    from rcnn.recipes.judging import report as write_page

    if report is not None:
        write_page(
            report,
            evaluation,
            title=checkpoint.stem,
            facts={"checkpoint": str(checkpoint), "data": describe(evaluation.truth)},
            pictures=pictures_of(evaluation.truth, evaluation.found, count=pictures),
        )
        typer.echo(f"report: {report}")
    if json_file is not None:
        numbers = {
            **dict(evaluation.coco.items()),
            "voc_11_points": evaluation.voc[0].mean_ap,
            "voc_area": evaluation.voc[1].mean_ap,
            "classes": {row.name: {"AP": row.ap, "AP50": row.ap50} for row in evaluation.coco.per_class},
        }
        write_atomically(json_file, json.dumps(numbers, indent=2) + "\n")
        typer.echo(f"numbers: {json_file}")
    if detections is not None:
        write_coco_results(detections, evaluation.found, evaluation.truth.classes)
        typer.echo(f"detections: {detections}")
