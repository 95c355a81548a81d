"""A detector of a few numbers, its data, and a whole training of it; run as a script it is what subprocess tests start.

Letter: N images.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from rcnn.detectors.interface import AbstractDetector
from rcnn.engine.accelerator import build_accelerator
from rcnn.engine.checkpoint import CheckpointMeta
from rcnn.engine.evaluate import predict_all
from rcnn.engine.optimizer import parameter_groups, sgd
from rcnn.engine.progress import LineProgress
from rcnn.engine.run_folder import RunFolder
from rcnn.engine.schedule import multi_step_schedule
from rcnn.engine.train import TrainSettings, train
from rcnn.errors import RcnnError
from rcnn.evaluation.table import DetectionTable
from rcnn.records import ClassTable, Detections, ImageBatch, Losses, Size, Target

META = CheckpointMeta(recipe="base: fake\n", classes=ClassTable(names=("red", "blue"), category_ids=(7, 9)))
SIDE = 8


class FakeDetector(AbstractDetector):
    """A linear map from the mean colour to one box (fractions of the picture) and one score per class."""

    def __init__(self, *, dropout: float = 0.0, nan_on_image: int | None = None) -> None:
        super().__init__()
        self.nan_on_image = nan_on_image
        self.dropout = nn.Dropout(dropout)
        self.box = nn.Linear(3, 4)
        self.score = nn.Linear(3, 2)

    def colours(self, images: ImageBatch) -> Tensor:
        return self.dropout(images.pixels.float().mean((2, 3)) / 255)

    def loss(self, images: ImageBatch, targets: Sequence[Target]) -> Losses:
        colours = self.colours(images)
        boxes, logits = self.box(colours), self.score(colours)
        wanted = torch.zeros_like(logits)
        box_loss = boxes.sum() * 0
        for index, target in enumerate(targets):
            for box, label in zip(target.boxes_xyxy, target.labels, strict=True):
                wanted[index, label] = 1
                box_loss = box_loss + F.smooth_l1_loss(boxes[index].float(), box / SIDE)
        score_loss = F.binary_cross_entropy_with_logits(logits.float(), wanted.float())
        if self.nan_on_image in images.image_ids:
            box_loss = box_loss * float("nan")
        return {"box": box_loss / len(images), "score": score_loss}

    def predict(self, images: ImageBatch) -> list[Detections]:
        colours = self.colours(images)
        found = []
        for box, scores, size in zip(self.box(colours), self.score(colours).sigmoid(), images.sizes, strict=True):
            best_first = scores.argsort(descending=True)
            boxes = box.expand(2, 4) * box.new_tensor([size.width, size.height] * 2)
            found.append(Detections(boxes_xyxy=boxes, scores=scores[best_first], labels=best_first))
        return found


class FakeLoader:
    """`num_images` pictures of seeded noise; every third has no box. Each epoch has its own order."""

    def __init__(
        self,
        num_images: int = 12,
        *,
        batch_size: int = 2,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        before_batch: dict[int, Sequence[int]] | None = None,
        length: int | None = None,
    ) -> None:
        self.num_images, self.batch_size, self.shuffle = num_images, batch_size, shuffle
        self.rank, self.world_size = rank, world_size
        self.before_batch = before_batch or {}
        self.length = length
        self.epoch = self.skip_batches = self.given = 0
        self.pixels = torch.randint(256, (num_images, 3, 1, 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        if self.length is not None:
            return self.length
        return -(-len(range(self.rank, self.num_images, self.world_size)) // self.batch_size)

    def set_epoch(self, epoch: int, *, skip_batches: int = 0) -> None:
        self.epoch, self.skip_batches = epoch, skip_batches

    def __iter__(self) -> Iterator[tuple[ImageBatch, list[Target]]]:
        torch.rand(1)  # as DataLoader, which draws a seed for its workers
        order = torch.arange(self.num_images)
        if self.shuffle:
            order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.epoch))
        own = order[self.rank :: self.world_size].tolist()
        for start in range(self.skip_batches * self.batch_size, len(own), self.batch_size):
            for number in self.before_batch.get(self.given, ()):
                os.kill(os.getpid(), number)
            self.given += 1
            yield self.batch(own[start : start + self.batch_size])

    def batch(self, indices: Sequence[int]) -> tuple[ImageBatch, list[Target]]:
        sizes = tuple(Size(SIDE, SIDE - index % 2) for index in indices)
        images = ImageBatch(
            pixels=self.pixels[list(indices)].expand(-1, 3, SIDE, SIDE).to(torch.uint8),
            sizes=sizes,
            original_sizes=tuple(Size(size.height * 2, size.width * 3) for size in sizes),
            image_ids=tuple(100 + index for index in indices),
        )
        return images, [self.target(index) for index in indices]

    def target(self, index: int) -> Target:
        has_box = index % 3 != 2
        box = torch.tensor([[0.0, 0.0, 4.0, 6.0]]) if has_box else torch.zeros(0, 4)
        return Target(boxes_xyxy=box, labels=torch.full((len(box),), index % 2))


def run_training(
    folder: Path,
    *,
    resume: bool = False,
    dropout: float = 0.5,
    signals: dict[int, Sequence[int]] | None = None,
    signals_in_evaluation: Sequence[int] = (),
    num_images: int = 12,
    num_evaluated: int = 12,
    nan_on_image: int | None = None,
    batch_size: int = 2,
    console: Console | None = None,
    precision: str = "float32",
    **choices: object,
) -> DetectionTable | None:
    """A training as the command line would put it together; gives the detections of its last evaluation."""
    accelerator = build_accelerator(precision=precision, device="cpu")  # pyright: ignore[reportArgumentType]
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "batch_size": batch_size}
    torch.manual_seed(0)
    detector = FakeDetector(dropout=dropout, nan_on_image=nan_on_image)
    if accelerator.is_main_process:
        run = RunFolder.open(folder) if resume else RunFolder.create(folder, recipe=META.recipe)
    run = RunFolder(folder)
    accelerator.wait_for_everyone()
    tables = []

    def evaluate() -> dict[str, float]:
        for number in signals_in_evaluation:
            os.kill(os.getpid(), number)
        loader = FakeLoader(num_evaluated, shuffle=False, **share)
        tables.append(predict_all(detector, loader, accelerator=accelerator))
        return {"AP": float(tables[-1].scores.mean())}

    settings = {"epochs": 3, "log_every_steps": 1, **choices}
    train(
        detector=detector,
        train_loader=FakeLoader(num_images, before_batch=signals, **share),
        optimizer=sgd(parameter_groups(detector, lr=0.05, weight_decay=1e-4)),
        schedule=multi_step_schedule(milestones=[12], warm_up_steps=3, warm_up_factor=0.1),
        accelerator=accelerator,
        run=run,
        meta=META,
        settings=TrainSettings(**settings),  # pyright: ignore[reportArgumentType]
        evaluate=evaluate,
        progress=LineProgress(console, every_seconds=0) if console else None,
        resume=resume,
    )
    if accelerator.is_main_process and tables:
        columns = {name: getattr(tables[-1], name).tolist() for name in ("image_ids", "boxes_xyxy", "scores", "labels")}
        (folder / "detections.json").write_text(json.dumps(columns))
    return tables[-1] if tables else None


def main() -> int:
    """Runs one after the other: a JSON list of [folder, choices]; gives the exit code of the last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=json.loads)
    exit_code = 0
    for folder, choices in parser.parse_args().runs:
        rank = choices.pop("signal_on_rank", None)
        if rank == int(os.environ.get("RANK", "0")):
            choices["signals"] = {4: [signal.SIGTERM]}
        try:
            run_training(Path(folder), **choices)
            exit_code = 0
        except RcnnError as error:
            sys.stderr.write(f"{error}\n")
            exit_code = error.exit_code
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
