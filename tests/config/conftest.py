"""A small tree of specs with every kind of field, for the tests of the recipe engine."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Lt
from pydantic import Field, model_validator

from rcnn.config.edit import Resolved, resolve
from rcnn.config.spec import Spec


class Rpn(Spec):
    type: Literal["rpn"] = "rpn"
    channels: int = Field(256, ge=1)
    thresholds: tuple[float, float] = (0.3, 0.7)


class Fcos(Spec):
    type: Literal["fcos"] = "fcos"
    centre_radius: Annotated[float, Gt(0)] = 1.5
    """In strides."""
    norm: Literal["none", "group"] = "group"


class Timm(Spec):
    type: Literal["timm"] = "timm"
    name: str


class Flip(Spec):
    type: Literal["flip"] = "flip"
    probability: float = 0.5


class Jitter(Spec):
    type: Literal["jitter"] = "jitter"
    strengths: tuple[float, ...] = (0.1, 0.1)


class Plain(Spec):
    """A spec without settings."""


class Ema(Spec):
    decay: Annotated[float, Ge(0), Lt(1)] = 0.999
    warm: bool = False


class Device(enum.Enum):
    CPU = "cpu"
    CUDA = "cuda"


class Detector(Spec):
    head: Rpn | Fcos | Timm = Rpn(channels=128)
    plain: Plain | None = None


class Train(Spec):
    epochs: Annotated[int, Ge(1)] = 12
    warm_epochs: Annotated[int, Ge(0)] = 0
    lr: float = 0.02
    ema: Ema | None = None
    sides: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    transforms: tuple[Flip | Jitter, ...] = ()
    note: str = ""
    tag: str | None = None
    start: Path | None = None
    device: Device = Device.CPU
    shuffle: bool = True
    size: int | tuple[int, int] = 640

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Train:
        if self.warm_epochs > self.epochs:
            raise ValueError(f"warm_epochs ({self.warm_epochs}) exceeds epochs ({self.epochs})")
        return self


class Toy(Spec):
    detector: Detector = Detector()
    train: Train = Train()


def small() -> Toy:
    """A small one."""
    return Toy(train=Train(epochs=3, ema=Ema()))


def large() -> Toy:
    """A large one."""
    return Toy(detector=Detector(head=Fcos(centre_radius=2.0)))


NAMED: dict[str, Callable[[], Toy]] = {"small": small, "large": large, "default": Toy}
HINTS = {"nms_thr": "detector.nms_iou"}


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """This module: its classes and `NAMED`."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def resolved() -> Callable[..., Resolved[Toy]]:
    """`resolved(source, *overrides)`."""

    def call(source: str | Path | Spec, *overrides: str) -> Resolved[Toy]:
        return resolve(source, spec_type=Toy, named=NAMED, overrides=overrides, hints=HINTS)

    return call


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """`write(name, text)`: a file in the test's folder."""

    def call(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return call


@pytest.fixture(scope="session")
def problems_in() -> Callable[..., Sequence[str]]:
    """`problems_in(function, *arguments)`: the texts of the problems that it raises."""
    from rcnn.errors import RecipeError

    def call(function: Callable[..., object], *arguments: object) -> Sequence[str]:
        with pytest.raises(RecipeError) as caught:
            function(*arguments)
        return [str(problem) for problem in caught.value.problems]

    return call
