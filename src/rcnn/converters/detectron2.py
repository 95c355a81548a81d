"""State dicts of detectron2's Faster R-CNN (FPN, C4, DC5), Cascade R-CNN and RetinaNet: how each key becomes ours.

Background is the last class in both systems. The anchors of a cell are ordered size by size there and ratio by ratio
here, so the rows of heads with several sizes change places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from rcnn.converters.detectron2_structure import RPN, Structure
from rcnn.converters.key_map import Added, Change, Dropped, KeyMap, Rule

_DROPPED = (
    Dropped(pattern=r"pixel_(mean|std)", reason="constants of the preprocessing: the recipe has them"),
    Dropped(
        pattern=r".*anchor_generator\.cell_anchors\.\d+",
        reason="constants of older files: the recipe has them",
    ),
    Dropped(
        pattern=r"roi_heads\.(mask|keypoint)_(head|pooler)\..*", reason="masks and key points, which are not found here"
    ),
    Dropped(pattern=r"(sem_seg_head|optimizer)\..*", reason="no part of a detector of boxes"),
)
_COUNTERS = Dropped(
    pattern=r"(backbone\.(bottom_up\.)?|roi_heads\.)(stem|res\d)\..*num_batches_tracked",
    reason="a frozen batch norm counts no batches",
)
_ADDED_COUNTER = "the file's batch norms are frozen and counted no batches"


def key_map_of(
    structure: Structure, *, num_ratios: int = 3, head_place: str = "head", frozen_norms: bool = True
) -> KeyMap:
    """The table of a detector.

    `num_ratios` is the number of the anchors' aspect ratios, which the keys do not tell from that of their sizes;
    `head_place` is where a one-stage head goes; `frozen_norms`: those of the backbone are to be frozen.
    """
    rules = [*_backbone_rules(structure), *_neck_rules(structure)]
    added: tuple[Added, ...] = ()
    if structure.architecture == "retinanet":
        rules += _retinanet_rules(structure, num_ratios, head_place)
        added = (_normalizer(head_place),)
    else:
        rules += [*_rpn_rules(structure, num_ratios), *_region_rules(structure)]
    dropped = (*_DROPPED, _COUNTERS) if frozen_norms else _DROPPED
    return KeyMap(rules=tuple(rules), dropped=dropped, added=added)


def with_counters(key_map: KeyMap, state: Mapping[str, Tensor]) -> KeyMap:
    """The table with a counter for each batch norm that has none, for frozen ones that go on to be trained."""
    places = [key.removesuffix("running_mean") for key in state if key.endswith(".running_mean")]
    missing = {f"{place}num_batches_tracked" for place in places} - state.keys()
    ours = key_map.to_ours({key: torch.tensor(0) for key in missing}).names.values()
    added = tuple(Added(ours=name, value=torch.tensor(0), reason=_ADDED_COUNTER) for name in ours)
    return KeyMap(rules=key_map.rules, dropped=key_map.dropped, added=(*key_map.added, *added))


def _normalizer(head_place: str) -> Added:
    return Added(
        ours=f"{head_place}.normalizer.mean",
        value=torch.tensor(100.0),
        reason="the mean number of positives starts anew: detectron2 does not save it",
    )


def _by_ratio(num_ratios: int, rows: int, of_anchor: int) -> Change:
    """Rows size by size to rows ratio by ratio, `of_anchor` of them together."""
    num_sizes = rows // of_anchor // num_ratios

    def exchange(value: Tensor, first: int, second: int) -> Tensor:
        return value.reshape(first, second, -1).transpose(0, 1).reshape(value.shape)

    return Change(
        forward=lambda value: exchange(value, num_sizes, num_ratios),
        backward=lambda value: exchange(value, num_ratios, num_sizes),
    )


def _backbone_rules(structure: Structure) -> Iterator[Rule]:
    body = structure.body
    yield Rule(theirs=f"{body}.stem.conv1.norm.{{}}", ours="backbone.bn1.{}")
    yield Rule(theirs=f"{body}.stem.conv1.{{}}", ours="backbone.conv1.{}")
    for stage in range(2, 6):
        theirs, ours = f"{body}.res{stage}", f"backbone.layer{stage - 1}"
        if structure.architecture == "c4" and stage == 5:
            theirs, ours = "roi_heads.res5", "roi.box_head.layer4"
        yield from _stage_rules(f"{theirs}.{{}}", f"{ours}.{{}}")


def _stage_rules(theirs: str, ours: str) -> Iterator[Rule]:
    yield Rule(theirs=f"{theirs}.shortcut.norm.{{}}", ours=f"{ours}.downsample.1.{{}}")
    yield Rule(theirs=f"{theirs}.shortcut.{{}}", ours=f"{ours}.downsample.0.{{}}")
    for number in (1, 2, 3):
        yield Rule(theirs=f"{theirs}.conv{number}.norm.{{}}", ours=f"{ours}.bn{number}.{{}}")
        yield Rule(theirs=f"{theirs}.conv{number}.{{}}", ours=f"{ours}.conv{number}.{{}}")


def _neck_rules(structure: Structure) -> Iterator[Rule]:
    for index, level in enumerate(structure.levels):
        for theirs, ours in (("fpn_lateral", "lateral"), ("fpn_output", "output")):
            yield Rule(theirs=f"backbone.{theirs}{level}.norm.{{}}", ours=f"neck.{ours}.{index}.1.{{}}")
            yield Rule(theirs=f"backbone.{theirs}{level}.{{}}", ours=f"neck.{ours}.{index}.0.{{}}")
    yield Rule(theirs="backbone.top_block.{}", ours="neck.{}")


def _rpn_rules(structure: Structure, num_ratios: int) -> Iterator[Rule]:
    ours = "proposals.head.tower"
    if structure.rpn_convs == 1:
        yield Rule(theirs=f"{RPN}.conv.{{}}", ours=f"{ours}.convs.0.{{}}")
    else:
        # With CONV_DIMS of more than one entry the convolutions are numbered by name.
        yield Rule(theirs=f"{RPN}.conv.conv{{}}.{{}}", ours=f"{ours}.convs.{{}}.{{}}")
    for output, name, of_anchor in (("objectness_logits", "classes", 1), ("anchor_deltas", "deltas", 4)):
        change = _by_ratio(num_ratios, structure.num_anchors * of_anchor, of_anchor)
        yield Rule(theirs=f"{RPN}.{output}.{{}}", ours=f"{ours}.{name}.{{}}", change=change)


def _region_rules(structure: Structure) -> Iterator[Rule]:
    for stage in range(structure.stages):
        number, roi = (f".{stage}", f"roi.stages.{stage}") if structure.stages > 1 else ("", "roi")
        head = f"roi_heads.box_head{number}"
        for conv in range(structure.box_convs):
            yield Rule(theirs=f"{head}.conv{conv + 1}.norm.{{}}", ours=f"{roi}.box_head.convs.{conv}.1.{{}}")
            yield Rule(theirs=f"{head}.conv{conv + 1}.{{}}", ours=f"{roi}.box_head.convs.{conv}.0.{{}}")
        layers = ("fc",) if structure.box_convs else ("fc6", "fc7")
        if structure.architecture != "c4":
            for index, layer in enumerate(layers, 1):
                yield Rule(theirs=f"{head}.fc{index}.{{}}", ours=f"{roi}.box_head.{layer}.{{}}")
        predictor = f"roi_heads.box_predictor{number}"
        yield Rule(theirs=f"{predictor}.cls_score.{{}}", ours=f"{roi}.predictor.classes.{{}}")
        yield Rule(theirs=f"{predictor}.bbox_pred.{{}}", ours=f"{roi}.predictor.deltas.{{}}")


def _retinanet_rules(structure: Structure, num_ratios: int, place: str) -> Iterable[Rule]:
    for theirs, ours in (("cls_subnet", "class_tower"), ("bbox_subnet", "box_tower")):
        for index in range(structure.tower_convs):
            yield Rule(theirs=f"head.{theirs}.{2 * index}.{{}}", ours=f"{place}.tower.{ours}.layers.{index}.0.{{}}")
    for output, name, of_anchor in (("cls_score", "classes", structure.num_classes), ("bbox_pred", "deltas", 4)):
        change = _by_ratio(num_ratios, structure.num_anchors * of_anchor, of_anchor)
        yield Rule(theirs=f"head.{output}.{{}}", ours=f"{place}.tower.{name}.{{}}", change=change)
