"""RoIPool (Fast R-CNN, section 2.1) over all levels of a pyramid: torchvision's operator on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from jaxtyping import Float, Int
from torch import Tensor

from rcnn.ops.levels import pool_level_by_level


def roi_pool(
    features: Sequence[Float[Tensor, "images channels height width"]],
    boxes_xyxy: Float[Tensor, "rois 4"],
    batch_index: Int[Tensor, " rois"],
    level_index: Int[Tensor, " rois"],
    *,
    scales: Sequence[tuple[float, float]],
    output_size: int | tuple[int, int],
) -> Float[Tensor, "rois channels out_height out_width"]:
    """The largest feature in each bin of each RoI, from the RoI's own level; box corners are rounded to whole cells.

    Arguments as of `roi_align`. Differentiable with respect to the features.
    """
    size = (output_size, output_size) if isinstance(output_size, int) else output_size

    def pool(feature: Tensor, rois: Tensor) -> Tensor:
        return torchvision.ops.roi_pool(feature, rois, size, 1.0)

    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    boxes_xyxy = boxes_xyxy.detach().to(dtype)
    return pool_level_by_level(pool, features, boxes_xyxy, batch_index, level_index, scales)
