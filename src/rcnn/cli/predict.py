"""`rcnn predict`: pictures in; annotated pictures, COCO results and CSV out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rcnn.cli.options import CheckpointArgument, Device, DeviceOption, Precision, PrecisionOption

if TYPE_CHECKING:
    from rcnn.errors import Problem
    from rcnn.predict import Predictor
    from rcnn.records import ClassTable, Detections


def command(
    checkpoint: CheckpointArgument,
    sources: Annotated[list[str], typer.Argument(metavar="PATH...", help="Pictures, folders, patterns 'a/*.jpg'.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the results go; files of the same name are replaced.")
    ] = Path("predictions"),
    threshold: Annotated[
        float, typer.Option("--threshold", "-t", min=0.0, max=1.0, help="Draw detections from this score up.")
    ] = 0.5,
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Write annotated pictures.")] = True,
    precision: PrecisionOption = Precision.FLOAT32,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Detect objects in pictures and folders: annotated pictures, COCO results (detections.json) and detections.csv.

    The files hold every detection that the recipe lets pass; --threshold is for the drawings alone. A picture that
    cannot be read is named at the end and does not stop the others; the exit code is 1 then.
    """
    from rcnn.atomic_file import refuse_unwritable
    from rcnn.data.pictures import distinct_names, find_pictures
    from rcnn.errors import ImageError
    from rcnn.predict import load

    paths = find_pictures(sources)
    refuse_unwritable([out / "detections.json"])
    predictor = load(checkpoint, device=device.value, precision=precision.value)
    pictures = [out / "pictures" / f"{name}.png" for name in distinct_names(paths)] if draw else [None] * len(paths)
    found: dict[int, Detections] = {}
    problems: list[Problem] = []
    for number, (path, picture) in enumerate(zip(paths, pictures, strict=True), start=1):
        try:
            found[number] = _predict_one(predictor, path, threshold, picture)
        except ImageError as error:
            problems += error.problems
    _write_tables(found, predictor.classes, out, {number: str(path) for number, path in enumerate(paths, start=1)})
    typer.echo(f"results: {out}")
    if problems:
        raise ImageError(problems)


def _predict_one(predictor: Predictor, path: Path, threshold: float, picture: Path | None) -> Detections:
    """What is found in one file; drawn into `picture`, and said."""
    from rcnn.data.image import read_image
    from rcnn.drawing import draw_detections, save_picture

    pixels = read_image(path)
    found = predictor.predict(pixels)[0]
    if picture is not None:
        save_picture(picture, draw_detections(pixels, found, predictor.classes, threshold=threshold))
    shown = int((found.scores >= threshold).sum())
    typer.echo(f"{path}: {shown} with a score of {threshold:g} and more, {len(found)} in all")
    return found


def _write_tables(found: dict[int, Detections], classes: ClassTable, out: Path, files: dict[int, str]) -> None:
    """Both tables; a picture's id is its place among those that were asked for, and its file stands beside it."""
    from rcnn.evaluation.files import write_coco_results, write_csv
    from rcnn.evaluation.table import DetectionTable

    table = DetectionTable.from_detections(found.items())
    write_coco_results(out / "detections.json", table, classes, files)
    write_csv(out / "detections.csv", table, classes, files)
