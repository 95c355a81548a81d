"""Any timm model that gives feature maps, as a backbone."""

from __future__ import annotations

import copy
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import timm
import torch
from huggingface_hub import constants
from timm.layers.format import Format
from timm.layers.norm_act import BatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn

from rcnn.backbones.interface import AbstractBackbone
from rcnn.backbones.norm import SyncBatchNorm
from rcnn.errors import DownloadError, Problem, SetupError, nearest

TimmNorm = Literal["frozen", "batch", "sync"]
_CONNECT_SECONDS = 5


class TimmBackbone(AbstractBackbone):
    """The maps of `name` at strides 4 and coarser.

    `norm` is what becomes of its batch norms. `frozen_stages`: all that so many leading maps of the model depend on is
    not trained (1: all up to the map at stride 2, where the model has one). Starts from random numbers.
    Raises `SetupError` for a model that is not there or gives no maps.
    """

    def __init__(self, *, name: str, norm: TimmNorm = "frozen", frozen_stages: int = 0) -> None:
        super().__init__()
        body = _create(name)
        info = body.feature_info.get_dicts()
        _check_frozen_stages(name, frozen_stages, len(info))
        self.num_skipped = sum(entry["reduction"] < 4 for entry in info)
        self.channels = tuple(entry["num_chs"] for entry in info[self.num_skipped :])
        self.strides_px = tuple(entry["reduction"] for entry in info[self.num_skipped :])
        self.gives_channels_last = getattr(body, "output_fmt", Format.NCHW) == Format.NHWC
        frozen = _parameters_behind(body, range(frozen_stages))
        self.body: nn.Module = _CONVERSIONS[norm](body)
        for parameter_name, parameter in self.body.named_parameters():
            parameter.requires_grad_(parameter_name not in frozen)
        self.keep_maps(len(self.channels))

    def keep_maps(self, count: int) -> None:
        """timm's models cannot be cut everywhere: what only the other maps depend on stays, and is not trained."""
        self.channels, self.strides_px = self.channels[:count], self.strides_px[:count]
        used = _parameters_behind(self.body, range(self.num_skipped, self.num_skipped + count))
        for name, parameter in self.body.named_parameters():
            if name not in used:
                parameter.requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        maps = self.body(pixels)[self.num_skipped : self.num_skipped + len(self.channels)]
        return tuple(x.permute(0, 3, 1, 2) for x in maps) if self.gives_channels_last else tuple(maps)


def _create(name: str) -> Any:  # timm's feature models share attributes, but no class
    if not timm.is_model(name):
        raise SetupError(
            Problem(
                where="detector.backbone.name",
                given=f'timm has no model "{name}"',
                allowed=f"one of the {len(timm.list_models())} names that timm.list_models() gives",
                remedy=nearest(name, timm.list_models()),
            )
        )
    try:
        return timm.create_model(name, features_only=True)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        raise SetupError(
            Problem(
                where="detector.backbone.name",
                given=f'timm\'s "{name}" gives no feature maps ({error})',
                allowed="a model that timm can build with features_only=True",
            )
        ) from error


def imagenet_tensors(name: str) -> dict[str, Tensor]:
    """timm's own weights of the model's `body`, fetched where they are not at hand; else `DownloadError`."""
    try:
        with _hub_offline_where_unreachable():
            return timm.create_model(name, features_only=True, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise DownloadError(
            Problem(
                where="detector.backbone.weights",
                given=f'timm\'s weights of "{name}" could not be fetched ({error})',
                remedy="give a file with detector.backbone.weights=FILE (null starts from random numbers)",
            )
        ) from error


@contextmanager
def _hub_offline_where_unreachable() -> Iterator[None]:
    """Without a network the hub's client tries again for most of a minute: then it is asked for its cache alone."""
    hub = urllib.parse.urlparse(constants.ENDPOINT)
    before = constants.HF_HUB_OFFLINE
    # Behind a proxy a direct connection says nothing.
    if not urllib.request.getproxies():
        try:
            socket.create_connection((hub.hostname, hub.port or 443), timeout=_CONNECT_SECONDS).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _check_frozen_stages(name: str, frozen_stages: int, num_maps: int) -> None:
    if frozen_stages > num_maps:
        raise SetupError(
            Problem(
                where="detector.backbone.frozen_stages",
                given=str(frozen_stages),
                allowed=f'0 to {num_maps}: timm\'s "{name}" gives {num_maps} maps',
            )
        )


def _parameters_behind(body: Any, maps: Iterable[int]) -> set[str]:
    """Names of the parameters that the maps of those numbers depend on: those through which a gradient flows.

    Found by a run without numbers, since no name or order says it for every model.
    """
    model = copy.deepcopy(body).requires_grad_().eval().to("meta")
    size = body.pretrained_cfg["input_size"]
    with torch.enable_grad(), torch.device("meta"):
        outputs = model(torch.zeros(1, *size))
        total = sum((outputs[index].sum() for index in maps), start=torch.zeros(()))
    if not total.requires_grad:
        return set()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


class SyncBatchNormAct(SyncBatchNorm):
    """A timm batch norm, with its dropout and activation, on the statistics of all processes."""

    def __init__(self, norm: nn.BatchNorm2d, *, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.drop, self.act = drop, act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _synchronise(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        synchronised = (
            SyncBatchNormAct(module, drop=module.get_submodule("drop"), act=module.get_submodule("act"))
            if isinstance(module, BatchNormAct2d)
            else SyncBatchNorm(module.num_features, eps=module.eps, momentum=module.momentum)
        )
        synchronised.load_state_dict(module.state_dict())
        return synchronised
    for name, child in module.named_children():
        module.add_module(name, _synchronise(child))
    return module


def _unchanged(module: nn.Module) -> nn.Module:
    return module


_CONVERSIONS: dict[TimmNorm, Callable[[nn.Module], nn.Module]] = {
    "frozen": freeze_batch_norm_2d,
    "batch": _unchanged,
    "sync": _synchronise,
}
