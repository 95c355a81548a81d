"""From what a user names (a recipe, a patch file, a recipe file) to the recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rcnn.config.edit import Resolved, resolve
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.mindspore_config import MindSporeTranslation, is_mindspore_config, read_mindspore_config
from rcnn.recipes.mmdetection.config import Translation, read_mmdetection_config
from rcnn.recipes.recipe import Recipe

# What the keys of MMDetection's configs are called here, its old names (`nms_thr`, `max_num`, ...) included.
MMDETECTION_KEYS = {
    "nms_thr": "detector.proposals.nms_iou (first stage) or detector.roi.nms_iou (detections)",
    "max_num": "detector.proposals.train.post_nms and detector.proposals.test.post_nms",
    "nms_across_levels": "detector.proposals.scope (level or joint)",
    "nms_pre": "detector.proposals.train.pre_nms and detector.proposals.test.pre_nms",
    "nms_post": "detector.proposals.train.post_nms and detector.proposals.test.post_nms",
    "max_per_img": "detector.roi.max_detections, or post_nms of detector.proposals.train and .test",
    "score_thr": "detector.roi.score_threshold",
    "min_bbox_size": "detector.proposals.min_side_px",
    "pos_iou_thr": "positive_iou of detector.proposals.head.matcher or detector.roi.matcher",
    "neg_iou_thr": "negative_iou of detector.proposals.head.matcher or detector.roi.matcher",
    "min_pos_iou": "low_quality_iou of detector.proposals.head.matcher or detector.roi.matcher",
    "pos_fraction": "positive_fraction of detector.proposals.head.sampler or detector.roi.sampler",
    "samples_per_gpu": "train.batch_size (over all processes)",
    "workers_per_gpu": "data.workers",
}


def resolve_recipe(
    source: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    allow_unmapped: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Resolved[Recipe]:
    """The recipe that a name, a file or a recipe means, after the `path=value` texts of the command line.

    A `.py` file is a config of MMDetection, read as data, a YAML file with MindSpore RCNN's keys one of its configs;
    `allow_unmapped` takes them without what has no counterpart. `tell` gets a line with file and line for each value of
    such a config, also of one that a patch is based on, that did not become part of the recipe.
    A checkpoint of ours (`.safetensors`) stands for the recipe inside.
    Errors: `RecipeError` with every mistake, `CheckpointError`.
    """
    if isinstance(source, (str, Path)) and Path(source).suffix == ".safetensors":
        source = _recipe_inside(Path(source))

    def taken(translation: Translation | MindSporeTranslation) -> Recipe:
        if tell is not None:
            for line in translation.lines():
                tell(line)
        return translation.recipe

    return resolve(
        source,
        spec_type=Recipe,
        named=RECIPES,
        overrides=overrides,
        hints=MMDETECTION_KEYS,
        python=lambda path: taken(read_mmdetection_config(path, allow_unmapped=allow_unmapped)),
        foreign=lambda path, data: (
            taken(read_mindspore_config(path, allow_unmapped=allow_unmapped)) if is_mindspore_config(data) else None
        ),
    )


def _recipe_inside(path: Path) -> Recipe:
    from rcnn.engine.checkpoint import read_meta
    from rcnn.recipes.checkpoints import recipe_inside

    return recipe_inside(path, read_meta(path))
