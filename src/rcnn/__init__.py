"""Two-stage object detection on PyTorch: Faster R-CNN and its family, any one-stage detector as the first stage.

predictor = rcnn.load("runs/cells/checkpoints/best.safetensors")
detections = predictor.predict("picture.jpg")[0]

recipe = rcnn.recipe("faster_rcnn_resnet18_fpn", "train.epochs=12")
result = rcnn.train(recipe, run_folder="runs/cells", data="cells")
evaluation = rcnn.evaluate("runs/cells/checkpoints/best.safetensors", data="cells")

report = rcnn.convert("model_final.pth", "ours.safetensors")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rcnn.converters.convert import ConversionReport
    from rcnn.engine.accelerator import Device
    from rcnn.predict import Precision, Predictor
    from rcnn.recipes.judging import Evaluation
    from rcnn.recipes.recipe import Recipe
    from rcnn.recipes.training import TrainResult

# Imports are inside the functions: `import rcnn` and `rcnn --help` must not wait for torch.


def recipe(source: str | Path, *overrides: str) -> Recipe:
    """The recipe that a name or a file means, after `path=value` overrides. Raises `RecipeError` with every mistake."""
    from rcnn.recipes.resolve import resolve_recipe

    return resolve_recipe(source, overrides).spec


def train(
    recipe: Recipe | str | Path,
    *,
    run_folder: str | Path,
    data: str | Path | None = None,
    init_from: str | Path | None = None,
    device: Device = "auto",
) -> TrainResult:
    """Train a recipe on a folder of annotated pictures. See `rcnn.recipes.training.train`.

    `init_from`: a checkpoint, of ours or of another system, or its address on the web.
    """
    from rcnn.converters.starts import read_any_start
    from rcnn.recipes.resolve import resolve_recipe
    from rcnn.recipes.training import train as run

    return run(
        resolve_recipe(recipe).spec,
        run_folder=Path(run_folder),
        data=None if data is None else str(data),
        init_from=init_from,
        device=device,
        read=read_any_start,
    )


def load(path: str | Path, *, device: Device = "auto", precision: Precision = "float32") -> Predictor:
    """A checkpoint, ready to predict. See `rcnn.predict.load`."""
    from rcnn.predict import load as read

    return read(path, device=device, precision=precision)


def evaluate(
    checkpoint: str | Path,
    *,
    data: str | Path,
    split: str | None = None,
    device: Device = "auto",
    precision: Precision = "float32",
) -> Evaluation:
    """Every number of a checkpoint on a split of a data set. See `rcnn.predict.evaluate_checkpoint`."""
    from rcnn.predict import evaluate_checkpoint

    return evaluate_checkpoint(Path(checkpoint), data=str(data), split=split, device=device, precision=precision)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    system: str = "auto",
    recipe: str | Path | None = None,
    classes: str | None = None,
    overrides: Sequence[str] = (),
) -> ConversionReport:
    """Another system's checkpoint as one of ours. See `rcnn.converters.convert.convert_file`."""
    from rcnn.converters.convert import convert_file

    named = None if recipe is None else str(recipe)
    return convert_file(Path(source), Path(out), system=system, recipe=named, classes=classes, overrides=overrides)
