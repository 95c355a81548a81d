"""`rcnn quickstart`: draw a data set, train, evaluate, look at what was found. No download, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TRAIN_IMAGES, HELD_OUT_IMAGES = 360, 80


def command(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH=VALUE]...", help="Changes, for example train.epochs=3.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for everything.")] = Path("quickstart"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other pictures.")] = 0,
) -> None:
    """Draw pictures of shapes, train a small detector on them, evaluate it on held-out ones, show what it found."""
    import time

    from rich.console import Console

    from rcnn.cli.output import number_table
    from rcnn.data.shapes import draw_shapes_dataset
    from rcnn.drawing import contact_sheet
    from rcnn.engine.progress import progress_for
    from rcnn.errors import Problem, RunError
    from rcnn.recipes.judging import pictures_of
    from rcnn.recipes.resolve import resolve_recipe
    from rcnn.recipes.training import train

    started = time.monotonic()
    if out.exists():
        raise RunError(
            Problem(where=str(out), given="exists already", remedy="name a new folder: rcnn quickstart --out FOLDER")
        )
    recipe = resolve_recipe("quickstart", overrides or ()).spec
    typer.echo(f"1. drawing {TRAIN_IMAGES} pictures to train on and {HELD_OUT_IMAGES} held-out ones: {out / 'shapes'}")
    draw_shapes_dataset(out / "shapes", train_images=TRAIN_IMAGES, val_images=HELD_OUT_IMAGES, seed=seed)
    typer.echo("2. training (rcnn train quickstart --data ...)")
    result = train(
        recipe, run_folder=out / "run", data=str(out / "shapes"), progress=progress_for(Console(stderr=True))
    )
    evaluation = result.evaluation
    assert evaluation is not None
    typer.echo("3. evaluation on the held-out pictures (rcnn eval)")
    typer.echo(number_table(evaluation))
    sheet = out / "found_beside_truth.png"
    pictures = pictures_of(evaluation.truth, evaluation.found, count=6)
    contact_sheet(list(pictures.values()), columns=2).save(sheet)
    best = result.run.best
    typer.echo(f"4. done in {time.monotonic() - started:.0f} s: AP50 {evaluation.coco['AP50']:.3f}. Look at")
    typer.echo(f"   what it found, beside the truth:  {sheet}")
    typer.echo(f"   every number, curve and mistake:  {result.run.report}")
    typer.echo(f"   now with it: rcnn predict {best} {out / 'shapes' / 'val'}")
    typer.echo("   then your own pictures: rcnn train faster_rcnn_resnet18_fpn --data FOLDER")
