"""Devices and precisions, and several trainings in one Python process."""

from __future__ import annotations

import pytest
import torch

from rcnn.engine.accelerator import build_accelerator
from rcnn.errors import SetupError


def test_precisions_follow_each_other_in_one_process() -> None:
    for precision, name in (("float32", "no"), ("bf16", "bf16"), ("float32", "no")):
        accelerator = build_accelerator(precision=precision, device="cpu")  # pyright: ignore[reportArgumentType]
        assert accelerator.mixed_precision == name
        assert accelerator.device == torch.device("cpu")
        with accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if name == "bf16" else torch.float32)


def test_what_cannot_be_is_said_at_once() -> None:
    with pytest.raises(SetupError, match="fp16 needs a GPU; allowed: float32, bf16"):
        build_accelerator(precision="fp16", device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(SetupError, match=r"device: cuda is not usable on this machine; allowed: auto, cpu"):
        build_accelerator(device="cuda")
