"""Reads a recorded case of a peer and compares arrays with it as the manifest says they were stored."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Oracle:
    """One case: `<shared>/oracles/<system>/<name>`."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())

    @cached_property
    def arrays(self) -> Any:
        return np.load(self.folder / "arrays.npz")

    @cached_property
    def fill(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("fill", self.folder.parents[1] / "fill.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @property
    def inputs(self) -> Path:
        return self.folder.parents[1] / "inputs"

    def state_dict(self) -> dict[str, Tensor]:
        """The peer's checkpoint, rebuilt."""
        return {key: torch.from_numpy(np.array(value)) for key, value in self.fill.build(self.manifest).items()}

    def full(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def check(self, name: str, value: Tensor, *, rtol: float = 1e-6, scale: float | None = None) -> None:
        """`value` agrees with what was recorded to `rtol` of the array's largest number (`scale` instead, if given)."""
        entry = self.manifest["arrays"][name]
        actual = value.detach().double().cpu().numpy()
        assert list(actual.shape) == entry["shape"], f"{name}: shape {list(actual.shape)}, recorded {entry['shape']}"
        scale = max(float(entry.get("absmax") or 0), 1e-12) if scale is None else scale
        for stored, mine in self._pairs(name, entry, actual):
            difference = float(np.abs(stored.astype(np.float64) - mine).max(initial=0.0))
            assert difference <= rtol * scale, f"{name}: differs by {difference}, allowed {rtol * scale}"
        if entry.get("mean") is not None and actual.size:
            assert abs(float(actual.mean()) - entry["mean"]) <= rtol * scale, f"{name}: mean"

    def check_rows(self, name: str, value: Tensor, start: int, *, rtol: float = 1e-6) -> None:
        """`check` of some of the rows of axis 0, those from `start` on: of one picture of a recorded batch.

        Only what was recorded of these rows is compared; at least one number must be.
        """
        entry = self.manifest["arrays"][name]
        rows = value.detach().double().cpu().numpy()
        assert list(rows.shape[1:]) == entry["shape"][1:], f"{name}: rows of {rows.shape[1:]}"
        assert start + len(rows) <= entry["shape"][0], f"{name}: more rows than recorded"
        scale, compared = max(float(entry.get("absmax") or 0), 1e-12), 0
        for places, stored in self._recorded_rows(name, entry):
            of_these = (places >= start) & (places < start + len(rows))
            mine = rows.reshape(len(rows), -1)
            if entry["stored"] == "sample":
                width = mine.shape[1]
                of_these = (places // width >= start) & (places // width < start + len(rows))
                mine = mine.reshape(-1)
                difference = np.abs(stored[of_these] - mine[places[of_these] - start * width])
            else:
                difference = np.abs(stored.reshape(len(stored), -1)[of_these] - mine[places[of_these] - start])
            compared += difference.size
            worst = float(difference.max(initial=0.0))
            assert worst <= rtol * scale, f"{name}: differs by {worst}, allowed {rtol * scale}"
        assert compared, f"{name}: nothing was recorded of the rows from {start}"

    def _recorded_rows(self, name: str, entry: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """What was recorded, with its row (flat place where single numbers were)."""
        total = entry["shape"][0]
        match entry["stored"]:
            case "full":
                return [(np.arange(total), self.arrays[name].astype(np.float64))]
            case "sample":
                return [(self.arrays[f"{name}@idx"], self.arrays[f"{name}@val"].astype(np.float64))]
            case "rows":
                head, tail = self.arrays[f"{name}@head"], self.arrays[f"{name}@tail"]
                return [(np.arange(len(head)), head), (np.arange(total - len(tail), total), tail)]
        raise AssertionError(entry["stored"])

    def _pairs(self, name: str, entry: dict[str, Any], actual: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        match entry["stored"]:
            case "full":
                return [(self.arrays[name], actual)]
            case "sample":
                return [(self.arrays[f"{name}@val"], actual.reshape(-1)[self.arrays[f"{name}@idx"]])]
            case "rows":
                head, tail = self.arrays[f"{name}@head"], self.arrays[f"{name}@tail"]
                return [(head, actual[: len(head)]), (tail, actual[len(actual) - len(tail) :])]
            case "stat":
                return []
        raise AssertionError(entry["stored"])
