"""Pictures in, detections in their own pixels out: a checkpoint with everything that it needs to be used.

Letter: D detections of a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rcnn.config.text import from_yaml
from rcnn.data.folder import describe
from rcnn.data.image import read_image
from rcnn.detectors.preparation import prepared_detector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.engine.accelerator import Device, build_accelerator
from rcnn.engine.checkpoint import CheckpointMeta, load_into, read_weights
from rcnn.engine.evaluate import predict_all, to_original
from rcnn.engine.progress import AbstractProgress, PredictionCounter, SilentProgress
from rcnn.errors import DataError, ImageError, Problem, SetupError
from rcnn.recipes.datasets import build_loader_for_evaluation, build_resize, read_evaluation
from rcnn.recipes.judging import Evaluation, judge
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import Recipe
from rcnn.records import ClassTable, Detections, Proposals
from rcnn.transforms.batching import Sample, collate
from rcnn.transforms.geometry import EvalTransform, image_size, no_target

if TYPE_CHECKING:
    from PIL.Image import Image

# A picture: a path, a PIL picture, or RGB pixels 0 to 255 as [H, W, 3] (NumPy) or [3, H, W] (torch).
Picture = str | Path | np.ndarray | Tensor | Any

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A detector ready for use: its recipe and classes came with its weights."""

    detector: TwoStageDetector
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
        """The first stage alone: class-agnostic proposals in each picture's own pixels, best first."""
        proposals = []
        for picture in _as_list(pictures):
            sample = self._sample(picture)
            batch, _ = collate([sample], divisor=self.recipe.detector.image.divisor)
            with torch.inference_mode():
                found = self.detector.propose(batch.to(self.device))[0]
            as_detections = Detections(
                boxes_xyxy=found.boxes_xyxy,
                scores=found.scores,
                labels=torch.zeros_like(found.scores, dtype=torch.int64),
            )
            moved = to_original(as_detections, size=batch.sizes[0], original_size=batch.original_sizes[0]).to("cpu")
            proposals.append(Proposals(boxes_xyxy=moved.boxes_xyxy, scores=moved.scores))
        return proposals

    def _predict_one(self, picture: Picture) -> Detections:
        sample = self._sample(picture)
        batch, _ = collate([sample], divisor=self.recipe.detector.image.divisor)
        with torch.inference_mode():
            found = self.detector.predict(batch.to(self.device))[0]
        return to_original(found, size=batch.sizes[0], original_size=batch.original_sizes[0]).to("cpu")

    def _sample(self, picture: Picture) -> Sample:
        pixels = as_pixels(picture)
        transform = EvalTransform(resize=build_resize(self.recipe.detector.image))
        resized, target = transform(pixels, no_target())
        return Sample(image=resized, target=target, original_size=image_size(pixels), image_id=0)


def load(path: str | Path, *, device: Device = "auto", precision: str = "float32") -> Predictor:
    """A checkpoint of ours, ready for use. On a CPU the detector is prepared: norms folded, weights in oneDNN's layout.

    `precision` "bf16" is 3.5 to 7 times as fast on CPUs that have it, and moves boxes a little: your choice, never a
    default. Raises `CheckpointError`, `SetupError`.
    """
    checkpoint = read_weights(Path(path))
    recipe = from_yaml(checkpoint.meta.recipe, Recipe)
    detector = build_detector(recipe.detector, num_classes=len(checkpoint.meta.classes), pretrained=False)
    load_into(detector, checkpoint.state_dict)
    return make_predictor(detector, recipe, checkpoint.meta, device=device, precision=precision)


def make_predictor(
    detector: TwoStageDetector, recipe: Recipe, meta: CheckpointMeta, *, device: Device, precision: str
) -> Predictor:
    chosen = choose_device(device)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}.get(precision)
    if dtype is None:
        raise SetupError(Problem(where="precision", given=precision, allowed="float32, bf16"))
    detector = detector.eval().to(chosen)
    return Predictor(
        detector=prepared_detector(detector, dtype), recipe=recipe, classes=meta.classes, device=chosen, dtype=dtype
    )


def choose_device(device: Device) -> torch.device:
    """The device of that name; "auto" is the first GPU, else the CPU. Raises `SetupError` for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError(Problem(where="device", given="cuda is not usable on this machine", allowed="cpu, auto"))
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
    elif hasattr(picture, "convert"):
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
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


def _as_list(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def find_pictures(sources: Iterable[str]) -> list[Path]:
    """The pictures that files, folders (searched through) and patterns name, each once, in a stable order.

    Raises `DataError` that lists every source without a picture.
    """
    found: dict[Path, None] = {}
    problems = []
    for source in sources:
        paths = list(_pictures_of(source))
        found.update(dict.fromkeys(paths))
        if not paths:
            problems.append(
                Problem(
                    where=source,
                    given="no such file" if not Path(source).is_dir() else "a folder without pictures",
                    allowed=f"pictures ({', '.join(sorted(IMAGE_SUFFIXES))}), folders, or patterns such as 'a/*.jpg'",
                )
            )
    if problems:
        raise DataError(problems)
    return list(found)


def _pictures_of(source: str) -> Iterator[Path]:
    path = Path(source)
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(child for child in path.rglob("*") if child.suffix.lower() in IMAGE_SUFFIXES)
    elif any(sign in source for sign in "*?["):
        import glob

        yield from (
            Path(match)
            for match in sorted(glob.glob(source, recursive=True))
            if Path(match).suffix.lower() in IMAGE_SUFFIXES
        )


def draw(picture: Picture, found: Detections, classes: ClassTable, *, threshold: float = 0.5) -> Image:
    """The picture with its detections from `threshold` up."""
    from rcnn.drawing import draw_detections

    return draw_detections(as_pixels(picture), found, classes, threshold=threshold)


def evaluate_checkpoint(
    path: Path,
    *,
    data: str,
    split: str | None = None,
    device: Device = "auto",
    precision: str = "float32",
    progress: AbstractProgress | None = None,
) -> Evaluation:
    """Predict a split of the data set at `data` and judge it; shared among processes under torchrun.

    Raises `DataError`, `CheckpointError`, `SetupError`.
    """
    predictor = load(path, device=device, precision=precision)
    # The prepared detector has the precision already: no autocast on top of it.
    accelerator = build_accelerator(device=device)
    truth = read_evaluation(data, split=split, classes=predictor.classes, data=predictor.recipe.data)
    loader = build_loader_for_evaluation(
        truth, predictor.recipe, rank=accelerator.process_index, num_processes=accelerator.num_processes
    )
    shown = (progress if progress and accelerator.is_main_process else None) or SilentProgress()
    shown.noted(describe(truth))
    counter = PredictionCounter(shown, total_images=len(truth))
    found = predict_all(predictor.detector, loader, accelerator=accelerator, on_batch=counter)
    shown.finished()
    return judge(truth, found)
