"""`rcnn train`: a recipe on a folder of annotated pictures, alone or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rcnn.cli.options import AllowUnmappedOption, Device, DeviceOption, OverridesArgument
from rcnn.cli.processes import is_first_process, leave_group

if TYPE_CHECKING:
    from rcnn.recipes.training import TrainResult


def command(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="The name of a recipe, or a file; none with --resume.")
    ] = None,
    overrides: OverridesArgument = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="The folder: COCO, VOC or YOLO.")] = None,
    run: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder of the run; without it runs/RECIPE, RECIPE-2, ...")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option("--init-from", help="Start from this checkpoint, ours or another system's, or its address."),
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this folder.")] = None,
    device: DeviceOption = Device.AUTO,
    allow_unmapped: AllowUnmappedOption = False,
) -> None:
    """Train a recipe on a folder of annotated pictures. Ctrl-C saves first; `rcnn train --resume RUN` goes on."""
    texts = [text for text in (recipe, *(overrides or ())) if text is not None]
    if resume is not None:
        _refuse_beside_resume(texts, {"--data": data, "--out": run, "--init-from": init_from})
        result = _go_on(resume, texts, device)
    else:
        result = _begin(texts, data, run, init_from, device, allow_unmapped=allow_unmapped)
    if is_first_process():
        _show(result)
    leave_group(together=True)


def _begin(
    texts: list[str],
    data: str | None,
    run: Path | None,
    init_from: str | None,
    device: Device,
    *,
    allow_unmapped: bool,
) -> TrainResult:
    from rich.console import Console

    from rcnn.converters.starts import read_any_start
    from rcnn.engine.progress import progress_for
    from rcnn.errors import Problem, RecipeError
    from rcnn.recipes.resolve import resolve_recipe
    from rcnn.recipes.training import train

    if not texts or ("=" in texts[0] and not Path(texts[0]).exists()):
        given = f"no recipe before {texts[0]}" if texts else "no recipe"
        remedy = "name one: rcnn train faster_rcnn_resnet18_fpn --data FOLDER; rcnn recipes lists them all"
        raise RecipeError(Problem(where="rcnn train", given=given, remedy=remedy))
    name, *overrides = texts
    return train(
        resolve_recipe(name, overrides, allow_unmapped=allow_unmapped).spec,
        run_folder=run or Path("runs") / Path(name).stem,
        if_taken="number" if run is None else "refuse",
        data=data,
        init_from=init_from,
        device=device.value,
        progress=progress_for(Console(stderr=True)),
        read=read_any_start,
    )


def _go_on(run: Path, overrides: list[str], device: Device) -> TrainResult:
    from rich.console import Console

    from rcnn.engine.progress import progress_for
    from rcnn.recipes.training import resume

    return resume(run, overrides=overrides, device=device.value, progress=progress_for(Console(stderr=True)))


def _refuse_beside_resume(texts: list[str], options: dict[str, object]) -> None:
    from rcnn.errors import Problem, RecipeError

    wrong = [text for text in texts if "=" not in text] + [name for name, value in options.items() if value is not None]
    if wrong:
        raise RecipeError(
            Problem(
                where="rcnn train --resume",
                given=f"{', '.join(wrong)} beside --resume",
                allowed="PATH=VALUE, to change a setting: a run goes on with its own recipe and data",
                remedy=f"leave out {', '.join(wrong)}",
            )
        )


def _show(result: TrainResult) -> None:
    from rcnn.cli.output import number_table

    run = result.run
    if result.evaluation is not None:
        typer.echo(number_table(result.evaluation))
    typer.echo(f"run: {run.path}")
    if result.evaluation is not None:
        typer.echo(f"  report:      {run.report}")
        typer.echo(f"  pictures:    {run.predictions}")
    checkpoint = run.last if result.evaluation is None else run.best
    typer.echo(f"  checkpoint:  {checkpoint}")
    typer.echo(f"  curves:      tensorboard --logdir {run.events}")
    typer.echo(f"  next:        rcnn predict {checkpoint} PICTURE_OR_FOLDER")
