"""`rcnn convert`: another system's checkpoint as one of ours, with a report of every key."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class System(enum.StrEnum):
    """Where a file comes from."""

    AUTO = "auto"
    TORCHVISION = "torchvision"


def command(
    file: Annotated[Path, typer.Argument(help="The checkpoint (.pth).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where ours goes (.safetensors).")],
    system: Annotated[System, typer.Option("--from", help="The system that wrote it (auto: by keys).")] = System.AUTO,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="The recipe, where the keys cannot tell (the 320-pixel model).")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Names in the order of the labels: A,B,C or a file, one a line.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="PATH=VALUE", help="Changes to the recipe.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print what became of every key.")] = False,
) -> None:
    """Turn another system's checkpoint into one of ours, its classes and preprocessing inside. Nothing in it is run."""
    from rcnn.converters.convert import convert_file

    report = convert_file(file, out, system=system.value, recipe=recipe, classes=classes, overrides=overrides or ())
    for line in report.lines(keys):
        typer.echo(line)
