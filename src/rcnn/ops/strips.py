"""A 1x1 convolution and the depthwise one after it, some rows at a time.

The expanded map between the two is the largest tensor of MobileNets and EfficientNets: as a whole it is written to and
read back from main memory, a strip of it stays in the processor's cache.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rcnn.ops.fused import FusedConv2d, FusedPointwise

# Of the expanded map. Smaller strips cost more calls than they save traffic.
_STRIP_BYTES = 8 << 20


class StripwiseDepthwise(nn.Module):
    """depthwise(expand(x)): a 1x1 convolution, and one with a kernel per channel that alone reads its result."""

    def __init__(self, *, expand: FusedPointwise, depthwise: FusedConv2d) -> None:
        super().__init__()
        self.expand = expand
        self.depthwise = depthwise
        geometry = depthwise.geometry
        self._kernel, self._stride, self._padding = depthwise.kernel[0], geometry.stride[0], geometry.padding[0]
        # For strips that touch neither the first row nor the last.
        self._inside = depthwise.walking(replace(geometry, padding=(0, geometry.padding[1])))

    @staticmethod
    def serves(expand: FusedPointwise, depthwise: FusedConv2d) -> bool:
        """Whether the two are a pair as described."""
        geometry = depthwise.geometry
        per_channel = geometry.groups == depthwise.out_channels == expand.out_channels
        return per_channel and geometry.dilation == (1, 1) and not geometry.same

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h2 w2"]:
        rows, columns = self.depthwise.geometry.output_size(x, self.depthwise.kernel)
        expanded_bytes = self.expand.out_channels * x.shape[2] * x.shape[3] * x.element_size()
        strips = min(-(-expanded_bytes // _STRIP_BYTES), rows)
        if strips <= 1 or not self.expand.uses_onednn:
            return self.depthwise(self.expand(x))
        shape = (len(x), self.depthwise.out_channels, rows, columns)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for image in range(len(x)):
            for strip in range(strips):
                first, last = strip * rows // strips, (strip + 1) * rows // strips
                out[image : image + 1, :, first:last] = self._rows(x[image : image + 1], first, last)
        return out

    def _rows(self, x: Float[Tensor, "1 c h w"], first: int, last: int) -> Float[Tensor, "1 o rows w2"]:
        """Rows `first` to `last` (excluded) of the result."""
        start, end = first * self._stride - self._padding, (last - 1) * self._stride + self._kernel - self._padding
        if start >= 0 and end <= x.shape[2]:
            return self._inside(self.expand(x[:, :, start:end]))
        # Padded above and below, though one of the two may be no border: what is wrong there is cut off.
        start = max(start, 0) // self._stride * self._stride
        skipped = first - start // self._stride
        return self.depthwise(self.expand(x[:, :, start:end]))[:, :, skipped : skipped + last - first]
