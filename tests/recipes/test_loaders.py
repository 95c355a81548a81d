from __future__ import annotations

import pytest

from rcnn.config.edit import edit
from rcnn.errors import RecipeError
from rcnn.recipes.catalogue import quickstart
from rcnn.recipes.loaders import build_resize, build_train_resize, per_process
from rcnn.recipes.recipe import DataSpec, ImageSpec, JitterSpec
from rcnn.transforms.geometry import Resize
from rcnn.transforms.jitter import LargeScaleJitter


def test_a_batch_is_shared_out_over_processes_and_passes() -> None:
    recipe = edit(quickstart(), {"train.batch_size": 12, "train.accumulate": 2})
    assert per_process(recipe, 3) == 2
    with pytest.raises(RecipeError, match=r"train\.batch_size: 12 pictures for 5 processes .*train\.batch_size=20"):
        per_process(recipe, 5)


def test_short_sides_of_the_training_replace_that_of_the_detector() -> None:
    image = ImageSpec(short_side=300)
    assert build_resize(image).short_sides == (300,)
    assert build_resize(image, (200, 250)).short_sides == (200, 250)


def test_short_sides_between_two_and_jitter() -> None:
    image = ImageSpec(short_side=300)
    between = build_train_resize(image, DataSpec(short_sides=(640, 800), short_side_draw="between"))
    assert isinstance(between, Resize)
    assert between.short_sides == tuple(range(640, 801))
    jitter = JitterSpec(short_side=1024, max_long_side=1024, factors=(0.1, 2.0), crop_px=1024)
    assert isinstance(build_train_resize(image, DataSpec(jitter=jitter)), LargeScaleJitter)
    with pytest.raises(RecipeError, match=r"data\.short_sides"):
        build_train_resize(image, DataSpec(jitter=jitter, short_sides=(640,)))
