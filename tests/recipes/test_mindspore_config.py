"""MindSpore RCNN's YAML configs: the published one (as the oracle recorded it) and changed ones, with base files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rcnn.config.document import Table
from rcnn.errors import RecipeError
from rcnn.recipes.mindspore_catalogue import faster_rcnn_resnet50_fpn_mindspore
from rcnn.recipes.mindspore_config import is_mindspore_config, read_mindspore_config
from rcnn.recipes.resolve import resolve_recipe


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, Any]:
    manifest = json.loads((shared / "oracles/mindspore/faster_rcnn_resnet50_fpn/manifest.json").read_text())
    return manifest["config"]


@pytest.fixture
def folder(published: dict[str, Any], tmp_path: Path) -> Path:
    """As the system has it: one file over four, one of these in the folder above."""
    own = tmp_path / "faster_rcnn"
    own.mkdir()
    parts = {
        "data.yml": ["data"],
        "model.yml": ["net", "backbone", "rpn_head", "bbox_head"],
        "../optimizer_1x.yml": ["optimizer", "lr", "clip_grads", "epochs"],
        "../inference.yml": ["infer"],
    }
    for name, keys in parts.items():
        (own / name).write_text(yaml.safe_dump({key: published[key] for key in keys}))
    (own / "config.yml").write_text(f"__BASE__: {json.dumps(list(parts))}\n")
    return own


def test_the_published_config_is_the_named_recipe(folder: Path) -> None:
    translation = read_mindspore_config(folder / "config.yml")
    assert not translation.unmapped
    named = faster_rcnn_resnet50_fpn_mindspore()
    found = translation.recipe
    # It was recorded without the ImageNet weights, and says where its data are.
    changes = {"expected", "source", "data", "detector"}
    assert found.model_dump(exclude=changes) == named.model_dump(exclude=changes)
    mine, theirs = found.detector.model_dump(), named.detector.model_dump()
    assert (mine["backbone"].pop("weights"), theirs["backbone"].pop("weights")) == (None, "imagenet")
    assert (mine["proposals"]["head"].pop("channels"), theirs["proposals"]["head"].pop("channels")) == (256, None)
    assert mine == theirs
    assert (found.data.path, found.data.workers) == ("/data1/mindspore_dataset/coco2017", 4)
    assert any("model.yml:" in line and "test_proposal.pre_nms_top_n" in line for line in translation.lines())


def test_it_is_taken_where_a_recipe_is(folder: Path) -> None:
    resolved = resolve_recipe(folder / "config.yml", ["train.epochs=3"])
    assert resolved.spec.detector.image.canvas == (768, 1280)
    assert resolved.spec.train.epochs == 3
    # And as the base of a patch of ours.
    (folder / "mine.yaml").write_text("base: config.yml\nset:\n  train.optimizer.lr: 0.005\n")
    assert resolve_recipe(folder / "mine.yaml").spec.train.optimizer.lr == 0.005


def test_the_last_writer_wins(folder: Path) -> None:
    (folder / "own.yml").write_text(
        "__BASE__: config.yml\n"
        "backbone:\n  name: det_resnet101\n  frozen_bn: True\n  fpn: {upsample_mode: nearest}\n"
        "rpn_head:\n  train_proposal: {pre_nms_top_n: 500}\n"
        "optimizer: {filter_bias_and_bn: False}\n"
        "lr: {milestones: [16, 22], warmup_step: 0}\nepochs: 24\nlr_init: 0.01\n"
    )
    recipe = read_mindspore_config(folder / "own.yml").recipe
    detector, train = recipe.detector, recipe.train
    assert (detector.backbone.depth, detector.backbone.norm, detector.neck.upsampling) == (101, "frozen", "nearest")
    assert (detector.proposals.train.pre_nms, detector.proposals.test.pre_nms) == (500, 500)
    assert detector.proposals.train.post_nms == 1000  # the rest of the mapping stays
    assert train.schedule.milestones == (16 / 24, 22 / 24)
    assert (train.warm_up, train.optimizer.norm_weight_decay, train.optimizer.lr) == (None, None, 0.01)


def test_pixels_that_were_scaled_before(folder: Path) -> None:
    text = (
        "__BASE__: config.yml\ndata:\n  {split}_transforms:\n    item_transforms:\n"
        "      - Resize: {{target_size: 640, keep_ratio: True}}\n"
        "      - NormalizeImage: {{is_scale: False, mean: [103.53, 116.28, 123.675], std: [57.0, 57.0, 58.0]}}\n"
        "      - TransposeImage: {{bgr2rgb: True}}\n"
    )
    (folder / "eval.yml").write_text(text.format(split="eval"))
    with pytest.raises(RecipeError) as caught:
        read_mindspore_config(folder / "eval.yml")
    # Those of training are others now.
    assert {problem.allowed for problem in caught.value.problems[:-1]} == {"that of eval_transforms"}
    image = read_mindspore_config(folder / "eval.yml", allow_unmapped=True).recipe.detector.image
    assert (image.canvas, image.mean, image.channel_order) == ((640, 640), (103.53, 116.28, 123.675), "bgr")


def test_what_has_no_counterpart(folder: Path) -> None:
    (folder / "own.yml").write_text(
        "__BASE__: config.yml\n"
        "net: MaskRCNN\n"
        "mask_head:\n  resolution: 14\n"
        "backbone:\n  name: det_resnext50_32x4d\n"
        "data:\n  train_transforms:\n    item_transforms:\n      - RandomHSV: {hgain: 0.1}\n"
        "lr: {milestones: soon}\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_mindspore_config(folder / "own.yml")
    *found, last = caught.value.problems
    own = folder / "own.yml"
    assert {problem.where for problem in found} == {
        f"{own}:2: net",
        f"{own}:4: mask_head.resolution",
        f"{own}:6: backbone.name",
        f"{own}:10: data.train_transforms.item_transforms.RandomHSV",
        f"{own}:11: lr.milestones",
    }
    assert last.given == "5 values have no counterpart here"
    assert "--allow-unmapped" in last.remedy
    assert len(read_mindspore_config(own, allow_unmapped=True).unmapped) == 5


def test_a_value_that_is_none(folder: Path) -> None:
    (folder / "own.yml").write_text("__BASE__: config.yml\nepochs: many\n")
    with pytest.raises(RecipeError, match=r"lr\.milestones"):
        read_mindspore_config(folder / "own.yml")
    (folder / "own.yml").write_text("__BASE__: config.yml\nbbox_head: {resolution: -7}\n")
    with pytest.raises(RecipeError, match=r"own\.yml:2"):
        read_mindspore_config(folder / "own.yml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__BASE__: own.yml\n", "bases of each other: own.yml -> own.yml"),
        ("__BASE__: [nowhere.yml]\n", "cannot be read"),
        ("__BASE__: {a: 1}\n", "no list of files"),
        ("__BASE__: [1]\n", "no list of files"),
        ("__BASE__: []\n", "no `net`"),
        ("__BASE__: []\nnet: [\n", "not YAML"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_mindspore_config(tmp_path / "own.yml")


def test_mappings_that_multiply(tmp_path: Path) -> None:
    """Each of 30 lines names the one before twice: a thousand million values, if they were counted out."""
    lines = ["__BASE__: []", "net: FasterRCNN", "a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 30)]
    (tmp_path / "own.yml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="more than 100000 values"):
        read_mindspore_config(tmp_path / "own.yml")


def test_which_files_are_such_configs() -> None:
    table = Table()
    assert not is_mindspore_config(table)
    assert not is_mindspore_config(None)
    table.update(net="FasterRCNN", backbone={}, rpn_head={})
    assert is_mindspore_config(table)
