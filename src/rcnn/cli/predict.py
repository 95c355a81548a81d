"""`rcnn predict`: pictures in; annotated pictures, COCO results and CSV out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rcnn.cli.evaluate import Precision, PrecisionOption
from rcnn.cli.train import Device, DeviceOption

if TYPE_CHECKING:
    from rcnn.predict import Predictor
    from rcnn.records import Detections


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of ours (.safetensors).")],
    sources: Annotated[list[str], typer.Argument(metavar="PATH...", help="Pictures, folders, patterns 'a/*.jpg'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the results go.")] = Path("predictions"),
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
    from rcnn.errors import ImageError
    from rcnn.predict import find_pictures, load

    paths = find_pictures(sources)
    predictor = load(checkpoint, device=device.value, precision=precision.value)
    found: dict[int, Detections] = {}
    problems = []
    _make_folder(out)
    for index, path in enumerate(paths, start=1):
        try:
            found[index] = predictor.predict(path)[0]
        except ImageError as error:
            problems += error.problems
            continue
        if draw:
            _draw(predictor, path, found[index], threshold, out / "pictures" / f"{_flat_name(path, paths)}.png")
        shown = int((found[index].scores >= threshold).sum())
        typer.echo(f"{path}: {shown} with a score of {threshold:g} and more, {len(found[index])} in all")
    _write_tables(predictor, paths, found, out)
    typer.echo(f"results: {out}")
    if problems:
        raise ImageError(problems)


def _make_folder(out: Path) -> None:
    from rcnn.errors import Problem, RunError

    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            Problem(where=str(out), given=f"cannot be written: {error.strerror}", remedy="choose another: --out DIR")
        ) from error


def _draw(predictor: Predictor, path: Path, found: Detections, threshold: float, target: Path) -> None:
    from rcnn.errors import Problem, RunError
    from rcnn.predict import draw

    try:
        draw(path, found, predictor.classes, threshold=threshold).save(target)
    except OSError as error:
        raise RunError(
            Problem(where=str(target), given=f"cannot be written: {error.strerror or error}", remedy="make room")
        ) from error


def _flat_name(path: Path, paths: list[Path]) -> str:
    """The picture's name; with its folders where two pictures share it."""
    alike = [other for other in paths if other.stem == path.stem]
    return path.stem if len(alike) == 1 else "_".join(part for part in path.with_suffix("").parts if part != "/")


def _write_tables(predictor: Predictor, paths: list[Path], found: dict[int, Detections], out: Path) -> None:
    from rcnn.evaluation.files import write_coco_results, write_csv
    from rcnn.evaluation.table import DetectionTable

    table = DetectionTable.from_detections(found.items())
    write_coco_results(out / "detections.json", table, predictor.classes)
    write_csv(out / "detections.csv", table, predictor.classes, {i: str(path) for i, path in enumerate(paths, 1)})
