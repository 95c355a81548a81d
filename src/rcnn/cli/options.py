"""Options that several commands share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Device(enum.StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Precision(enum.StrEnum):
    """Of the arithmetic on this machine."""

    FLOAT32 = "float32"
    BF16 = "bf16"


CheckpointArgument = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of ours (.safetensors).")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="bf16 is faster, and moves boxes a little.")]
AllowUnmappedOption = Annotated[
    bool, typer.Option("--allow-unmapped", help="Take a .py config of MMDetection without what has no counterpart.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="PATH=VALUE", help="Changes, for example train.epochs=12.")
]
