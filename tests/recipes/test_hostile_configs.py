"""YAML that is damaged or made to harm: patches and recipes of ours, MindSpore's configs, recipes inside checkpoints.

Each is refused with an error of ours, or harmless and read.

Python configs are in tests/config/test_python_config.py, checkpoints of others in tests/weight_files.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from rcnn.config.text import to_yaml
from rcnn.engine.checkpoint import CheckpointMeta, read_meta, weights_to_bytes
from rcnn.errors import RcnnError
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.checkpoints import recipe_inside
from rcnn.recipes.resolve import resolve_recipe
from rcnn.records import ClassTable

PATCH = """base: faster_rcnn_resnet50_fpn
set:
  detector.proposals.head: {type: fcos}
  train.optimizer.lr: 0.01
  train.schedule.milestones: [0.6, 0.9]
  detector.proposals.train: {pre_nms: 2000, post_nms: 1000}
"""
MINDSPORE = """__BASE__: []
net: FasterRCNN
backbone: {name: det_resnet50, frozen_bn: False, fpn: {num_outs: 5, level_index: [0, 1, 2, 3]}}
rpn_head:
  anchor_generator: {aspect_ratios: [0.5, 1.0, 2.0], anchor_sizes: [[32], [64], [128], [256], [512]]}
  train_proposal: {pre_nms_top_n: 2000, nms_thresh: 0.7}
data:
  eval_transforms:
    item_transforms:
      - Resize: {target_size: [768, 1280], keep_ratio: True}
      - NormalizeImage: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
lr: {milestones: [8, 11], warmup_step: 500}
epochs: 12
"""
PIECES = (
    *(": ", "- ", "&a ", "*a", "<<: *a", "[", "]", "{", "}", "'", '"', "|\n", "? ", "\t", "#", "\0", "\x85", "\u2028"),
    *("!!python/object/apply:os.abort []", "!!binary x", "!!set {a}", "2001-01-01", "---\n", "%YAML 9.9\n", "!a "),
    *("~", ".inf", "-.inf", ".nan", "1e999", "9" * 5000, "0x" + "f" * 5000, "- - - - ", "&a [*a]", "&a {x: *a}"),
    *('"\\ud800"', '"\\0"', "..", "a.b.c", "!!int x", "!!float []", "!!str {}", "\n", "\n  ", "base: file.yaml\n"),
    *("__BASE__: file.yaml\n", "__BASE__: [nowhere.yml]\n", "set:\n", "\ud7ff", "\U0001f600", "-1", "true", "[]", "{}"),
)


def mutated(text: str, chance: random.Random) -> str:
    for _ in range(chance.randint(1, 4)):
        start, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        match chance.randrange(4):
            case 0:
                text = text[:start] + text[min(end, start + 30) :]
            case 1:
                text = text[:start] + chance.choice(PIECES) + text[start:]
            case 2:
                text = text[:end] + text[start:end] + text[end:]
            case _:
                text = text[:start] + chance.choice(PIECES) * chance.choice((1, 2, 300)) + text[min(end, start + 9) :]
    return text


def refused(path: Path, text: str) -> bool:
    """Whether it was; an error that is not ours ends the test."""
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        to_yaml(resolve_recipe(path, allow_unmapped=True).spec)
    except RcnnError as error:
        assert all(problem.where for problem in error.problems)
        return True
    return False


@pytest.mark.parametrize("text", [PATCH, MINDSPORE], ids=["patch", "MindSpore"])
def test_damage(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yaml"
    assert not refused(path, text)
    assert sum(refused(path, mutated(text, random.Random(seed))) for seed in range(60)) > 30


def laughs(first: str, depth: int) -> str:
    """Each line holds the one before ten times."""
    lines = ["a0: &a0 [1, 2]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth))]
    return first + "\n" + "\n".join(lines) + "\n"


HARM = {
    "deep list": "x: " + "[" * 20_000 + "]" * 20_000,
    "deep mapping": "x: " + "{a: " * 20_000 + "}" * 20_000,
    "deep dashes": "- " * 20_000 + "1",
    "without end": "set: &a {x: *a}\nnet: &b [*b]\nbackbone: *a\nrpn_head: *b\n",
    "laughs": laughs("base: faster_rcnn_resnet50_fpn", 12) + "set: {train.schedule.milestones: *a11}\n",
    "laughs there": laughs(MINDSPORE, 12) + "infer: {conf_threshold: *a11}\noptimizer: {momentum: *a11}\n",
    "a long number": "base: faster_rcnn_resnet50_fpn\nset: {train.epochs: " + "9" * 100_000 + "}\n",
    "a long number in sixteens": "base: faster_rcnn_resnet50_fpn\nset: {train.epochs: 0x" + "f" * 100_000 + "}\n",
    "no number": "base: faster_rcnn_resnet50_fpn\nset: {train.optimizer.lr: .nan}\n",
    "code": "base: !!python/object/apply:os.abort []\n",
    "itself": "base: file.yaml\n",
    "itself there": "__BASE__: file.yaml\n",
    "a null in a name": 'base: "a\\0.yaml"\n',
    "a null in a name there": '__BASE__: "a\\0.yml"\n',
    "a folder": "base: ../\n",
    "half a letter": 'base: "\\ud800.yaml"\n',
    "long names": "base: " + "a/" * 5000 + "b.yaml\n",
    "a long name": "base: " + "a" * 5000,
    "long names there": "__BASE__: " + "a" * 5000 + ".yml\n",
    "long path": "base: faster_rcnn_resnet50_fpn\nset: {" + "a." * 20_000 + "b: 1}\n",
}


@pytest.mark.parametrize("text", HARM.values(), ids=HARM.keys())
def test_harm(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path / "file.yaml", text)


@pytest.fixture(scope="module")
def own_text() -> str:
    return to_yaml(RECIPES["faster_rcnn_resnet50_fpn"]())


def test_the_recipe_inside_a_checkpoint(tmp_path: Path, own_text: str) -> None:
    path = tmp_path / "own.safetensors"
    texts = [mutated(own_text, random.Random(seed)) for seed in range(12)]
    for text in (*texts, HARM["deep list"], HARM["without end"], HARM["a long number"], laughs("", 12)):
        readable = text.encode("utf-8", "replace").decode()
        meta = CheckpointMeta(recipe=readable, classes=ClassTable(names=("a",), category_ids=(1,)))
        path.write_bytes(weights_to_bytes({"a": torch.ones(2)}, meta))
        try:
            recipe_inside(path, read_meta(path))
        except RcnnError as error:
            assert all(problem.where for problem in error.problems)
