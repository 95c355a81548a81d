"""VGG16 up to conv5_3."""

from __future__ import annotations

import torch
import torchvision

from rcnn.backbones.vgg import VGG16Backbone


def test_the_map_is_torchvisions_before_the_last_pooling() -> None:
    theirs = torchvision.models.vgg16(weights=None).features.eval()
    ours = VGG16Backbone().eval()
    ours.load_state_dict({f"features.{name}": value for name, value in theirs.state_dict().items()})
    pixels = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        (found,) = ours(pixels)
        torch.testing.assert_close(found, theirs[:30](pixels))
    # Four poolings, each rounding down: 40 -> 20 -> 10 -> 5 -> 2.
    assert found.shape == (1, 512, 2, 3)


def test_the_paper_freezes_four_convolutions() -> None:
    trained = [name for name, parameter in VGG16Backbone().named_parameters() if not parameter.requires_grad]
    # conv1_1, conv1_2, conv2_1, conv2_2
    assert trained == [f"features.{index}.{kind}" for index in (0, 2, 5, 7) for kind in ("weight", "bias")]
