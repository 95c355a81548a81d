"""The resolved text of every named recipe: a change to it is seen, and wanted, or it is a mistake.

`RCNN_UPDATE_GOLDEN=1 pytest tests/golden` writes the texts anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rcnn.config.text import from_yaml, to_yaml
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.recipe import Recipe

FOLDER = Path(__file__).parent / "recipes"


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_text_of_a_recipe_has_not_changed(name: str) -> None:
    path, text = FOLDER / f"{name}.yaml", to_yaml(RECIPES[name]())
    if os.environ.get("RCNN_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path.name} is missing: run RCNN_UPDATE_GOLDEN=1 pytest tests/golden"
    assert text == path.read_text(encoding="utf-8")
    assert from_yaml(text, Recipe) == RECIPES[name]()


def test_no_text_is_left_of_a_recipe_that_is_gone() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(RECIPES)
