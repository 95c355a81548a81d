"""`rcnn train`: a recipe on a folder of annotated pictures, alone or under torchrun."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Device(enum.StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]


def command(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="The name of a recipe, or a file; none with --resume.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH=VALUE]...", help="Changes, for example train.epochs=12.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="The folder: COCO, VOC or YOLO.")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-o", help="The folder of the run; without it runs/RECIPE, RECIPE-2, ...")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", help="Start from this checkpoint instead of ImageNet weights.")
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this folder.")] = None,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Train a recipe on a folder of annotated pictures. Ctrl-C saves first; `rcnn train --resume RUN` goes on."""
    from rich.console import Console

    from rcnn.cli.output import number_table
    from rcnn.engine.progress import progress_for
    from rcnn.errors import Problem, RecipeError

    console = Console(stderr=True)
    progress = progress_for(console)
    if resume is not None:
        from rcnn.recipes.training import resume as go_on

        changes = [text for text in (recipe, *(overrides or ())) if text is not None]
        wrong = [text for text in changes if "=" not in text]
        if wrong or data is not None or run is not None or init_from is not None:
            given = ", ".join([*wrong, *(name for name, value in _options(data, run, init_from) if value is not None)])
            raise RecipeError(
                Problem(
                    where="rcnn train --resume",
                    given=f"{given} beside --resume",
                    allowed="a run goes on with its own recipe and data; PATH=VALUE may change a setting",
                )
            )
        result = go_on(resume, overrides=changes, device=device.value, progress=progress)
    else:
        from rcnn.recipes.resolve import resolve_recipe
        from rcnn.recipes.training import train

        if recipe is None:
            raise RecipeError(
                Problem(where="rcnn train", given="no recipe", remedy="name one: rcnn recipes lists them")
            )
        resolved = resolve_recipe(recipe, overrides or ()).spec
        folder = run or free_run_folder(Path(recipe).stem)
        result = train(
            resolved, run_folder=folder, data=data, init_from=init_from, device=device.value, progress=progress
        )
    if _is_first_process():
        if result.evaluation is not None:
            typer.echo(number_table(result.evaluation))
        _say_where(result.run.path, result.evaluation is not None)
    _leave_process_group()


def _options(data: str | None, run: Path | None, init_from: Path | None) -> list[tuple[str, object]]:
    return [("--data", data), ("--run", run), ("--init-from", init_from)]


def free_run_folder(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3, ... that is not taken. The same on every process of a torchrun."""
    import os

    root = Path("runs")
    # Processes look at different moments: the first may have made the folder when the second looks.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from rcnn.errors import Problem, RecipeError

        raise RecipeError(
            Problem(where="rcnn train", given="several processes and no --run", remedy=f"name it: --run runs/{name}")
        )
    number = 1
    while (folder := root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _is_first_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _leave_process_group() -> None:
    """In order, before the interpreter ends: a group that is torn down by it can abort the process."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _say_where(run: Path, evaluated: bool) -> None:
    best = run / "checkpoints" / "best.safetensors"
    typer.echo(f"run: {run}")
    if evaluated:
        typer.echo(f"  report:      {run / 'report.html'}")
        typer.echo(f"  pictures:    {run / 'predictions'}")
        typer.echo(f"  checkpoint:  {best}")
        typer.echo(f"  next:        rcnn predict {best} PICTURE_OR_FOLDER")
    else:
        typer.echo(f"  checkpoint:  {run / 'checkpoints' / 'last.safetensors'}")
    typer.echo(f"  curves:      tensorboard --logdir {run / 'tensorboard'}")
