"""Heads of the second stage: pooled features to class logits and box deltas.

Letters: R regions, C channels, S pooled size, D features, K classes, B = K or 1 boxes per region.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from rcnn.errors import Problem, SetupError
from rcnn.ops.linear import linear, linear_over_maps
from rcnn.roi.classification import Classification, SoftmaxClassification

# "per_class": a box for each class; "agnostic": one box for all.
BoxRegression = Literal["per_class", "agnostic"]


class TwoFCHead(nn.Module):
    """Two fully connected layers with ReLU, fc6 and fc7 (Fast R-CNN; on FPN with 1024 features, on VGG16 with 4096)."""

    def __init__(
        self,
        *,
        in_channels: int,
        pooled_size: int,
        features: int = 1024,
        dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.out_features = features
        self.dropout = dropout
        self.fc6 = nn.Linear(in_channels * pooled_size**2, features)
        self.fc7 = nn.Linear(features, features)
        if init_std is not None:
            for layer in (self.fc6, self.fc7):
                nn.init.normal_(layer.weight, std=init_std)
                nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        x = F.dropout(F.relu(linear_over_maps(self.fc6, pooled)), self.dropout, self.training)
        return F.dropout(F.relu(linear(self.fc7, x)), self.dropout, self.training)


class ConvFCHead(nn.Module):
    """`num_convs` 3x3 convolutions with norm and ReLU, then one fully connected layer (torchvision's v2)."""

    def __init__(
        self,
        *,
        in_channels: int,
        pooled_size: int,
        make_norm: Callable[[int], nn.Module] | None,
        num_convs: int = 4,
        channels: int = 256,
        features: int = 1024,
    ) -> None:
        super().__init__()
        self.out_features = features
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.ModuleList(_convolution(before, after, make_norm) for before, after in pairwise(widths))
        self.fc = nn.Linear(widths[-1] * pooled_size**2, features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        x = pooled
        for conv in self.convs:
            x = F.relu(conv(x))
        return F.relu(linear_over_maps(self.fc, x))


def _convolution(before: int, after: int, make_norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, padding=1, bias=make_norm is None)
    return nn.Sequential(conv) if make_norm is None else nn.Sequential(conv, make_norm(after))


class BoxPredictor(nn.Module):
    """Class logits (of K classes and background, the last, unless `classification` has others), deltas of B boxes."""

    def __init__(
        self,
        *,
        in_features: int,
        num_classes: int,
        regression: BoxRegression = "per_class",
        classification: Classification | None = None,
        class_std: float = 0.01,
        delta_std: float = 0.001,
    ) -> None:
        super().__init__()
        classification = classification or SoftmaxClassification()
        self.num_boxes = num_classes if regression == "per_class" else 1
        self.classes = nn.Linear(in_features, classification.num_logits(num_classes))
        self.deltas = nn.Linear(in_features, self.num_boxes * 4)
        for layer, std in ((self.classes, class_std), (self.deltas, delta_std)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.classes.bias, classification.initial_bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[R, D] to logits [R, K + 1 or K] and deltas [R, B, 4]."""
        return linear(self.classes, features), linear(self.deltas, features).reshape(-1, self.num_boxes, 4)

    def check_logits(self, expected: int) -> None:
        """Raise `SetupError` unless it has `expected` class logits: those of its stage's classification."""
        given = self.classes.out_features
        if given != expected:
            raise SetupError(
                Problem(
                    where="detector.roi, the predictor",
                    given=f"{given} class logits",
                    allowed=f"{expected}, which the stage's classification asks for",
                    remedy="build the predictor with the same classification",
                )
            )
