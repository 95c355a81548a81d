"""Pictures in, detections in their own pixels out: a checkpoint with everything that it needs to be used.

Letter: D detections of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rcnn.data.folder import describe
from rcnn.data.image import read_image, upright_rgb
from rcnn.detectors.preparation import prepared_detector
from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.engine.accelerator import Device, build_accelerator
from rcnn.engine.evaluate import predict_all, to_original
from rcnn.engine.progress import AbstractProgress, PredictionCounter, SilentProgress
from rcnn.errors import ImageError, Problem, SetupError
from rcnn.recipes.checkpoints import LoadedDetector, read_detector
from rcnn.recipes.datasets import read_evaluation
from rcnn.recipes.judging import Evaluation, judge
from rcnn.recipes.loaders import build_loader_for_evaluation, build_resize
from rcnn.recipes.proposing import proposer_of
from rcnn.recipes.recipe import Recipe
from rcnn.records import ClassTable, Detections, ImageBatch, Proposals
from rcnn.transforms.batching import Sample, collate
from rcnn.transforms.geometry import EvalTransform, image_size, no_target

# A picture: a path, a PIL picture, or RGB pixels 0 to 255 as [H, W, 3] (NumPy) or [3, H, W] (torch).
Picture = str | Path | Image.Image | np.ndarray | Tensor

Precision = Literal["float32", "bf16"]

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A detector ready for use: its recipe and classes came with its weights."""

    detector: AbstractPyramidDetector
    recipe: Recipe
    classes: ClassTable
    device: torch.device
    dtype: torch.dtype

    def predict(self, pictures: Picture | Sequence[Picture]) -> list[Detections]:
        """Detections of each picture in its own pixels, best first. One picture may be given without a list.

        Raises `ImageError` for a picture that cannot be read.
        """
        return [self._predict_one(picture) for picture in _as_list(pictures)]

    def propose(self, pictures: Picture | Sequence[Picture]) -> list[Proposals]:
        """Class-agnostic proposals in each picture's own pixels, best first: the first stage's, or what a one-stage
        detector finds as if it knew no classes."""
        return [self._propose_one(picture) for picture in _as_list(pictures)]

    def _predict_one(self, picture: Picture) -> Detections:
        batch = self._batch(picture)
        with torch.inference_mode():
            found = self.detector.predict(batch.to(self.device))[0]
        return to_original(found, batch, 0).to("cpu")

    def _propose_one(self, picture: Picture) -> Proposals:
        batch = self._batch(picture)
        with torch.inference_mode():
            found = proposer_of(self.detector)(batch.to(self.device))[0]
        nothing = found.boxes_xyxy.new_zeros(len(found))
        boxes = Detections(boxes_xyxy=found.boxes_xyxy, scores=nothing, labels=nothing.long())
        moved = to_original(boxes, batch, 0)
        return Proposals(boxes_xyxy=moved.boxes_xyxy, scores=found.scores).to("cpu")

    def _batch(self, picture: Picture) -> ImageBatch:
        """One picture, resized as in the evaluation."""
        pixels = as_pixels(picture)
        image = self.recipe.detector.image
        resized, target = EvalTransform(resize=build_resize(image))(pixels, no_target())
        sample = Sample(image=resized, target=target, original_size=image_size(pixels), image_id=0)
        return collate([sample], divisor=image.canvas or image.divisor)[0]


def load(path: str | Path, *, device: Device = "auto", precision: Precision = "float32") -> Predictor:
    """A checkpoint of ours, ready for use. On a CPU the detector is prepared: norms folded, weights in oneDNN's layout.

    `precision` "bf16" is 3.5 to 7 times as fast on CPUs that have it, and moves boxes a little: your choice, never a
    default. Raises `CheckpointError`, `SetupError`.
    """
    chosen = choose_device(device)
    return _make_predictor(read_detector(Path(path)), chosen, precision)


def _make_predictor(loaded: LoadedDetector, device: torch.device, precision: Precision) -> Predictor:
    if precision not in _DTYPES:
        raise SetupError(Problem(where="precision", given=str(precision), allowed=", ".join(_DTYPES)))
    dtype = _DTYPES[precision]
    detector = prepared_detector(loaded.detector.eval().to(device), dtype)
    return Predictor(detector=detector, recipe=loaded.recipe, classes=loaded.classes, device=device, dtype=dtype)


def choose_device(device: Device) -> torch.device:
    """The device of that name; "auto" is the first GPU, else the CPU. Raises `SetupError` for one that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if not available.get(device, False):
        there = ", ".join(name for name, is_there in available.items() if is_there)
        given = f"{device} is not usable on this machine"
        raise SetupError(Problem(where="device", given=given, allowed=f"auto, {there}"))
    return torch.device(device)


def as_pixels(picture: Picture) -> Tensor:
    """Any form of a picture as uint8 [3, H, W] RGB. Raises `ImageError`."""
    if isinstance(picture, (str, Path)):
        return read_image(picture)
    if isinstance(picture, Tensor):
        pixels = picture
    elif isinstance(picture, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(picture))
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
    elif isinstance(picture, Image.Image):
        return upright_rgb(picture, "picture")
    else:
        raise ImageError(
            Problem(
                where="picture",
                given=f"a {type(picture).__name__}",
                allowed="a path, a PIL picture, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W]",
            )
        )
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise ImageError(
            Problem(
                where="picture",
                given=f"{tuple(picture.shape)} of {picture.dtype}",
                allowed="RGB pixels 0 to 255 as uint8: an array [H, W, 3] or a tensor [3, H, W]",
            )
        )
    return pixels


def _as_list(pictures: Picture | Sequence[Picture]) -> Sequence[Picture]:
    if isinstance(pictures, str | Path | Image.Image | np.ndarray | Tensor) or not isinstance(pictures, Sequence):
        return [pictures]
    return pictures


def draw(picture: Picture, found: Detections, classes: ClassTable, *, threshold: float = 0.5) -> Image.Image:
    """The picture with its detections from `threshold` up."""
    from rcnn.drawing import draw_detections

    return draw_detections(as_pixels(picture), found, classes, threshold=threshold)


def evaluate_checkpoint(
    path: Path,
    *,
    data: str,
    split: str | None = None,
    overrides: Sequence[str] = (),
    device: Device = "auto",
    precision: Precision = "float32",
    progress: AbstractProgress | None = None,
) -> Evaluation:
    """Predict a split of the data set at `data` and judge it; shared among processes under torchrun.

    `overrides` (`path=value`) change the recipe inside the checkpoint: other thresholds, fewer workers.
    Raises `DataError`, `ImageError`, `CheckpointError`, `RecipeError`, `SetupError`.
    """
    # The prepared detector has the precision already: no autocast on top of it.
    accelerator = build_accelerator(device=device)
    loaded = read_detector(path, overrides)
    predictor = _make_predictor(loaded, accelerator.device, precision)
    judged = read_evaluation(data, split=split, classes=loaded.classes, recipe=loaded.recipe)
    loader = build_loader_for_evaluation(
        judged.truth, loaded.recipe, rank=accelerator.process_index, num_processes=accelerator.num_processes
    )
    shown = progress if progress is not None and accelerator.is_main_process else SilentProgress()
    for line in (describe(judged.truth), *judged.notes):
        shown.noted(line)
    try:
        counter = PredictionCounter(shown, total_images=len(loader))
        found = predict_all(predictor.detector, loader, accelerator=accelerator, on_batch=counter)
    except ImageError as error:
        remedy = f"rcnn data check {data} --decode names all that cannot be used"
        problem = Problem(where=data, given="an evaluation needs every picture", remedy=remedy)
        raise ImageError((*error.problems, problem)) from error
    finally:
        shown.finished()
    return judge(judged.truth, found)
