"""The pyramid against torchvision's, live, and its extra levels."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from rcnn.necks.fpn import FPN, ExtraLevels
from rcnn.necks.none import SingleMap

CHANNELS, STRIDES = (4, 6, 8), (4, 8, 16)
# Odd sizes: each map is rounded up from the one before.
MAPS = [
    torch.randn(2, c, size, size + 2, generator=torch.Generator().manual_seed(c))
    for c, size in zip(CHANNELS, (13, 7, 4), strict=True)
]
EXTRA = {
    "pool": LastLevelMaxPool(),
    "convs_on_p5": LastLevelP6P7(5, 5),
    "convs_on_c5": LastLevelP6P7(8, 5),
    "none": None,
}


def ours_from(theirs: FeaturePyramidNetwork, neck: FPN) -> FPN:
    names = {"inner_blocks": "lateral", "layer_blocks": "output", "extra_blocks.p6": "p6", "extra_blocks.p7": "p7"}
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    neck.load_state_dict(state)
    return neck


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_maps_are_torchvisions(extra: ExtraLevels, norm: type[nn.Module] | None) -> None:
    theirs = FeaturePyramidNetwork(list(CHANNELS), 5, extra_blocks=EXTRA[extra], norm_layer=norm)
    neck = FPN(in_channels=CHANNELS, in_strides_px=STRIDES, channels=5, extra=extra, make_norm=norm)
    expected = list(theirs(OrderedDict(enumerate(MAPS))).values())  # type: ignore[arg-type]
    found = ours_from(theirs, neck)(MAPS)
    assert len(found) == len(neck.strides_px)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("extra", "first_map", "strides", "num_roi_levels"),
    [
        ("pool", 0, (4, 8, 16, 32), 3),  # the pooled level is for anchors alone
        ("none", 0, (4, 8, 16), 3),
        ("convs_on_p5", 1, (8, 16, 32, 64), 4),
        ("convs_on_c5", 0, (4, 8, 16, 32, 64), 5),
    ],
)
def test_levels(extra: ExtraLevels, first_map: int, strides: tuple[int, ...], num_roi_levels: int) -> None:
    neck = FPN(in_channels=CHANNELS, in_strides_px=STRIDES, channels=5, extra=extra, first_map=first_map)
    assert (neck.strides_px, neck.num_roi_levels, neck.num_maps_used) == (strides, num_roi_levels, 3)
    assert [x.shape[1] for x in neck(MAPS)] == [5] * len(strides)


def test_p7_without_activation() -> None:
    """MMDetection's RetinaNet, ATSS and GFL. A convolution that copies the middle of its window shows P6's sign."""
    neck = FPN(in_channels=(1,), in_strides_px=(8,), channels=1, extra="convs_on_c5", p7_activation="none")
    with torch.no_grad():
        for conv in (neck.p6, neck.p7):
            conv.weight.zero_()
            conv.weight[0, 0, 1, 1] = 1
    x = torch.full((1, 1, 4, 4), -3.0)
    assert neck((x,))[-1].tolist() == [[[[-3.0]]]]
    neck.p7_activation = "relu"
    assert neck((x,))[-1].tolist() == [[[[0.0]]]]


@pytest.mark.parametrize(("index", "used"), [(0, 0), (1, 1), (-1, 2), (-2, 1)])
def test_a_single_map(index: int, used: int) -> None:
    neck = SingleMap(in_channels=CHANNELS, in_strides_px=STRIDES, index=index)
    assert (neck.channels, neck.strides_px) == (CHANNELS[used], (STRIDES[used],))
    assert neck.num_maps_used == used + 1
    # The backbone gives no more maps than are used.
    (found,) = neck(MAPS[: used + 1])
    assert found is MAPS[used]
