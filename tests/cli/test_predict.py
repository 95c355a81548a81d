"""`rcnn predict`: files, folders and patterns in; drawings, COCO results and CSV out; what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rcnn
from rcnn.evaluation.files import read_coco_results, read_csv

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture
def pictures(tiny, tmp_path: Path) -> Path:
    """Two pictures of one name in two folders, and a third."""
    folder = tmp_path / "pictures"
    for number, place in enumerate(("a/x.jpg", "b/x.jpg", "b/y.jpg"), start=1):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny.data / f"val/00000{number}.jpg", folder / place)
    return folder


def test_what_comes_out(tiny, rcnn_command, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    sources = [pictures / "a/x.jpg", pictures / "b", pictures / "**/*.jpg"]
    code, printed, err = rcnn_command("predict", tiny.checkpoint, *sources, "-o", out, "-t", 0.2)
    assert (code, err) == (0, "")
    paths = [pictures / place for place in ("a/x.jpg", "b/x.jpg", "b/y.jpg")]
    names = sorted(path.name for path in (out / "pictures").iterdir())
    assert len(names) == 3 and names[-1] == "y.png" and names[0].endswith("_a_x.jpg.png")
    assert f"results: {out}" in printed
    predictor = rcnn.load(tiny.checkpoint)
    expected = predictor.predict(paths)
    for path, found in zip(paths, expected, strict=True):
        shown = int((found.scores >= 0.2).sum())
        assert f"{path}: {shown} with a score of 0.2 and more, {len(found)} in all" in printed
    by_number = read_coco_results(out / "detections.json", predictor.classes)
    by_file = read_csv(out / "detections.csv", predictor.classes, {str(path): n for n, path in enumerate(paths, 1)})
    for table in (by_number, by_file):
        assert table.image_ids.tolist() == [n for n, found in enumerate(expected, 1) for _ in range(len(found))]
        np.testing.assert_allclose(table.boxes_xyxy, torch.cat([f.boxes_xyxy for f in expected]), atol=2e-4)
        np.testing.assert_allclose(table.scores, torch.cat([f.scores for f in expected]), atol=1e-7)
        assert table.labels.tolist() == torch.cat([found.labels for found in expected]).tolist()
    rows = json.loads((out / "detections.json").read_text())
    assert {row["file_name"] for row in rows} == {str(path) for path in paths}
    with (out / "detections.csv").open() as file:
        assert next(csv.reader(file)) == ["file", "class", "score", "x1", "y1", "x2", "y2"]


def test_drawings_show_the_picture(tiny, rcnn_command, pictures: Path, tmp_path: Path) -> None:
    rcnn_command("predict", tiny.checkpoint, pictures / "b/y.jpg", "-o", tmp_path / "none", "-t", 1)
    rcnn_command("predict", tiny.checkpoint, pictures / "b/y.jpg", "-o", tmp_path / "all", "-t", 0)
    none, every = (np.asarray(Image.open(tmp_path / name / "pictures/y.png")) for name in ("none", "all"))
    np.testing.assert_array_equal(none, np.asarray(Image.open(pictures / "b/y.jpg")))
    assert (none != every).any()
    assert rcnn_command("predict", tiny.checkpoint, pictures, "-o", tmp_path / "files", "--no-draw")[0] == 0
    assert sorted(os.listdir(tmp_path / "files")) == ["detections.csv", "detections.json"]


def test_one_unreadable_picture_does_not_stop_the_others(tiny, rcnn_command, pictures: Path, tmp_path: Path) -> None:
    (pictures / "a/x.jpg").write_bytes((pictures / "a/x.jpg").read_bytes()[:700])
    (pictures / "b/empty.png").write_bytes(b"")
    out = tmp_path / "out"
    code, printed, err = rcnn_command("predict", tiny.checkpoint, pictures, "-o", out)
    assert code == 1
    assert "the picture cannot be read (2 problems)" in err
    assert "a/x.jpg: the file is cut short or damaged" in err
    assert "b/empty.png: the file is empty (0 bytes)" in err
    assert printed.count("in all") == 2
    assert len(os.listdir(out / "pictures")) == 2
    files = {row["file_name"] for row in json.loads((out / "detections.json").read_text())}
    assert files == {str(pictures / "b/x.jpg"), str(pictures / "b/y.jpg")}


def test_odd_pictures(tiny, rcnn_command, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 4), dtype=np.uint8)
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "alpha.png")
    Image.fromarray(pixels[:, :, 0]).save(folder / "grey.jpg")
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels[:, :, :3]).save(folder / "turned.jpg", exif=turned)
    code, _, _ = rcnn_command("predict", tiny.checkpoint, folder, "-o", tmp_path / "out")
    assert code == 0
    sizes = {}
    for path in (tmp_path / "out/pictures").iterdir():
        with Image.open(path) as image:
            sizes[path.stem] = image.size
    assert sizes == {"alpha": (80, 60), "grey": (80, 60), "deep": (80, 60), "turned": (60, 80)}


def test_what_is_no_picture_is_told_before_anything_is_done(tiny, rcnn_command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sources = [tmp_path / "nowhere.jpg", tmp_path / "*.bmp", tmp_path / "empty"]
    code, _, err = rcnn_command("predict", tiny.checkpoint, *sources, "-o", tmp_path / "out")
    assert code == 1
    assert "(3 problems)" in err
    assert "nowhere.jpg: there is no such file; allowed: pictures (.bmp, .gif" in err
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written(tiny, rcnn_command, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, printed, err = rcnn_command("predict", tiny.checkpoint, pictures, "-o", tmp_path / "file/out")
    assert (code, printed) == (1, "")
    assert "cannot be written: Not a directory; choose another place" in err


def test_what_is_no_checkpoint(tiny, rcnn_command, pictures: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    code, _, err = rcnn_command("predict", tmp_path / "a.pth", pictures, "-o", tmp_path / "out")
    assert code == 1
    assert "convert it: rcnn convert FILE --from SYSTEM -o OUT.safetensors" in err
    code, _, err = rcnn_command("predict", tiny.run, pictures, "-o", tmp_path / "out")
    assert code == 1
    assert f"Is a directory; there is: {tiny.checkpoint}" in err
