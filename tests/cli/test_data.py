"""`rcnn data`, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rcnn.cli.main import main


@pytest.fixture
def rcnn(capsys):
    """`rcnn(*arguments)`: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["data", *map(str, arguments)])
        streams = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, streams.out, streams.err

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    Image.new("RGB", (100, 80)).save(root / "train/a.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 4]},
        ],
    }
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return root


def test_check_lists_findings_and_says_how_it_went(rcnn, folder: Path) -> None:
    code, out, _ = rcnn("check", folder)
    assert code == 0
    assert 'COCO, split "train": 1 pictures, 1 boxes, 1 classes' in out
    assert "warning: " in out
    assert "annotation 2: the box x1, y1, x2, y2 = 5, 5, 5, 9 has zero width or height" in out
    assert "0 errors, 1 warnings; 1 pictures looked at" in out


def test_check_fails_where_there_are_errors(rcnn, folder: Path) -> None:
    assert rcnn("check", folder, "--strict")[0] == 1
    picture = folder / "train/a.jpg"
    picture.write_bytes(picture.read_bytes()[:-2])
    assert rcnn("check", folder)[0] == 0
    code, out, _ = rcnn("check", folder, "--decode")
    assert code == 1
    assert "a.jpg: the file is cut short or damaged" in out


def test_check_of_nothing_says_what_it_looked_for(rcnn, tmp_path: Path) -> None:
    code, out, err = rcnn("check", tmp_path)
    assert (code, out) == (1, "")
    assert "found: an empty folder" in err
    assert "COCO: annotations/instances_SPLIT.json" in err


def test_stats(rcnn, shared: Path) -> None:
    code, out, err = rcnn("stats", shared / "data/bccd", "--split", "train")
    assert code == 0
    assert "Platelets" in out
    assert "empty pictures: 0 of 205" in out
    assert "1 of 2,805 boxes was left out" in err


def test_convert(rcnn, folder: Path, tmp_path: Path) -> None:
    code, out, _ = rcnn("convert", folder, "--to", "yolo", "-o", tmp_path / "new")
    assert code == 0
    assert "1 pictures and 1 boxes written to" in out
    assert rcnn("check", tmp_path / "new")[0] == 0
    code, _, err = rcnn("convert", folder, "--to", "yolo", "-o", tmp_path / "new")
    assert code == 1
    assert "nothing is overwritten" in err


@pytest.mark.parametrize("arguments", [("--to", "xml"), ("--to", "voc", "--pictures", "move")])
def test_convert_knows_its_choices(rcnn, folder: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, _, err = rcnn("convert", folder, *arguments, "-o", tmp_path / "new")
    assert code == 2
    assert "is none of" in err


def test_fetch_lists_what_there_is_and_hints_at_a_wrong_name(rcnn) -> None:
    code, out, _ = rcnn("fetch")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} == {"voc2007", "voc2012", "coco2017", "coco2017-val"}
    code, _, err = rcnn("fetch", "voc207")
    assert code == 1
    assert 'did you mean "voc2007"?' in err
