"""The anchors of a detectron2 model: what older files keep of them, and what a recipe of ours says.

Letters: A anchors per cell, S sizes, R ratios. Theirs are ordered size by size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.heads import RetinaNetSpec, RPNSpec
from rcnn.recipes.parts import AnchorSpec
from rcnn.recipes.recipe import GivenProposalsSpec, OneStageSpec, Recipe

_PATTERN = r"(?:proposal_generator\.)?anchor_generator\.cell_anchors\.(\d+)"
# RetinaNet's own: three sizes from four strides of the level up.
_RETINANET = AnchorSpec(
    sizes_px=tuple(tuple(4.0 * stride * 2 ** (third / 3) for third in range(3)) for stride in (8, 16, 32, 64, 128))
)


def anchors_of(recipe: Recipe) -> AnchorSpec:
    """Those of the recipe's dense head."""
    detector = recipe.detector
    if isinstance(detector, OneStageSpec):
        head = detector.head
    else:
        head = None if isinstance(detector.proposals, GivenProposalsSpec) else detector.proposals.head
    if isinstance(head, RPNSpec):
        return head.anchors
    return (head.anchors if isinstance(head, RetinaNetSpec) else None) or _RETINANET


def kept_anchors(tensors: Mapping[str, Tensor], usual: AnchorSpec) -> AnchorSpec | None:
    """What an older file keeps; `usual` where it is that, None where it keeps nothing.

    Raises `CheckpointError` for corners that are no grid of sizes and ratios around the cell's own corner.
    """
    levels = {int(match[1]): value for key, value in tensors.items() if (match := re.fullmatch(_PATTERN, key))}
    if not levels:
        return None
    found = [_grid(level, levels[level]) for level in sorted(levels)]
    ratios = found[0][1]
    if any(other != ratios for _, other in found):
        given = f"levels with {len({other for _, other in found})} sets of ratios"
        raise CheckpointError(Problem(where="cell_anchors", given=given, allowed="the same on each level"))
    sizes = tuple(of_level for of_level, _ in found)
    is_usual = ratios == usual.heights_over_widths and _near(sizes, usual.sizes_px)
    return usual if is_usual else AnchorSpec(sizes_px=sizes, heights_over_widths=ratios)


def _near(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> bool:
    expected = list(expected) * (len(found) if len(expected) == 1 else 1)
    return [len(of_level) for of_level in found] == [len(of_level) for of_level in expected] and all(
        abs(mine - theirs) < 1e-3
        for of_level, of_expected in zip(found, expected, strict=True)
        for mine, theirs in zip(of_level, of_expected, strict=True)
    )


def _grid(level: int, corners: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sizes and ratios of cell anchors [A, 4], the former in pixels to the ten-thousandth."""
    where = f"cell_anchors.{level}"
    if corners.ndim != 2 or corners.shape[1] != 4 or not len(corners):
        given = f"shape {tuple(corners.shape)}"
        raise CheckpointError(Problem(where=where, given=given, allowed="four corners for each anchor of a cell"))
    x1, y1, x2, y2 = corners.double().unbind(1)
    sizes, ratios = ((x2 - x1) * (y2 - y1)).sqrt(), (y2 - y1) / (x2 - x1)
    num_ratios = int((sizes - sizes[0]).abs().lt(1e-2 * sizes[0].abs()).sum())
    rounded_sizes = [round(size, 4) for size in sizes[::num_ratios].tolist()] if num_ratios else []
    rounded_ratios = [round(ratio, 4) for ratio in ratios[:num_ratios].tolist()]
    expected = _corners(rounded_sizes, rounded_ratios)
    if expected.shape != corners.shape or not torch.allclose(expected, corners.double(), atol=1e-2, rtol=1e-3):
        given = "corners that are no grid of sizes and ratios around a corner of the cell"
        raise CheckpointError(Problem(where=where, given=given, allowed="what DefaultAnchorGenerator makes, OFFSET 0"))
    return tuple(rounded_sizes), tuple(rounded_ratios)


def _corners(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    rows = []
    for size in sizes:
        for ratio in ratios:
            width = (size**2 / ratio) ** 0.5 if ratio > 0 else 0.0
            rows.append((-width / 2, -width * ratio / 2, width / 2, width * ratio / 2))
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
