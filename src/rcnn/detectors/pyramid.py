"""What detectors on a pyramid of features share: pixels to feature maps.

Letters: N images, L levels.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

from torch import Tensor, nn

from rcnn.backbones.interface import AbstractBackbone
from rcnn.dense.interface import AbstractDenseHead
from rcnn.detectors.interface import AbstractDetector
from rcnn.errors import Problem, SetupError
from rcnn.necks.interface import AbstractNeck
from rcnn.records import ImageBatch, Levels, LevelShape
from rcnn.transforms.batching import ImageNormalizer


class AbstractPyramidDetector(AbstractDetector, ABC):
    """A detector whose heads stand on the maps of a backbone and a neck."""

    def __init__(self, *, normalizer: ImageNormalizer, backbone: AbstractBackbone, neck: AbstractNeck) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.backbone: nn.Module = backbone
        self.neck: nn.Module = neck
        self.strides_px = neck.strides_px
        self.num_roi_levels = neck.num_roi_levels

    def features(self, batch: ImageBatch) -> Levels:
        """The pyramid of a batch."""
        return self.levels(self.neck(self.backbone(self.normalizer(batch))), batch)

    def levels(self, maps: Sequence[Tensor], batch: ImageBatch) -> Levels:
        """The neck's maps of a batch with their geometry."""
        return Levels(
            maps=tuple(maps),
            shapes=tuple(
                LevelShape(height=x.shape[-2], width=x.shape[-1], stride_px=stride)
                for x, stride in zip(maps, self.strides_px, strict=True)
            ),
            padded_size=batch.padded_size,
            image_sizes=batch.sizes,
            image_scales=tuple(
                size.width / original.width for size, original in zip(batch.sizes, batch.original_sizes, strict=True)
            ),
            num_roi_levels=self.num_roi_levels,
        )


def refuse_misfit(head: AbstractDenseHead, neck: AbstractNeck) -> None:
    """Raises `SetupError` where a head was built for other maps than the neck gives."""
    built_for = head.misfit(neck.strides_px)
    if built_for is not None:
        raise SetupError(
            Problem(
                where=type(head).__name__,
                given=f"a head for {built_for}",
                allowed=f"one for the neck's {len(neck.strides_px)} maps, at strides "
                f"{', '.join(map(str, neck.strides_px))}",
                remedy="build it with strides_px=neck.strides_px, or anchors with a list of sizes for each map",
            )
        )
