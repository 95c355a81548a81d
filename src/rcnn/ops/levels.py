"""Applies an operator for one feature map to RoIs that live on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

# (feature map, RoIs as batch index and x1 y1 x2 y2 in feature cells) -> pooled RoIs
PoolOneLevel = Callable[[Tensor, Tensor], Tensor]


def pool_level_by_level(
    pool: PoolOneLevel,
    features: Sequence[Float[Tensor, "images channels height width"]],
    boxes_xyxy: Float[Tensor, "rois 4"],
    batch_index: Int[Tensor, " rois"],
    level_index: Int[Tensor, " rois"],
    scales: Sequence[tuple[float, float]],
) -> Float[Tensor, "rois channels out_height out_width"]:
    """Each RoI pooled from its level, in the order given; boxes in pixels, `scales` in cells per pixel (y, x).

    torchvision's operators compute in the precision of the maps and know no bfloat16: half precisions go through
    the precision of the boxes. While exporting, every RoI is pooled from every level, so that no shape depends on the
    boxes.
    """
    scale = torch.tensor([(x, y, x, y) for y, x in scales], dtype=boxes_xyxy.dtype, device=boxes_xyxy.device)
    rois = torch.cat([batch_index[:, None].to(boxes_xyxy.dtype), boxes_xyxy * scale[level_index]], dim=1)

    def pool_from(feature: Tensor, some: Tensor) -> Tensor:
        return pool(feature.to(rois.dtype), some).to(feature.dtype)

    if len(features) == 1:
        return pool_from(features[0], rois)
    if torch.compiler.is_exporting():
        pooled = pool_from(features[0], rois)
        for level, feature in enumerate(features[1:], start=1):
            pooled = torch.where((level_index == level)[:, None, None, None], pool_from(feature, rois), pooled)
        return pooled
    members = [(level_index == level).nonzero()[:, 0] for level in range(len(features))]
    parts = [pool_from(feature, rois[some]) for feature, some in zip(features, members, strict=True)]
    return torch.cat(parts)[torch.cat(members).argsort()]
