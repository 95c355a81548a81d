"""MMDetection's data preprocessor, backbones and necks as ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from rcnn.recipes.mmdetection.ledger import Part
from rcnn.recipes.mmdetection.parts import DERIVED, FIXED
from rcnn.recipes.recipe import FPNSpec, ImageSpec, NeckSpec, ResNetSpec, SingleMapSpec

_BACKBONES = ("ResNet", "ResNeXt")
_DEPTHS = (18, 34, 50, 101)
_START = "how layers start that no file brings is fixed here"
_TORCHVISION = "torchvision://resnet"


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """Backbone and neck, and the strides of the maps that the heads see and of those that regions are pooled from."""

    backbone: ResNetSpec
    neck: NeckSpec
    strides_px: tuple[int, ...]
    pooled_strides_px: tuple[int, ...]


def image(part: Part, base: ImageSpec) -> ImageSpec:
    """`data_preprocessor` (3.x). `base` has the sizes."""
    part.only("type", "DetDataPreprocessor")
    part.ignore("there are no masks here", "pad_mask", "pad_seg", "mask_pad_value", "seg_pad_value")
    part.only("pad_value", 0)
    part.only("rgb_to_bgr", False)
    part.ignore(FIXED, "boxtype2tensor", "non_blocking")
    flipped = part.truth("bgr_to_rgb", False)
    spec = colours(part, base, rgb=flipped).model_copy(update={"divisor": part.count("pad_size_divisor", 1)})
    part.close()
    return spec


def colours(part: Part, base: ImageSpec, *, rgb: bool) -> ImageSpec:
    mean, std = part.numbers("mean", (0.0,) * 3), part.numbers("std", (1.0,) * 3)
    for key, triple in (("mean", mean), ("std", std)):
        if len(triple) != 3:
            part.refuse(key, "three numbers are wanted")
            return base
    if min(std) <= 0:
        part.refuse("std", "numbers above 0 are wanted")
        return base
    return base.model_copy(
        update={
            "channel_order": "rgb" if rgb else "bgr",
            "mean": tuple(map(float, mean)),
            "std": tuple(map(float, std)),
        }
    )


# ----------------------------------------------------------------------------------------------------------- backbones


def trunk(model: Part) -> Trunk:
    backbone_part = model.part("backbone")
    kind = backbone_part.kind()
    if kind not in _BACKBONES:
        raise backbone_part.fail("type", _BACKBONES)
    maps = backbone_part.wholes("out_indices", (0, 1, 2, 3))
    spec, strides_px = _resnet(backbone_part, kind, model.take("pretrained"))
    if not set(maps) <= set(range(len(strides_px))):
        raise backbone_part.fail("out_indices", [f"stages from 0 to {len(strides_px) - 1}"])
    given = tuple(strides_px[index] for index in maps)
    if model.peek("neck") is None:
        model.take("neck")
        if len(given) != 1:
            backbone_part.refuse("out_indices", "without a neck the heads see one map")
        return Trunk(
            backbone=spec, neck=SingleMapSpec(index=maps[0]), strides_px=given[:1], pooled_strides_px=given[:1]
        )
    if maps != (0, 1, 2, 3):
        backbone_part.refuse("out_indices", "the neck here takes all four maps, or those from start_level up")
    neck, strides_px = _fpn(model.part("neck"), strides_px)
    pooled = strides_px[:-1] if neck.extra == "pool" else strides_px
    return Trunk(backbone=spec, neck=neck, strides_px=strides_px, pooled_strides_px=pooled)


def _resnet(part: Part, kind: str, pretrained: object) -> tuple[ResNetSpec, tuple[int, ...]]:
    depth = part.whole("depth", 50)
    if depth not in _DEPTHS:
        raise part.fail("depth", [str(each) for each in _DEPTHS])
    stages = part.whole("num_stages", 4)
    if not 1 <= stages <= 4:
        raise part.fail("num_stages", ("1", "2", "3", "4"))
    dilation, strides_px = _strides(part, stages)
    part.ignore("a matter of memory", "with_cp")
    part.only("in_channels", 3)
    part.only("stem_channels", None, 64)
    part.only("base_channels", 64)
    part.only("conv_cfg", None)
    part.only("dcn", None)
    part.only("plugins", None)
    part.only("deep_stem", False)
    part.only("avg_down", False)
    if part.peek("dcn") is None:
        part.ignore("without deformable convolutions", "stage_with_dcn")
    part.ignore(_START, "zero_init_residual")
    style = part.text("style", "pytorch")
    if style not in {"pytorch", "caffe"}:
        part.refuse("style", "pytorch or caffe")
    norm, epsilon = _norm(part)
    spec = ResNetSpec(
        depth=cast(Literal[18, 34, 50, 101], depth),
        style="caffe" if style == "caffe" else "pytorch",
        dilation=dilation,
        norm=norm,
        norm_eps=epsilon,
        frozen_stages=min(max(part.whole("frozen_stages", -1) + 1, 0), 5),
        weights=_weights(part, pretrained, depth),
        **_cardinality(part, kind),
    )
    part.close()
    return spec, strides_px


def _cardinality(part: Part, kind: str) -> dict[str, int]:
    if kind != "ResNeXt":
        return {}
    return {"groups": part.whole("groups", 1), "group_width": part.whole("base_width", 4)}


def _strides(part: Part, stages: int) -> tuple[Literal[1, 2], tuple[int, ...]]:
    strides = part.numbers("strides", (1, 2, 2, 2)[:stages])
    dilations = part.numbers("dilations", (1, 1, 1, 1)[:stages])
    if (strides, dilations) == ((1, 2, 2, 1), (1, 1, 1, 2)):
        return 2, (4, 8, 16, 16)
    if (strides, dilations) != ((1, 2, 2, 2)[:stages], (1, 1, 1, 1)[:stages]):
        part.refuse("strides", "(1, 2, 2, 2), or with C5 dilated by two (1, 2, 2, 1)")
    return 1, (4, 8, 16, 32)[:stages]


Norm = Literal["frozen", "batch", "sync", "fixed_statistics"]


def _norm(part: Part) -> tuple[Norm, float]:
    """Whether the affine numbers are trained and the statistics move."""
    norm = part.part("norm_cfg")
    kind = norm.kind("BN")
    if kind not in {"BN", "SyncBN"}:
        norm.refuse("type", "a backbone's norm here is BN or SyncBN")
    trained, fixed = norm.truth("requires_grad", True), part.truth("norm_eval", True)
    epsilon = float(norm.number("eps", 1e-5))
    if not trained and not fixed:
        norm.refuse("requires_grad", "statistics that move while scale and shift stand still")
    norm.close()
    if fixed:
        return ("fixed_statistics" if trained else "frozen"), epsilon
    return ("sync" if kind == "SyncBN" else "batch"), epsilon


def _weights(part: Part, pretrained: object, depth: int) -> str | None:
    """What the backbone starts from: "imagenet" for torchvision's own, else the name that the config gives."""
    start = part.peek("init_cfg")
    name = part.take("pretrained", pretrained)
    if isinstance(start, list) or start is None:
        part.ignore(_START, "init_cfg")
    else:
        inner = part.part("init_cfg")
        if inner.kind() == "Pretrained":
            name = inner.take("checkpoint", None)
            inner.only("prefix", None, "backbone", "backbone.")  # mmpretrain's layout is read as it is
            inner.ignore(FIXED, "map_location")
            inner.close()
        else:
            inner.ignore(_START, *inner.section)
    if name is None or isinstance(name, str):
        return "imagenet" if name == f"{_TORCHVISION}{depth}" else name
    part.refuse("pretrained", "the name of a file of weights")
    return None


# --------------------------------------------------------------------------------------------------------------- necks

Extra = Literal["pool", "convs_on_p5", "convs_on_c5", "none"]


def _fpn(part: Part, strides_px: tuple[int, ...]) -> tuple[FPNSpec, tuple[int, ...]]:
    if part.kind() != "FPN":
        raise part.fail("type", ("FPN",))
    part.ignore(DERIVED, "in_channels")
    part.ignore(_START, "init_cfg")
    part.only("end_level", -1)
    part.only("no_norm_on_lateral", False)
    part.only("act_cfg", None)
    part.only("conv_cfg", None)
    part.only("upsample_cfg", {"mode": "nearest"})
    first = part.whole("start_level", 0)
    if not 0 <= first < len(strides_px):
        raise part.fail("start_level", [str(level) for level in range(len(strides_px))])
    used = strides_px[first:]
    extra, levels = _extra_levels(part, len(used))
    relu = part.truth("relu_before_extra_convs", False)
    norm = _neck_norm(part, extra)
    spec = FPNSpec(
        channels=part.whole("out_channels", 256),
        extra=extra,
        # Of two extra levels alone.
        p7_activation="none" if extra.startswith("convs") and not relu else "relu",
        first_map=first,
        norm=norm,
    )
    part.close()
    return spec, (*used, *(used[-1] * 2 ** (i + 1) for i in range(levels)))


def _extra_levels(part: Part, used: int) -> tuple[Extra, int]:
    """What makes the levels above the backbone's, and how many these are."""
    more = part.whole("num_outs", used) - used
    source = part.take("add_extra_convs", False)
    sources: dict[object, Extra] = {True: "convs_on_c5", "on_input": "convs_on_c5", "on_output": "convs_on_p5"}
    if more == 0:
        return "none", 0
    if more == 1 and source is False:
        return "pool", 1
    if more == 2 and isinstance(source, bool | str) and source in sources:
        return sources[source], 2
    part.refuse("num_outs", "one more level by pooling, or two more by add_extra_convs on_input or on_output")
    return "pool", 1


def _neck_norm(part: Part, extra: Extra) -> Literal["none", "batch", "sync"]:
    if part.peek("norm_cfg") is None:
        part.take("norm_cfg")
        return "none"
    norm = part.part("norm_cfg")
    kinds: dict[str, Literal["batch", "sync"]] = {"BN": "batch", "SyncBN": "sync"}
    kind = norm.kind()
    if kind not in kinds:
        norm.refuse("type", "a neck's norm here is BN or SyncBN")
    elif extra.startswith("convs"):
        norm.refuse("type", "P6 and P7 have no norm here")
    norm.only("requires_grad", True)
    norm.close()
    return kinds.get(kind, "none")
