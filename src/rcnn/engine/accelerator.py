"""Accelerate's `Accelerator` for a device and a precision: devices, processes, autocast, loss scaling."""

from __future__ import annotations

import os
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from rcnn.errors import Problem, SetupError

Precision = Literal["float32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]

MIXED_PRECISION = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(*, precision: Precision = "float32", device: Device = "auto") -> Accelerator:
    """One per process. Started by torchrun it joins the other processes (NCCL on GPUs, gloo on CPUs).

    Raises SetupError for a device that is not there, or a precision that it cannot do.
    """
    problems = []
    available = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        problems.append(Problem(where="device", given=f"{device} is not usable on this machine", allowed=there))
    on_cpu = device == "cpu" or not (available["cuda"] or available["mps"])
    if precision == "fp16" and on_cpu:
        given = "fp16 needs a GPU"
        problems.append(Problem(where="precision", given=given, allowed="float32, bf16", remedy="bf16 works on a CPU"))
    if problems:
        raise SetupError(problems)
    # Accelerate keeps one state per Python process and refuses a second training of another precision or device in it.
    AcceleratorState._reset_state(reset_partial_state=True)
    if on_cpu and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_process()))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return Accelerator(mixed_precision=MIXED_PRECISION[precision], cpu=on_cpu)


def _threads_per_process() -> int:
    """Torchrun sets OMP_NUM_THREADS itself for several processes; with one it leaves it to us."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
