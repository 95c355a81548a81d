"""The command `rcnn`.

How to add a command: write `rcnn/cli/NAME.py` and put it into `COMMANDS`. A single command is a function `command`
whose parameters are typer's; a group is `app = typer.Typer(add_completion=False, rich_markup_mode=None)`. The module
is imported when its command is used, never for `rcnn --help`; in it, import torch and rcnn within the functions. Let
an `RcnnError` pass: here, and nowhere else, it becomes a message and an exit code (`raise typer.Exit(2)` for others).
What was asked for goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from rcnn import __version__
from rcnn.cli.processes import is_first_to_say, leave_group, was_left_by_another
from rcnn.errors import Problem, RcnnError, SetupError


@dataclass(frozen=True)
class CommandEntry:
    """Where a command lives, and its line in `rcnn --help`."""

    module: str
    help: str


COMMANDS: dict[str, CommandEntry] = {
    "quickstart": CommandEntry("rcnn.cli.quickstart", "Draw a data set, train, evaluate, look: no download, on a CPU."),
    "train": CommandEntry("rcnn.cli.train", "Train a recipe on a folder of annotated pictures."),
    "eval": CommandEntry("rcnn.cli.evaluate", "Evaluate a checkpoint: COCO AP, VOC mAP, per class."),
    "predict": CommandEntry("rcnn.cli.predict", "Detect objects in pictures and folders."),
    "proposals": CommandEntry("rcnn.cli.proposals", "Write a detector's proposals to a file, and judge proposals."),
    "data": CommandEntry("rcnn.cli.data", "Check, count, convert and fetch data sets."),
    "convert": CommandEntry("rcnn.cli.convert", "Turn another system's checkpoint into one of ours."),
    "recipes": CommandEntry("rcnn.cli.recipes", "List, show, compare and check recipes."),
}


@dataclass
class Settings:
    """What the options before the command say."""

    traceback: bool


class LazyGroup(typer.core.TyperGroup):
    """A group that knows its commands by a table, and imports one only when it is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The name and help line alone: this is what help and completion ask for."""
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else typer.core.TyperCommand(cmd_name, help=entry.help, callback=_nothing)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself: this is what its use asks for."""
        name = args[0]
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, list(COMMANDS), n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            ctx.fail(f'There is no command "{name}".{hint}')
        return name, load_command(name), args[1:]


def _nothing() -> None:
    """Stands for a command that was not imported."""


def load_command(name: str) -> Any:
    """The command as click wants it. Errors: `SetupError` where this installation lacks its module."""
    entry = COMMANDS[name]
    try:
        module = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        if error.name != entry.module:
            raise
        remedy = "install a release of rcnn that has it"
        raise SetupError(Problem(where=f"rcnn {name}", given="not part of this installation", remedy=remedy)) from None
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name, help=module.command.__doc__ or entry.help)(module.command)
    command = typer.main.get_command(app)
    command.name = name
    return command


app = typer.Typer(
    cls=LazyGroup,
    name="rcnn",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # rich alone would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"rcnn {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error arose (or set RCNN_TRACEBACK=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Two-stage object detection: Faster R-CNN and its family, any one-stage detector as the first stage."""
    context.obj.traceback = context.obj.traceback or show_traceback


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, an `RcnnError`'s own code (1), 2 wrong usage, 130 Ctrl-C."""
    settings = Settings(traceback=os.environ.get("RCNN_TRACEBACK", "") not in {"", "0"})
    # PyTorch asks Linux for huge pages for large tensors; read when it is imported. First touches of fresh memory are
    # half of RoIAlign's time otherwise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.exit(_exit_code(arguments, settings))


def _exit_code(arguments: Sequence[str] | None, settings: Settings) -> int:
    try:
        return _run(arguments, settings)
    except RcnnError as error:
        if settings.traceback:
            traceback.print_exc()
        elif is_first_to_say(str(error)):
            print(f"Error: {error}", file=sys.stderr)
        leave_group(together=False)
        return error.exit_code
    except RuntimeError as error:
        if settings.traceback or not was_left_by_another(error):
            raise
        text = "another process of this training ended; its message says why"
        if is_first_to_say(text):
            print(f"Error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if settings.traceback:
            traceback.print_exc()
        return 130
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        return _after_broken_pipe()


def _run(arguments: Sequence[str] | None, settings: Settings) -> int:
    command = typer.main.get_command(app)
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name="rcnn", obj=settings)
    except SystemExit as end:
        sys.stdout.flush()
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _after_broken_pipe() -> int:
    """The reader of our output has gone (`rcnn recipes | head`): say nothing, now or when Python flushes at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    main()
