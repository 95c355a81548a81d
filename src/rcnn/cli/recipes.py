"""`rcnn recipes`: what there is, what one says and who says it, how two differ, whether a file is right."""

from __future__ import annotations

import inspect
import textwrap
from typing import Annotated

import typer

from rcnn.cli.options import AllowUnmappedOption

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="List, show, compare and check recipes.")

Source = Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a recipe, or a file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="PATH=VALUE", help="Changes, for example train.epochs=12.")
]


@app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the named recipes: what each is, the number it aims at, and where that number comes from."""
    if context.invoked_subcommand is not None:
        return
    from rcnn.recipes.catalogue import RECIPES

    for name, function in RECIPES.items():
        recipe = function()
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        typer.echo(name)
        for line in (summary, f"aims at: {recipe.expected} ({recipe.source})"):
            typer.echo(textwrap.fill(line, width=110, initial_indent="    ", subsequent_indent="    "))


@app.command()
def show(
    source: Source,
    overrides: Overrides = None,
    origins: Annotated[
        bool, typer.Option("--origins", help="Only what is not a default, one line each, with its origin.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Say of defaults too that they are, and what each setting means.")
    ] = False,
    allow_unmapped: AllowUnmappedOption = False,
) -> None:
    """Print a recipe as it will be used. Behind everything that is not a default stands who gave it."""
    from rcnn.config.text import descriptions, flatten, to_yaml
    from rcnn.recipes.resolve import resolve_recipe

    resolved = resolve_recipe(source, overrides or (), allow_unmapped=allow_unmapped)
    if origins:
        values = flatten(resolved.spec)
        for path, origin in resolved.changes.items():
            typer.echo(f"{path}={values[path]}  # {origin}")
        return
    comments = dict(resolved.origins) if everything else resolved.changes
    if everything:
        for path, meaning in descriptions(resolved.spec).items():
            comments[path] += f": {meaning}"
    typer.echo(to_yaml(resolved.spec, comments), nl=False)


@app.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="The name of a recipe, or a file.")],
    right: Annotated[str, typer.Argument(metavar="B", help="The name of a recipe, or a file.")],
) -> None:
    """Print where two recipes differ. The value of A comes first; (absent) stands where one has no such setting."""
    from rcnn.config.text import diff as differences_of
    from rcnn.recipes.resolve import resolve_recipe

    ours, theirs = (resolve_recipe(source).spec for source in (left, right))
    differences = differences_of(ours, theirs)
    for path, one, other in differences:
        typer.echo(f"{path}: {_or_absent(one)} -> {_or_absent(other)}")
    if not differences:
        typer.echo("no difference")


@app.command()
def check(source: Source, overrides: Overrides = None, allow_unmapped: AllowUnmappedOption = False) -> None:
    """Say ok, or all that is wrong (exit 1). Of another system's config, say what did not become part of the recipe."""
    from rcnn.recipes.resolve import resolve_recipe

    left_out: list[str] = []
    changes = len(resolve_recipe(source, overrides or (), allow_unmapped=allow_unmapped, tell=left_out.append).changes)
    for line in left_out:
        typer.echo(line)
    typer.echo(f"ok: {source} is a recipe ({changes} settings differ from the defaults)")


def _or_absent(text: str | None) -> str:
    return "(absent)" if text is None else text
