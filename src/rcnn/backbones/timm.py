"""Any timm model that gives feature maps, as a backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import timm
import timm.layers
from torch import Tensor, nn

from rcnn.backbones.interface import AbstractBackbone, freeze
from rcnn.errors import Problem, SetupError, nearest

TimmNorm = Literal["frozen", "batch", "sync"]

_CONVERSIONS: dict[TimmNorm, Callable[[nn.Module], nn.Module]] = {
    "frozen": timm.layers.freeze_batch_norm_2d,
    "batch": lambda model: model,
    "sync": timm.layers.convert_sync_batchnorm,
}


class TimmBackbone(AbstractBackbone):
    """The maps of `name` at strides 4 and coarser.

    `norm` is what becomes of its batch norms. `frozen_stages` leading maps' modules are not trained (1: all up to the
    map at stride 2, where the model has one). `pretrained` fetches timm's ImageNet weights.
    """

    def __init__(
        self, *, name: str, norm: TimmNorm = "frozen", frozen_stages: int = 0, pretrained: bool = False
    ) -> None:
        super().__init__()
        body = _create(name, pretrained)
        info = [entry for entry in body.feature_info.get_dicts() if entry["reduction"] >= 4]
        self.channels = tuple(entry["num_chs"] for entry in info)
        self.strides_px = tuple(entry["reduction"] for entry in info)
        self.num_skipped = len(body.feature_info.get_dicts()) - len(info)
        freeze(*_leading_modules(body, frozen_stages))
        self.body = _CONVERSIONS[norm](body)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.body(pixels)[self.num_skipped :])


def _create(name: str, pretrained: bool) -> nn.Module:
    if not timm.is_model(name):
        raise SetupError(
            Problem(
                where="backbone.name",
                given=f'timm has no model "{name}"',
                allowed=f"one of the {len(timm.list_models())} names that timm.list_models() gives",
                remedy=nearest(name, timm.list_models()),
            )
        )
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        raise SetupError(
            Problem(
                where="backbone.name",
                given=f'timm\'s "{name}" gives no feature maps ({error})',
                allowed="a model that timm can build with features_only=True",
            )
        ) from error


def _leading_modules(body: nn.Module, frozen_stages: int) -> list[nn.Module]:
    """The modules that run up to the map number `frozen_stages`, in the order in which timm runs them."""
    if frozen_stages == 0:
        return []
    last = body.feature_info.get_dicts()[frozen_stages - 1]["module"]
    names = [name for name, _ in body.named_modules()]
    end = max(i for i, name in enumerate(names) if name == last or name.startswith(last + "."))
    modules = dict(body.named_modules())
    return [modules[name] for name in names[1 : end + 1] if not list(modules[name].children())]
