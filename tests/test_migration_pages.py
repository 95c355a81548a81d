"""docs/migrate-*.md: their commands are understood by the command line, and the settings they name exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from rcnn.cli.main import load_command
from rcnn.recipes.resolve import resolve_recipe

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("migrate-*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_page_are_understood(page: str) -> None:
    lines = re.findall(r"^(?:torchrun .* -m )?rcnn (.*)$", (DOCS / page).read_text(), flags=re.MULTILINE)
    assert lines
    for line in lines:
        verb, *arguments = shlex.split(line)
        command = load_command(verb)
        if isinstance(command, typer.core.TyperGroup):
            inner, *arguments = arguments
            command = command.commands[inner]
        context = command.make_context(verb, arguments, resilient_parsing=False)
        assert context.params


def test_every_setting_in_the_table_of_torchvisions_flags_exists() -> None:
    table = (DOCS / "migrate-torchvision.md").read_text().split("## The flags of the reference script")[1]
    settings = re.findall(r"`((?:data|train|detector)\.[^`]*=[^`]*)`", table.replace("=FILE`", "=a.pth`"))
    assert len(settings) > 15
    for setting in settings:
        resolve_recipe("faster_rcnn_resnet50_fpn", [setting])
