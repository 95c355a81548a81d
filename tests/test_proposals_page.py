"""docs/proposals.md: its Python runs, and its commands are those of the command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rcnn.cli.main import load_command
from rcnn.data.shapes import draw_shapes_dataset

PAGE = (Path(__file__).parents[1] / "docs" / "proposals.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    draw_shapes_dataset(tmp_path / "quickstart/shapes", train_images=1, val_images=20)
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code, names)  # our own page
    out = capsys.readouterr().out
    assert out.startswith("20 pictures, ")
    assert "proposals by a grid\n000004.jpg (" in out
    several = names["several"]
    assert isinstance(several, list)
    assert len(several) == 10


@pytest.mark.parametrize("line", re.findall(r"^rcnn proposals .*$", PAGE, flags=re.MULTILINE))
def test_the_commands_of_the_page_are_understood(line: str) -> None:
    _, _, verb, *arguments = shlex.split(line)
    command = load_command("proposals").commands[verb]
    context = command.make_context(verb, arguments)
    assert context.params["data"]


def test_the_picture_of_the_page_is_there() -> None:
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", PAGE)
    assert (Path(__file__).parents[1] / "docs" / picture).is_file()
