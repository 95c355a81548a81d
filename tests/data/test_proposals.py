"""A file of proposals: what is written is read, for the right pictures, and nothing that cannot be."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import rcnn
from rcnn.data.folder import read_dataset
from rcnn.data.loading import DetectionDataset, build_eval_loader, build_train_loader
from rcnn.data.proposals import (
    ProposalFile,
    ProposalOrigin,
    StoredProposals,
    TableProposals,
    open_proposals,
    pictures_of_file,
    write_proposals,
)
from rcnn.data.sampling import SampleKey
from rcnn.data.table import AnnotationTable, PackedStrings
from rcnn.errors import DataError, RunError
from rcnn.plain_records import ClassTable
from rcnn.transforms.geometry import EvalTransform, HorizontalFlip, Resize, TrainTransform

ORIGIN = ProposalOrigin(detector="best.safetensors", recipe="base: quickstart\n")
NO_BOXES = np.zeros((0, 4), np.float32)


def table_of(names: list[str], *, ids: list[int] | None = None, format: str = "VOC", split: str = "val"):
    count = len(names)
    return AnnotationTable(
        classes=ClassTable(names=("cat",)),
        root=Path("data"),
        format=format,
        split=split,
        image_ids=np.array(ids or range(1, count + 1), np.int64),
        file_names=PackedStrings.pack(names),
        sizes=np.tile(np.array([[80, 100]], np.int32), (count, 1)),
        starts=np.zeros(count + 1, np.int64),
        boxes_xyxy=np.zeros((0, 4)),
        labels=np.zeros(0, np.int64),
        ignored=np.zeros(0, bool),
        areas=np.zeros(0),
    )


def stored(*boxes: tuple[float, ...], scores: list[float] | None = None) -> StoredProposals:
    return StoredProposals(
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores if scores is not None else [0.5] * len(boxes), np.float32),
    )


FIRST = stored((1, 2, 30, 40), (0, 0, 100, 80), (5.25, 6, 5.25, 9), scores=[0.9, 0.9, 0.25])
THIRD = stored((10, 10, 20, 20), scores=[0.125])
NAMES = ["a.jpg", "b/é.jpg", "c.jpg"]


def write(path: Path, table: AnnotationTable | None = None, **options: Any) -> Path:
    with write_proposals(path, table or table_of(NAMES), origin=ORIGIN, **options) as writer:
        for proposals in (FIRST, stored(), THIRD):
            writer.add(proposals)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "new folder" / "proposals.safetensors")


def test_the_file_by_another_reader(path: Path) -> None:
    tensors = safetensors.numpy.load_file(path)
    assert tensors["proposals"].tolist() == [
        [1, 2, 30, 40, np.float32(0.9)],
        [0, 0, 100, 80, np.float32(0.9)],
        [5.25, 6, 5.25, 9, 0.25],
        [10, 10, 20, 20, 0.125],
    ]
    assert tensors["starts"].tolist() == [0, 3, 3, 4]
    assert tensors["image_ids"].tolist() == [1, 2, 3]
    assert tensors["sizes"].tolist() == [[80, 100]] * 3
    names = [
        tensors["name_bytes"][a:b].tobytes().decode()
        for a, b in zip(tensors["name_starts"], tensors["name_starts"][1:], strict=False)
    ]
    assert names == NAMES
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {
            "system": "rcnn", "kind": "proposals", "layout": "1", "version": rcnn.__version__, "format": "VOC",
            "detector": "best.safetensors", "recipe": "base: quickstart\n", "split": "val",
        }  # fmt: skip
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_reading_one_picture_and_a_range(path: Path) -> None:
    file = ProposalFile(path)
    assert (len(file), file.num_proposals, file.has_scores) == (3, 4, True)
    assert (file.origin, file.version, file.format, file.split) == (ORIGIN, rcnn.__version__, "VOC", "val")
    np.testing.assert_array_equal(file[0].boxes_xyxy, FIRST.boxes_xyxy)
    np.testing.assert_array_equal(file[0].scores, FIRST.scores)
    assert [len(one) for one in file.read(0, 3)] == [3, 0, 1]
    np.testing.assert_array_equal(file.read(1, 3)[1].boxes_xyxy, THIRD.boxes_xyxy)
    assert file.read(1, 1) == []
    file.verify(pictures_at_once=2)


def test_what_is_read_of_a_larger_file(tmp_path: Path) -> None:
    """Ten pictures; of pieces of two, three are five pictures' worth: the first, the last and the one between."""
    path = tmp_path / "ten"
    names = [f"{number}.jpg" for number in range(10)]
    with write_proposals(path, table_of(names), origin=ORIGIN) as writer:
        for _ in names:
            writer.add(THIRD)
    ProposalFile(path).verify(most_pictures=5, pictures_at_once=2)
    spoil_scores = bytearray(path.read_bytes())
    spoil_scores[-20 * len(names) :] = b"\xff" * 20 * len(names)
    path.write_bytes(spoil_scores)
    with pytest.raises(DataError) as caught:
        ProposalFile(path).verify(most_pictures=5, pictures_at_once=2)
    named = [problem.where.rpartition(" ")[2] for problem in caught.value.problems]
    assert named == ["0.jpg", "1.jpg", "4.jpg", "5.jpg", "8.jpg", "9.jpg"]


def test_boxes_without_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "boxes", scored=False)
    assert safetensors.numpy.load_file(path)["proposals"].shape == (4, 4)
    file = ProposalFile(path)
    assert not file.has_scores
    assert file[0].scores is None
    np.testing.assert_array_equal(file[0].boxes_xyxy, FIRST.boxes_xyxy)


def test_the_best_so_many_of_a_table_in_another_order(path: Path) -> None:
    proposals = open_proposals(path, table_of(["c.jpg", "a.jpg"]), limit=2)
    assert len(proposals) == 2
    np.testing.assert_array_equal(proposals[0].boxes_xyxy, THIRD.boxes_xyxy)
    np.testing.assert_array_equal(proposals[1].boxes_xyxy, FIRST.boxes_xyxy[:2])
    assert proposals[1].scores is not None and len(proposals[1].scores) == 2


def test_a_file_for_other_pictures(path: Path) -> None:
    other = table_of([*NAMES, *(f"{number}.jpg" for number in range(5))], split="train")
    with pytest.raises(DataError) as caught:
        open_proposals(path, other)
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    assert problem.given == (
        "5 of the 8 pictures of the data are not in it, the first 0.jpg, 1.jpg, 2.jpg, ...; it has 0 others"
    )
    assert problem.allowed == (
        'proposals for split "train" (8 pictures) in data; these are for split "val" of VOC data'
    )
    assert "rcnn proposals dump" in problem.remedy
    with pytest.raises(DataError, match=r"the first x.jpg; it has 3 others, such as a.jpg"):
        open_proposals(path, table_of(["x.jpg"]))


def test_names_alone_do_not_tell_where_splits_share_them(tmp_path: Path) -> None:
    """COCO and YOLO name pictures relative to the folder of a split: train/1.jpg and val/1.jpg are both 1.jpg."""
    other = r"3 of the 3 .* the same name, in another split or with another id"
    coco = write(tmp_path / "coco", table_of(NAMES, ids=[5, 6, 7], format="COCO"))
    open_proposals(coco, table_of(NAMES[1:], ids=[6, 7], format="COCO"))
    open_proposals(coco, table_of(NAMES, format="VOC"))  # converted data: ids are made up
    for changes in ({"ids": [8, 9, 10]}, {"ids": [5, 6, 7], "split": "train"}):
        with pytest.raises(DataError, match=other):
            open_proposals(coco, table_of(NAMES, format="COCO", **changes))
    yolo = write(tmp_path / "yolo", table_of(NAMES, format="YOLO"))
    open_proposals(yolo, table_of(NAMES[1:], format="YOLO"))
    with pytest.raises(DataError, match=other):
        open_proposals(yolo, table_of(NAMES, format="YOLO", split="train"))
    voc = write(tmp_path / "voc", table_of(NAMES, split="trainval"))
    open_proposals(voc, table_of(NAMES, split="train"))


def test_pictures_of_another_size(path: Path) -> None:
    table = table_of(NAMES)
    table.sizes[1:] = [[40, 50], [41, 51]]
    with pytest.raises(DataError, match=r"2 pictures had another size .* b/é.jpg: 100 x 80, now 50 x 40"):
        open_proposals(path, table)


def test_the_pictures_that_a_file_is_about(path: Path) -> None:
    table = table_of(["x.jpg", "c.jpg", "b/é.jpg", "a.jpg"])
    chosen = pictures_of_file(ProposalFile(path), table)
    assert [chosen.file_names[index] for index in range(3)] == ["c.jpg", "b/é.jpg", "a.jpg"]
    with pytest.raises(DataError, match=r"2 of its 3 pictures are not in the data, the first a.jpg, c.jpg"):
        pictures_of_file(ProposalFile(path), table_of(["b/é.jpg"]))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (stored((1, 2, 101, 4)), r"1 of 1 boxes are outside the picture of 100 x 80, the first \(1, 2, 101, 4\)"),
        (stored((-0.5, 2, 9, 4)), r"1 of 1 boxes are outside"),
        (stored((1, 2, 9, 4), (9, 2, 8, 4)), r"1 of 2 boxes are reversed, the first \(9, 2, 8, 4\)"),
        (stored((1, 2, float("nan"), 4)), r"1 of 1 boxes are not a number, the first \(1, 2, nan, 4\)"),
        (stored((1, 2, float("inf"), 4)), r"1 of 1 boxes are not a number"),
        (stored((1, 2, 3, 4), scores=[1.5]), "1 scores are not from 0 to 1, the first 1.5"),
        (stored((1, 2, 3, 4), scores=[float("nan")]), "1 scores are not from 0 to 1, the first nan"),
        (stored((1, 2, 3, 4), (1, 2, 3, 4), scores=[0.2, 0.3]), "scores are not best first"),
    ],
)
def test_boxes_that_cannot_be(path: Path, given: StoredProposals, complaint: str) -> None:
    """The writer refuses them, and the reader where another program wrote them."""
    before = path.read_bytes()
    with (
        pytest.raises(DataError, match=f"proposals of a.jpg: {complaint}"),
        write_proposals(path, table_of(NAMES), origin=ORIGIN) as writer,
    ):
        writer.add(given)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    spoil(path, np.concatenate([given.boxes_xyxy, np.asarray(given.scores)[:, None]], axis=1))
    file = ProposalFile(path)
    with pytest.raises(DataError, match=f"picture a.jpg: {complaint}.*; allowed: 0 <= x1 <= x2 <= width"):
        file[0]
    with pytest.raises(DataError) as caught:
        file.verify()
    assert len(caught.value.problems) == 2, "a.jpg and c.jpg, the picture between has no boxes"


def spoil(path: Path, rows: np.ndarray, **changes: np.ndarray) -> None:
    """The file anew by another program: these rows for its first and last picture."""
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    tensors["proposals"] = np.concatenate([rows, rows]).astype(np.float32)
    middle = [len(rows)] * (len(tensors["image_ids"]) - 1)
    tensors["starts"] = np.array([0, *middle, 2 * len(rows)])
    safetensors.numpy.save_file(tensors | changes, path, metadata)


def test_numbers_that_do_not_agree(path: Path) -> None:
    rows = np.array([[1, 2, 3, 4, 0.5]])
    for changes in ({"starts": np.array([0, 2, 1, 2])}, {"starts": np.arange(5)}, {"image_ids": np.arange(2)}):
        spoil(path, rows, **changes)
        with pytest.raises(DataError, match="damaged: the numbers of its pictures, names and rows do not agree"):
            ProposalFile(path)


def test_other_safetensors_files(path: Path, tmp_path: Path) -> None:
    tensors = {"a": np.zeros(3)}
    for metadata, complaint in (
        ({"kind": "detector"}, "a checkpoint, not proposals"),
        (None, "another safetensors file, not proposals"),
        ({"kind": "proposals", "layout": "9", "version": "7.0"}, "layout 9, written by rcnn 7.0; allowed: layout 1"),
        ({"kind": "proposals", "layout": "1"}, "damaged: it has no image_ids, sizes"),
    ):
        safetensors.numpy.save_file(tensors, tmp_path / "b", metadata)
        with pytest.raises(DataError, match=complaint):
            ProposalFile(tmp_path / "b")


def test_pictures_that_were_left_out(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="proposals of 1 pictures were written; allowed: one entry for each of the 3"),
        write_proposals(tmp_path / "a", table_of(NAMES), origin=ORIGIN) as writer,
    ):
        writer.add(FIRST)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write(tmp_path / "file" / "a")


# ------------------------------------------------------------------------------------------------- in data loading


SHORT = Resize(short_sides=(40, 160), max_long_side=1000)


@pytest.fixture
def loaded(folders: Any, tmp_path: Path) -> tuple[AnnotationTable, TableProposals]:
    """Two pictures of 100 x 80; the proposals of the first are its true box and two more."""
    table = read_dataset(folders.coco())
    path = tmp_path / "proposals"
    with write_proposals(path, table, origin=ORIGIN) as writer:
        writer.add(stored((10, 20, 40, 60), (0, 0, 100, 80), (90, 1, 99.5, 2), scores=[0.75, 0.5, 0.25]))
        writer.add(stored())
    return table, open_proposals(path, table)


def test_proposals_are_flipped_and_resized_as_boxes_are(loaded) -> None:
    table, proposals = loaded
    dataset = DetectionDataset(table, TrainTransform(flip=HorizontalFlip(), resize=SHORT), proposals=proposals)
    seen = set()
    for seed in range(16):
        sample = dataset[SampleKey(0, seed)]
        given = sample.target.proposals
        assert given is not None and given.scores is not None
        torch.testing.assert_close(given.boxes_xyxy[:1], sample.target.boxes_xyxy, rtol=0, atol=0)
        assert given.scores.tolist() == [0.75, 0.5, 0.25]
        seen.add(tuple(given.boxes_xyxy[2].tolist()))
    # 100 x 80 at short sides 40 and 160 (factors 0.5 and 2), as it is and mirrored (x becomes 100 - x)
    assert seen == {(45, 0.5, 49.75, 1), (180, 2, 199, 4), (0.25, 0.5, 5, 1), (1, 2, 20, 4)}


@pytest.mark.parametrize("workers", [0, 2])
def test_they_travel_with_the_batch(loaded, workers: int) -> None:
    table, proposals = loaded
    resize = Resize(short_sides=(160,), max_long_side=1000)
    loader = build_train_loader(
        table, EvalTransform(resize=resize), batch_size=2, num_workers=workers, proposals=proposals
    )
    ((batch, targets),) = list(loader)
    assert batch.proposals is not None
    given = dict(zip(batch.image_ids, batch.proposals, strict=True))
    assert [len(given[7]), len(given[3])] == [3, 0]
    assert given[7].boxes_xyxy[2].tolist() == [180, 2, 199, 4]
    assert given[3].boxes_xyxy.shape == (0, 4)
    assert all(target.proposals is None for target in targets)
    (first, _), _ = build_eval_loader(table, EvalTransform(resize=resize), num_workers=workers, proposals=proposals)
    assert first.proposals is not None and len(first.proposals[0]) == 3
    (plain, _), _ = build_eval_loader(table, EvalTransform(resize=resize))
    assert plain.proposals is None


def test_a_spoilt_picture_comes_out_of_the_workers_as_our_error(loaded) -> None:
    table, proposals = loaded
    path = proposals.file.path
    spoil(path, np.array([[1, 2, 3000, 4, 0.5]]))
    loader = build_eval_loader(table, EvalTransform(resize=SHORT), num_workers=1, proposals=open_proposals(path, table))
    with pytest.raises(DataError, match=r"a.jpg: 1 of 1 boxes are outside the picture of 100 x 80"):
        list(loader)


def test_workers_get_no_copy_of_the_boxes(tmp_path: Path) -> None:
    """What a worker that is not forked receives: where the file is, and which row has which picture."""
    table = table_of(NAMES)
    with write_proposals(tmp_path / "a", table, origin=ORIGIN) as writer:
        for _ in NAMES:
            writer.add(stored(*[(1, 2, 3, 4)] * 5000))
    proposals = open_proposals(tmp_path / "a", table)
    assert len(pickle.dumps(proposals)) < 3000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(len, (proposals,)) == 3
        assert len(pool.apply(TableProposals.__getitem__, (proposals, 2))) == 5000
