"""Weights as safetensors files that say what they are: recipe, classes, package version, step and metrics inside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

import rcnn
from rcnn.atomic_file import write_atomically
from rcnn.errors import CheckpointError, Problem, nearest
from rcnn.records import ClassTable
from rcnn.weight_files.safetensors_header import CONVERT, read_header, unusable

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint says about itself. `recipe` is the resolved recipe as YAML; `epoch` counts whole epochs."""

    recipe: str
    classes: ClassTable
    kind: str = "detector"
    version: str = rcnn.__version__
    step: int = 0
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_strings(self) -> dict[str, str]:
        """The header of a safetensors file holds strings only."""
        return {
            "format": "pt",
            "system": "rcnn",
            "kind": self.kind,
            "version": self.version,
            "recipe": self.recipe,
            "classes": json.dumps({"names": self.classes.names, "category_ids": self.classes.category_ids}),
            "step": str(self.step),
            "epoch": str(self.epoch),
            "metrics": json.dumps(dict(self.metrics)),
        }

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> CheckpointMeta:
        """The inverse of `to_strings`; KeyError, ValueError or TypeError where a part is missing or malformed."""
        classes = json.loads(strings["classes"])
        return cls(
            recipe=strings["recipe"],
            classes=ClassTable(names=tuple(classes["names"]), category_ids=tuple(classes["category_ids"])),
            kind=strings["kind"],
            version=strings["version"],
            step=int(strings["step"]),
            epoch=int(strings["epoch"]),
            metrics=json.loads(strings["metrics"]),
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights on the CPU and what the file says about them."""

    state_dict: StateDict
    meta: CheckpointMeta


def save_weights(path: Path, state_dict: StateDict, meta: CheckpointMeta) -> None:
    """Writes the file as a whole or not at all: on a full disk a RunError, and the previous file stays."""
    write_atomically(path, weights_to_bytes(state_dict, meta))


def weights_to_bytes(state_dict: StateDict, meta: CheckpointMeta) -> bytes:
    """The content of a checkpoint file. Tensors under several names are written once per name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return safetensors.torch.save(tensors, meta.to_strings())


def read_meta(path: Path) -> CheckpointMeta:
    """What a checkpoint says about itself, from its header alone; raises CheckpointError."""
    header = read_header(path)
    strings = header.get("__metadata__", {})
    if strings.get("system") != "rcnn":
        raise unusable(path, "a safetensors file that was not written by rcnn", CONVERT)
    try:
        return CheckpointMeta.from_strings(strings)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        given = f"its description of itself is malformed ({type(error).__name__}: {error})"
        raise unusable(path, given, "take another copy of the file") from error


def read_weights(path: Path) -> Checkpoint:
    """Reads a checkpoint of ours; nothing in the file is executed. Raises CheckpointError for any other file."""
    meta = read_meta(path)
    try:
        # Into memory of our own: tensors that are mapped to the file would change, or end the process, with the file.
        state_dict = safetensors.torch.load_file(path, device="cpu", backend="pread")
    except (safetensors.SafetensorError, OSError) as error:
        raise unusable(path, f"damaged ({error})", "take another copy of the file") from error
    return Checkpoint(state_dict=state_dict, meta=meta)


def load_into(module: nn.Module, state_dict: StateDict) -> None:
    """Copies weights into a module of exactly the same keys and shapes; a module on the meta device takes the tensors.

    Otherwise nothing is copied and a CheckpointError lists every missing, unexpected and differently shaped tensor.
    """
    own = module.state_dict()
    problems = list(differences(own, state_dict))
    if problems:
        raise CheckpointError(problems)
    if any(tensor.is_meta for tensor in own.values()):
        taken = {name: state_dict[name].to(tensor.dtype) for name, tensor in own.items()}
        module.load_state_dict(taken, strict=True, assign=True)
    else:
        module.load_state_dict(state_dict, strict=True)


def differences(expected: StateDict, given: StateDict) -> Iterator[Problem]:
    """Every key that only one of the two has, and every shape that differs."""
    missing = [name for name in expected if name not in given]
    for name in missing:
        yield Problem(where=name, given="missing in the checkpoint", allowed=f"shape {_shape(expected[name])}")
    for name in given:
        if name not in expected:
            hint = nearest(name, missing) if len(missing) <= 50 else ""
            yield Problem(where=name, given="in the checkpoint, but unknown to the detector", remedy=hint)
        elif given[name].shape != expected[name].shape:
            yield Problem(where=name, given=f"shape {_shape(given[name])}", allowed=f"shape {_shape(expected[name])}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
