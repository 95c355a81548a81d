"""What an MMDetection file says beside its tensors: the version, the class names, and the text of the config.

The text (`meta['config']`, since 3.0 `meta['cfg']`) is a Python file of literals and `dict(...)`, all bases resolved;
it is read as data.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, cast

from rcnn.config.edit import edit
from rcnn.converters.interface import ForeignFile
from rcnn.converters.mmdet_recipes import Conventions, FCOSOptions, Style
from rcnn.converters.mmdet_versions import Version, version_of
from rcnn.recipes.mmdetection.config import Translation, read_mmdetection_config
from rcnn.recipes.recipe import OneStageSpec, ProposalsSpec, ResNetSpec

_LONGEST_TEXT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class FileMeta:
    """`version` is MMDetection's; None where the file does not say it (3.x, or a bare state dict)."""

    version: Version | None
    class_names: tuple[str, ...] | None
    config: str | None
    """The text of the config inside."""
    settings: Mapping[str, object]
    """Those of that text; empty without one that can be read."""

    @property
    def model(self) -> Mapping[str, object]:
        return _mapping(self.settings.get("model"))

    @property
    def head(self) -> Mapping[str, object]:
        """The dense head."""
        return _mapping(self.model.get("rpn_head") or self.model.get("bbox_head"))


def read_meta(file: ForeignFile) -> FileMeta:
    """Nothing is taken for granted: what is not there, or is something else, is left out."""
    meta = _mapping(file.meta.get("meta")) or file.meta
    version = version_of(meta.get("mmdet_version"))
    if version is None and version_of(meta.get("mmengine_version")) is not None:
        version = (3, 0)
    dataset = _mapping(meta.get("dataset_meta"))
    names = (_names(given) for given in (dataset.get("classes"), dataset.get("CLASSES"), meta.get("CLASSES")))
    config = meta.get("cfg") or meta.get("config")
    return FileMeta(
        version=version,
        config=config if isinstance(config, str) else None,
        class_names=next((found for found in names if found), None),
        settings=_settings(config),
    )


def recipe_inside(meta: FileMeta) -> Translation | None:
    """The recipe that the config inside means, without what has no counterpart; None without one that can be read.

    What it starts from, and where its data lie, is not part of it. Raises `RecipeError` where it is of a detector that
    is not built here.
    """
    # Its bases are resolved; one that names any would have files read that the user did not name.
    if not meta.model or meta.config is None or re.search(r"\b_base_\b", meta.config):
        return None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "the config inside.py"
        path.write_text(meta.config, encoding="utf-8", errors="replace")
        found = read_mmdetection_config(path, allow_unmapped=True)
    detector = found.recipe.detector
    changes: dict[str, object] = {
        "source": "the config inside its checkpoint",
        "data.path": None,
        "train.init_from": None,
    }
    if not isinstance(detector, OneStageSpec) and isinstance(detector.proposals, ProposalsSpec):
        changes["detector.proposals.init_from"] = None
    if isinstance(detector.backbone, ResNetSpec) and detector.backbone.weights != "imagenet":
        changes["detector.backbone.weights"] = None
    return replace(found, recipe=edit(found.recipe, changes))


def conventions_of(meta: FileMeta, *, style: Style, version_1: bool) -> Conventions:
    """What the config inside says; `style` where it says nothing of it."""
    backbone, neck, head = _mapping(meta.model.get("backbone")), _mapping(meta.model.get("neck")), meta.head
    # MMDetection 3 has the numbers in the model, 2 beside it.
    pixels = _mapping(meta.model.get("data_preprocessor")) or _mapping(meta.settings.get("img_norm_cfg"))
    to_rgb = pixels.get("bgr_to_rgb", pixels.get("to_rgb"))
    radius = head.get("center_sample_radius", 1.5)
    return Conventions(
        style=style_inside(meta) or style,
        mean=_triple(pixels.get("mean")),
        std=_triple(pixels.get("std")),
        channel_order=_order(to_rgb),
        trained_norms=_flag(_mapping(backbone.get("norm_cfg")).get("requires_grad")),
        version_1=version_1,
        relu_before_extra_convs=_flag(neck.get("relu_before_extra_convs")),
        fcos=FCOSOptions(
            norm_on_bbox=head.get("norm_on_bbox") is True,
            centerness_on_reg=head.get("centerness_on_reg") is True,
            center_sampling=head.get("center_sampling") is True,
            center_radius=float(radius) if isinstance(radius, (int, float)) and radius > 0 else 1.5,
        ),
    )


def style_inside(meta: FileMeta) -> Style | None:
    """What the config inside says of the backbone's style; None without one. `pytorch` is MMDetection's default."""
    backbone = _mapping(meta.model.get("backbone"))
    if not backbone:
        return None
    return "caffe" if backbone.get("style") == "caffe" else "pytorch"


def _order(to_rgb: object) -> Literal["rgb", "bgr"] | None:
    if not isinstance(to_rgb, bool):
        return None
    return "rgb" if to_rgb else "bgr"


def _mapping(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _triple(value: object) -> tuple[float, float, float] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    numbers = [float(number) for number in value if isinstance(number, (int, float))]
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None


def _names(value: object) -> tuple[str, ...] | None:
    """A single name is a text in some files."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Sequence) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    return None


def _settings(text: object) -> Mapping[str, object]:
    """The assignments of a config's text that are plain values."""
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
        return {}
    # Version 1 has the file's path on the first line.
    module = _parse(text) or _parse(f"#{text}")
    if module is None:
        return {}
    found: dict[str, object] = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                found[statement.targets[0].id] = _plain(statement.value)
            except (ValueError, TypeError, RecursionError, MemoryError):
                continue
    return found


def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _plain(node: ast.expr) -> object:
    """A literal, or `dict(...)` of such. Raises `ValueError` for anything else."""
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return {keyword.arg: _plain(keyword.value) for keyword in keywords if keyword.arg is not None}
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_plain(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {ast.literal_eval(key): _plain(x) for key, x in zip(keys, values, strict=True) if key is not None}
        case _:
            return ast.literal_eval(node)
