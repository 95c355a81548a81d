"""`rcnn quickstart`: draw a data set, train, evaluate, look at what was found. No download, on a CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rcnn.cli.options import OverridesArgument

if TYPE_CHECKING:
    from rcnn.recipes.judging import Evaluation

TRAIN_IMAGES, HELD_OUT_IMAGES = 360, 80


def command(
    overrides: OverridesArgument = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder for everything; without it quickstart, or -2, ...")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other pictures.")] = 0,
) -> None:
    """Draw pictures of shapes, train a small detector on them, evaluate it on held-out ones, show what it found."""
    from rich.console import Console

    from rcnn.cli.output import number_table
    from rcnn.data.shapes import draw_shapes_dataset
    from rcnn.engine.progress import progress_for
    from rcnn.recipes.resolve import resolve_recipe
    from rcnn.recipes.training import train

    started = time.monotonic()
    recipe = resolve_recipe("quickstart", overrides or ()).spec
    folder = _free_folder(out)
    shapes = folder / "shapes"
    typer.echo(f"1. drawing {TRAIN_IMAGES} pictures to train on and {HELD_OUT_IMAGES} held-out ones: {shapes}")
    draw_shapes_dataset(shapes, train_images=TRAIN_IMAGES, val_images=HELD_OUT_IMAGES, seed=seed)
    typer.echo(f"2. training (as rcnn train quickstart --data {shapes})")
    result = train(recipe, run_folder=folder / "run", data=str(shapes), progress=progress_for(Console(stderr=True)))
    evaluation = result.evaluation
    if evaluation is None:
        typer.echo(f"3. no evaluation (evaluate.every_epochs=0); the checkpoint: {result.run.last}")
        return
    typer.echo("3. evaluation on the held-out pictures (as rcnn eval)")
    typer.echo(number_table(evaluation))
    sheet = _contact_sheet(folder, evaluation)
    typer.echo(f"4. done in {time.monotonic() - started:.0f} s: AP50 {evaluation.coco['AP50']:.3f}. Look at")
    typer.echo(f"   what it found, beside the truth:  {sheet}")
    typer.echo(f"   every number, curve and mistake:  {result.run.report}")
    typer.echo(f"   now with it: rcnn predict {result.run.best} {shapes / 'val'}")
    typer.echo("   then your own pictures: rcnn train faster_rcnn_resnet18_fpn --data FOLDER")


def _free_folder(out: Path | None) -> Path:
    from rcnn.errors import Problem, RunError

    if out is None:
        number, out = 1, Path("quickstart")
        while out.exists():
            number += 1
            out = Path(f"quickstart-{number}")
    elif out.exists():
        remedy = "name a new folder: rcnn quickstart --out FOLDER"
        raise RunError(Problem(where=str(out), given="exists already", remedy=remedy))
    return out


def _contact_sheet(folder: Path, evaluation: Evaluation) -> Path:
    from rcnn.drawing import contact_sheet, save_picture
    from rcnn.recipes.judging import pictures_of

    path = folder / "found_beside_truth.png"
    pictures = pictures_of(evaluation.truth, evaluation.found, count=6)
    save_picture(path, contact_sheet(list(pictures.values()), columns=2))
    return path
