"""The shell of the command line: help without heavy imports, errors in one place, exit codes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types

import pytest
import typer

from rcnn import __version__
from rcnn.cli import main as shell
from rcnn.errors import Problem, RcnnError, RecipeError


class OddError(RcnnError):
    title = "odd"
    exit_code = 7


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        shell.main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@pytest.fixture
def give(monkeypatch):
    """`give(name, **attributes)`: a command of that name, in a module with these attributes."""

    def call(name: str, **attributes: object) -> None:
        module = types.ModuleType(f"given_{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(shell.COMMANDS, name, shell.CommandEntry(module.__name__, f"The line of {name}."))

    return call


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


def test_large_tensors_get_huge_pages_unless_the_user_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, wanted in ((None, "1"), ("0", "0")):
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
        if given is not None:
            monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given)
        with pytest.raises(SystemExit):
            shell.main(["--version"])
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == wanted


def test_help_lists_every_command_and_imports_none_of_them() -> None:
    code = "\n".join([
        "import sys",
        "from rcnn.cli.main import COMMANDS, main",
        "try:",
        "    main(['--help'])",
        "except SystemExit as end:",
        "    assert end.code == 0",
        "heavy = {'torch', 'torchvision', 'numpy', 'pydantic', 'yaml', 'rich', 'matplotlib', 'PIL'}",
        "own = {entry.module for entry in COMMANDS.values()}",
        "print('imported:', sorted((heavy | own) & set(sys.modules)))",
    ])  # fmt: skip
    found = python(code)
    assert found.stderr == ""
    assert "imported: []" in found.stdout
    for name, entry in shell.COMMANDS.items():
        assert name in found.stdout
        assert entry.help in found.stdout


def test_the_commands_of_the_design_are_listed() -> None:
    assert {"quickstart", "train", "eval", "predict", "recipes", "data", "convert"} <= set(shell.COMMANDS)


def test_each_module_that_is_there_has_a_command() -> None:
    for name, entry in shell.COMMANDS.items():
        try:
            importlib.import_module(entry.module)
        except ModuleNotFoundError as error:
            assert error.name == entry.module
            continue
        assert shell.load_command(name).name == name


def test_version(capsys) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"rcnn {__version__}\n"


def test_a_function_is_a_command(give, capsys) -> None:
    def command(path: str, count: int = 1) -> None:
        """What it does."""
        typer.echo(f"{path} {count}")

    give("draw", command=command)
    assert run("draw", "a", "--count", "3") == 0
    assert capsys.readouterr().out == "a 3\n"
    assert run("draw", "--help") == 0
    assert "What it does." in capsys.readouterr().out
    assert run("draw", "a", "--count", "x") == 2
    assert "rcnn draw" in capsys.readouterr().err


def test_a_group_is_a_command(give, capsys) -> None:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command()
    def one() -> None:
        typer.echo("one")

    @app.command()
    def two() -> None:
        raise typer.Exit(5)

    give("many", app=app)
    assert run("many", "one") == 0
    assert capsys.readouterr().out == "one\n"
    assert run("many", "two") == 5
    assert run("many", "three") == 2


def test_an_unknown_command_gets_the_nearest_name(capsys) -> None:
    assert run("trian") == 2
    assert 'There is no command "trian". Did you mean "train"?' in capsys.readouterr().err


def test_a_command_whose_module_is_absent_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setitem(shell.COMMANDS, "later", shell.CommandEntry("rcnn.cli.not_there", "Later."))
    assert run("--help") == 0
    assert "Later." in capsys.readouterr().out
    assert run("later") == 1
    assert "rcnn later: not part of this installation" in capsys.readouterr().err


def test_a_missing_dependency_is_not_taken_for_a_missing_command(monkeypatch) -> None:
    monkeypatch.setitem(shell.COMMANDS, "later", shell.CommandEntry("rcnn.not_there.later", "Later."))
    with pytest.raises(ModuleNotFoundError):
        shell.load_command("later")


def test_our_error_is_plain_text_with_its_exit_code(give, capsys) -> None:
    give("fail", command=raising(OddError([Problem(where="a", given="b"), Problem(where="c", given="d")])))
    assert run("fail") == 7
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "Error: odd (2 problems):\n  - a: b\n  - c: d\n"


@pytest.mark.parametrize("by", ["option", "variable", "neither"])
def test_a_traceback_is_shown_where_it_is_asked_for(give, capsys, monkeypatch, by) -> None:
    monkeypatch.setenv("RCNN_TRACEBACK", "1" if by == "variable" else "")
    give("fail", command=raising(RecipeError(Problem(where="a", given="b"))))
    assert run(*(["--traceback"] if by == "option" else []), "fail") == 1
    assert ("Traceback" in capsys.readouterr().err) == (by != "neither")


def test_other_errors_are_bugs_and_pass(give) -> None:
    give("fail", command=raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        shell.main(["fail"])


def test_ctrl_c_exits_with_130(give, capsys) -> None:
    give("wait", command=raising(KeyboardInterrupt()))
    assert run("wait") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_broken_pipe_is_quiet() -> None:
    code = "\n".join([
        "import sys, types",
        "from rcnn.cli import main as shell",
        "module = types.ModuleType('given')",
        "def command():",
        "    for line in range(SIZE): print(line)",
        "module.command = command",
        "sys.modules['given'] = module",
        "shell.COMMANDS['pour'] = shell.CommandEntry('given', '')",
        "shell.main(['pour'])",
    ])  # fmt: skip
    for size in ("3", "100000"):  # fits the buffer, and fails only at the last flush; does not fit
        process = subprocess.Popen(
            [sys.executable, "-c", code.replace("SIZE", size)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        process.stderr.close()
        assert process.wait() == 1
        assert said == b""
