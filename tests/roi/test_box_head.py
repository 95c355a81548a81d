"""Heads of the second stage against torchvision's, live."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead

from rcnn.roi.box_head import BoxPredictor, ConvFCHead, TwoFCHead

POOLED = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def test_two_layers_are_torchvisions() -> None:
    theirs = TwoMLPHead(4 * 9, 8)
    ours = TwoFCHead(in_channels=4, pooled_size=3, features=8)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(POOLED), theirs(POOLED))
    assert ours.out_features == 8


def test_convolutions_are_torchvisions() -> None:
    theirs = FastRCNNConvFCHead((4, 3, 3), [6, 6], [8], norm_layer=nn.BatchNorm2d)
    ours = ConvFCHead(in_channels=4, pooled_size=3, make_norm=nn.BatchNorm2d, num_convs=2, channels=6, features=8)
    # 0 and 1 are convolutions, 2 flattens, 3 is fully connected.
    names = {"0.": "convs.0.", "1.": "convs.1.", "3.": "fc."}
    ours.load_state_dict({names[name[:2]] + name[2:]: value for name, value in theirs.state_dict().items()})
    torch.testing.assert_close(ours(POOLED), theirs(POOLED))


def test_no_convolutions() -> None:
    head = ConvFCHead(in_channels=4, pooled_size=3, make_norm=None, num_convs=0, features=8)
    assert head(POOLED).shape == (5, 8)


def test_without_norm_a_convolution_has_a_bias() -> None:
    head = ConvFCHead(in_channels=4, pooled_size=3, make_norm=None, num_convs=1, channels=6)
    assert head.get_parameter("convs.0.0.bias").shape == (6,)


def test_dropout_is_for_training() -> None:
    head = TwoFCHead(in_channels=4, pooled_size=3, features=64, dropout=0.5)
    assert not torch.equal(head(POOLED), head(POOLED))
    head.eval()
    assert torch.equal(head(POOLED), head(POOLED))


def test_a_start_of_known_width() -> None:
    head = TwoFCHead(in_channels=4, pooled_size=3, features=200, init_std=0.01)
    for layer in (head.fc6, head.fc7):
        assert abs(layer.weight.std().item() - 0.01) < 0.001
        assert not layer.bias.any()


def test_the_predictor_is_torchvisions() -> None:
    """Its background comes first, with a box of its own that nothing reads."""
    theirs = FastRCNNPredictor(8, 4)
    ours = BoxPredictor(in_features=8, num_classes=3)
    state = theirs.state_dict()
    ours.load_state_dict(
        {
            "classes.weight": torch.cat((state["cls_score.weight"][1:], state["cls_score.weight"][:1])),
            "classes.bias": torch.cat((state["cls_score.bias"][1:], state["cls_score.bias"][:1])),
            "deltas.weight": state["bbox_pred.weight"][4:],
            "deltas.bias": state["bbox_pred.bias"][4:],
        }
    )
    features = torch.randn(5, 8)
    logits, deltas = ours(features)
    their_logits, their_deltas = theirs(features)
    torch.testing.assert_close(logits, their_logits.roll(-1, dims=1))
    torch.testing.assert_close(deltas, their_deltas.reshape(5, 4, 4)[:, 1:])


def test_one_box_for_all_classes() -> None:
    logits, deltas = BoxPredictor(in_features=8, num_classes=3, regression="agnostic")(torch.randn(5, 8))
    assert (logits.shape, deltas.shape) == ((5, 4), (5, 1, 4))


def test_no_region() -> None:
    logits, deltas = BoxPredictor(in_features=8, num_classes=3)(torch.zeros(0, 8))
    assert (logits.shape, deltas.shape) == ((0, 4), (0, 3, 4))
