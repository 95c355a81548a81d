"""`rcnn data`: check, count, convert and fetch data sets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rcnn.data.folder import Format
    from rcnn.data.statistics import Statistics
    from rcnn.data.table import AnnotationTable
    from rcnn.data.writing import Pictures
    from rcnn.errors import Problem

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Check, count, convert and fetch data sets.")

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder of the data set, or its COCO json or YOLO data.yaml.")
]
Split = Annotated[str | None, typer.Option("--split", metavar="NAME", help="Only this split (default: all of them).")]
FormatName = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="coco, voc or yolo, where a folder holds several.")
]
_FORMATS = ("coco", "voc", "yolo")
_PICTURES = ("copy", "link", "none")


@app.command()
def check(
    folder: Folder,
    split: Split = None,
    format_name: FormatName = None,
    decode: Annotated[bool, typer.Option("--decode", help="Read every picture whole, not its head alone.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Count bad boxes as errors, not as warnings.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help="List every finding, not the first 50 of each kind.")] = False,
) -> None:
    """Find what would spoil a training: all mistakes at once. Exit code 1 if there are errors."""
    from rcnn.data.folder import describe
    from rcnn.data.inspect import inspect_dataset

    progress, finish = _counter("pictures")
    result = inspect_dataset(
        folder,
        split=split,
        format=_format(format_name, "--format"),
        bad_boxes="error" if strict else "mend",
        decode=decode,
        progress=progress,
    )
    finish()
    for table in result.tables:
        typer.echo(describe(table))
    _print_problems("error", result.errors, show_all)
    _print_problems("warning", result.warnings, show_all)
    looked = "read whole" if decode else "looked at (heads only; --decode reads them whole)"
    typer.echo(
        f"{len(result.errors):,} errors, {len(result.warnings):,} warnings; {result.num_pictures:,} pictures {looked}"
    )
    if result.errors:
        raise typer.Exit(1)


@app.command()
def stats(folder: Folder, split: Split = None, format_name: FormatName = None) -> None:
    """Count pictures, boxes per class and size, and shapes."""
    from rcnn.data.folder import describe
    from rcnn.data.statistics import count

    for table in _read(folder, split, _format(format_name, "--format")):
        typer.echo(describe(table))
        _print_statistics(count(table))


@app.command()
def convert(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="coco, voc or yolo.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="A new folder: nothing is overwritten.")],
    split: Split = None,
    format_name: FormatName = None,
    pictures: Annotated[
        str, typer.Option("--pictures", metavar="HOW", help="copy them, link to them, or none.")
    ] = "copy",
) -> None:
    """Write the annotations in another format, beside the pictures that they need."""
    from rcnn.data.writing import convert_tables

    target, how = _format(to, "--to"), _one_of(pictures, _PICTURES, "--pictures")
    tables = _read(folder, split, _format(format_name, "--format"))
    assert target is not None
    done = convert_tables(tables, out, to=target, pictures=_as_pictures(how))
    for sentence in done.lost:
        typer.echo(f"note: {sentence}", err=True)
    typer.echo(f"{done.num_pictures:,} pictures and {done.num_boxes:,} boxes written to {done.out}")


@app.command()
def fetch(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which one; none lists them.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to (default: datasets/NAME).")
    ] = None,
) -> None:
    """Download a public data set, verify and unpack it. Interrupted, it goes on where it stopped."""
    from rcnn.data.fetch import CATALOGUE, fetch_dataset

    if name is None:
        for known, source in CATALOGUE.items():
            typer.echo(f"{known:14} {source.title}")
        return
    progress, finish = _counter("MiB")
    done = fetch_dataset(
        name,
        out or Path("datasets") / name,
        progress=lambda archive, have, total: progress(have >> 20, None if total is None else total >> 20, archive),
    )
    finish()
    typer.echo(f"ready: use --data {done}")


def _format(name: str | None, option: str) -> Format | None:
    if name is None:
        return None
    found: Any = _one_of(name.lower(), _FORMATS, option)
    return found


def _as_pictures(name: str) -> Pictures:
    found: Any = name
    return found


def _one_of(name: str, allowed: Sequence[str], option: str) -> str:
    if name not in allowed:
        raise typer.BadParameter(f'"{name}" is none of {", ".join(allowed)}', param_hint=option)
    return name


def _read(folder: Path, split: str | None, format_name: Format | None) -> list[AnnotationTable]:
    """The tables of one split or all; with the classes of the first, so that labels mean the same."""
    from rcnn.data.folder import read_dataset, splits

    names = splits(folder, format=format_name) if split is None else (split,)
    tables = [read_dataset(folder, split=name, format=format_name) for name in names]
    for table in tables:
        if table.findings:
            typer.echo(f'note: split "{table.split}": {table.findings.summary()}', err=True)
    return tables


def _print_problems(kind: str, problems: Sequence[Problem], show_all: bool) -> None:
    shown = problems if show_all else problems[:50]
    for problem in shown:
        typer.echo(f"{kind}: {problem}")
    if len(shown) < len(problems):
        typer.echo(f"... and {len(problems) - len(shown):,} more {kind}s (--all lists them)")


def _counter(unit: str) -> tuple[Callable[..., None], Callable[[], None]]:
    """A line on a terminal that counts, and what ends it; silent where nobody watches."""
    if not sys.stderr.isatty():
        return (lambda done, total, name="": None), (lambda: None)

    def show(done: int, total: int | None, name: str = "") -> None:
        if done % 16 == 0 or done == total:
            of = "" if total is None else f" of {total:,}"
            print(f"\r{name} {done:,}{of} {unit}".ljust(60), end="", file=sys.stderr, flush=True)

    return show, lambda: print(file=sys.stderr)


def _print_statistics(counted: Statistics) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    classes = Table("class", title="boxes per class", title_justify="left")
    for column in ("boxes", "share", "ignored", "pictures"):
        classes.add_column(column, justify="right")
    for row in counted.classes:
        share = f"{row.boxes / counted.boxes:.1%}" if counted.boxes else ""
        classes.add_row(row.name, f"{row.boxes:,}", share, f"{row.ignored:,}", f"{row.pictures:,}")
    console.print(classes)
    numbers = Table("", title="sizes in pixels", title_justify="left")
    for column in ("least", "quarter", "median", "three quarters", "most"):
        numbers.add_column(column, justify="right")
    for title, values in (
        ("picture width", counted.picture_widths),
        ("picture height", counted.picture_heights),
        ("box side (root of width x height)", counted.box_sides),
        ("box height over width", counted.box_height_over_width),
        ("boxes in a picture", counted.boxes_per_picture),
    ):
        numbers.add_row(title, *(f"{value:.3g}" if value < 10 else f"{value:,.0f}" for value in values))
    console.print(numbers)
    typer.echo(f"empty pictures: {counted.empty_pictures:,} of {counted.pictures:,}")
    typer.echo(
        f"boxes by COCO's areas: {counted.small:,} small (below 32 x 32), {counted.medium:,} medium, "
        f"{counted.large:,} large (from 96 x 96)"
    )
