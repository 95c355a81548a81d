from __future__ import annotations

import pytest

from rcnn.config.edit import edit
from rcnn.errors import RecipeError
from rcnn.recipes.catalogue import quickstart
from rcnn.recipes.loaders import build_resize, per_process
from rcnn.recipes.recipe import ImageSpec


def test_a_batch_is_shared_out_over_processes_and_passes() -> None:
    recipe = edit(quickstart(), {"train.batch_size": 12, "train.accumulate": 2})
    assert per_process(recipe, 3) == 2
    with pytest.raises(RecipeError, match=r"train\.batch_size: 12 pictures for 5 processes .*train\.batch_size=20"):
        per_process(recipe, 5)


def test_short_sides_of_the_training_replace_that_of_the_detector() -> None:
    image = ImageSpec(short_side=300)
    assert build_resize(image).short_sides == (300,)
    assert build_resize(image, (200, 250)).short_sides == (200, 250)
