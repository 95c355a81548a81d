"""`rcnn convert`: another system's checkpoint as one of ours, with a report of every key."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from rcnn.cli.options import AllowUnmappedOption


class System(enum.StrEnum):
    """Where a file comes from."""

    AUTO = "auto"
    TORCHVISION = "torchvision"
    SIMPLE_FASTER_RCNN = "simple-faster-rcnn"
    MMDET = "mmdet"
    DETECTRON2 = "detectron2"
    MINDSPORE = "mindspore"


class Target(enum.StrEnum):
    """Systems that ours can be written for."""

    TORCHVISION = "torchvision"
    MMDET = "mmdet"
    DETECTRON2 = "detectron2"


def command(
    file: Annotated[Path, typer.Argument(help="The checkpoint: another system's, or with --to one of ours.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the result goes (ours: .safetensors).")],
    system: Annotated[System, typer.Option("--from", help="The system that wrote it (auto: by keys).")] = System.AUTO,
    target: Annotated[Target | None, typer.Option("--to", help="Write ours as this system's file.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "--config", help="A recipe, or the system's config, where the keys cannot tell."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Names in the order of the labels: A,B,C or a file, one a line.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="PATH=VALUE", help="Changes to the recipe.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print what became of every key.")] = False,
    allow_unmapped: AllowUnmappedOption = False,
) -> None:
    """Turn another system's checkpoint into one of ours, its classes and preprocessing inside, or back with --to.

    Nothing in the file is run.
    """
    from rcnn.converters.convert import convert_file, export_file
    from rcnn.errors import Problem, SetupError

    if target is None:
        report = convert_file(
            file,
            out,
            system=system.value,
            recipe=recipe,
            classes=classes,
            overrides=overrides or (),
            allow_unmapped=allow_unmapped,
        )
        lines = report.lines(keys)
    elif system is not System.AUTO or recipe or classes or overrides or keys:
        given = "--to beside --from, --recipe, --config, --classes, --keys or a setting"
        raise SetupError(Problem(where="rcnn convert", given=given, allowed="--to SYSTEM FILE -o OUT alone"))
    else:
        lines = export_file(file, out, system=target.value)
    for line in lines:
        typer.echo(line)
