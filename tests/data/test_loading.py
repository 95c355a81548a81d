from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rcnn.data.folder import read_dataset
from rcnn.data.loading import BatchLoader, DetectionDataset, build_eval_loader, build_train_loader
from rcnn.data.sampling import SampleKey
from rcnn.errors import DataError, ImageError
from rcnn.records import Size, Target
from rcnn.transforms.geometry import EvalTransform, HorizontalFlip, Resize, TrainTransform

AS_IS = EvalTransform(resize=Resize(short_sides=(80,), max_long_side=1000, kernel="bilinear_uint8_antialias"))
RANDOM = TrainTransform(flip=HorizontalFlip(), resize=Resize(short_sides=(40, 60, 80), max_long_side=1000))


@pytest.fixture
def root(folders: Any) -> Path:
    """Twelve noisy pictures, every third one upright."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, 13):
        width, height = (80, 100) if number % 3 == 0 else (100, 80)
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [10, 20, number, 30]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    root = folders.coco(content)
    for image in images:
        pixels = generator.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train" / image["file_name"])
    return root


def test_an_item(folders: Any) -> None:
    table = read_dataset(folders.coco())
    sample = DetectionDataset(table, AS_IS)[0]
    assert sample.image.dtype == torch.uint8
    assert sample.image.shape == (3, 80, 100)
    assert sample.original_size == Size(80, 100)
    assert sample.image_id == 7
    torch.testing.assert_close(sample.target.boxes_xyxy, torch.tensor([[10.0, 20.0, 40.0, 60.0]]))
    assert sample.target.labels.tolist() == [1]
    torch.testing.assert_close(sample.target.ignore_xyxy, torch.tensor([[0.0, 0.0, 100.0, 80.0]]))  # the crowd
    empty = DetectionDataset(table, AS_IS)[1].target
    assert empty.boxes_xyxy.shape == (0, 4)
    assert empty.labels.dtype == torch.int64


def test_the_seed_of_a_key_decides_the_random_choices(root: Path) -> None:
    dataset = DetectionDataset(read_dataset(root), RANDOM)
    first, again = dataset[SampleKey(0, 11)], dataset[SampleKey(0, 11)]
    assert torch.equal(first.image, again.image)
    shapes = {tuple(dataset[SampleKey(0, seed)].image.shape) for seed in range(30)}
    assert len(shapes) == 3


def contents(loader: BatchLoader) -> list[tuple[tuple[int, ...], Tensor, list[Target]]]:
    return [(batch.image_ids, batch.pixels, targets) for batch, targets in loader]


def test_workers_do_not_change_what_is_trained_on(root: Path) -> None:
    table = read_dataset(root)
    loaders = [build_train_loader(table, RANDOM, batch_size=2, seed=4, num_workers=workers) for workers in (0, 2)]
    for epoch in (0, 1):
        for loader in loaders:
            loader.set_epoch(epoch)
        alone, shared = map(contents, loaders)
        torch.testing.assert_close(alone, shared, rtol=0, atol=0)
    assert len(alone) == 6
    loaders[1].set_epoch(1, skip_batches=4)
    torch.testing.assert_close(contents(loaders[1]), alone[4:], rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_generator_of_the_training(root: Path, workers: int) -> None:
    state = torch.random.get_rng_state()
    list(build_train_loader(read_dataset(root), RANDOM, batch_size=2, num_workers=workers))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batches_group_shapes_and_carry_ids(root: Path) -> None:
    loader = build_train_loader(read_dataset(root), AS_IS, batch_size=2, divisor=32)
    assert len(loader) == 6
    seen = []
    for batch, targets in loader:
        seen += batch.image_ids
        assert len({number % 3 == 0 for number in batch.image_ids}) == 1
        assert batch.padded_size in {(96, 128), (128, 96)}
        assert batch.original_sizes == batch.sizes
        widths = [int(target.boxes_xyxy[0, 2] - target.boxes_xyxy[0, 0]) for target in targets]
        assert widths == list(batch.image_ids)
    assert sorted(seen) == list(range(1, 13))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_loads_every_picture_once_in_order(root: Path, workers: int) -> None:
    table = read_dataset(root)
    ids = [
        [number for batch, _ in loader for number in batch.image_ids]
        for loader in (build_eval_loader(table, AS_IS, rank=rank, world_size=2, num_workers=workers) for rank in (0, 1))
    ]
    assert ids == [[1, 3, 5, 7, 9, 11], [2, 4, 6, 8, 10, 12]]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_comes_out_of_the_workers_as_our_error(root: Path, workers: int) -> None:
    file = root / "train/5.png"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ImageError) as raised:
        list(build_eval_loader(read_dataset(root), AS_IS, batch_size=4, num_workers=workers))
    assert [problem.where for problem in raised.value.problems] == [str(file)]
    assert "cut short or damaged" in str(raised.value)
    assert "Traceback" not in str(raised.value)


def test_all_mistakes_of_a_batch_are_reported(root: Path) -> None:
    table = read_dataset(root)
    (root / "train/2.png").unlink()
    Image.new("RGB", (7, 7)).save(root / "train/3.png")
    with pytest.raises(DataError) as raised:
        list(build_eval_loader(table, AS_IS, batch_size=4))
    assert [Path(problem.where).name for problem in raised.value.problems] == ["2.png", "3.png"]


def test_a_size_that_is_not_the_stated_one(folders: Any) -> None:
    root = folders.coco()
    folders.picture("train/b.jpg", 90, 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 80)).save(root / "train/a.jpg", exif=exif)
    dataset = DetectionDataset(read_dataset(root), AS_IS)
    with pytest.raises(DataError, match=r"a\.jpg: the picture has 80 x 100 pixels, .* say 100 x 80 \(EXIF-rotated"):
        dataset[0]
    with pytest.raises(DataError, match=r"b\.jpg: the picture has 90 x 80 pixels, its annotations say 100 x 80;"):
        dataset[1]


def test_targets_lie_inside_the_picture_though_the_source_rounds(folders: Any) -> None:
    content = folders.coco_content()
    content["annotations"] = [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [60, 10, 40.03125, 20]}]
    target = DetectionDataset(read_dataset(folders.coco(content)), AS_IS).target(0)
    assert target.boxes_xyxy.tolist() == [[60, 10, 100, 30]]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_our_errors_also_survive_a_plain_loader_of_torch(root: Path) -> None:
    """torch raises a worker's error anew, from one text."""
    file = root / "train/5.png"
    file.write_bytes(b"")
    dataset = DetectionDataset(read_dataset(root), AS_IS)
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, multiprocessing_context="fork", collate_fn=list)
    with pytest.raises(ImageError, match=r"5\.png: the file is empty"):
        list(loader)
