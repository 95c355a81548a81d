"""Which files a person means, and names for what is made of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from rcnn.data.pictures import distinct_names, find_pictures
from rcnn.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "deep/er/c.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


def test_files_folders_and_patterns_each_picture_once(folder: Path) -> None:
    found = find_pictures([str(folder / "b.jpg"), str(folder), str(folder / "*.jpg"), str(folder / "**/*.webp")])
    assert [str(path.relative_to(folder)) for path in found] == ["b.jpg", "a.PNG", "deep/er/c.webp"]


def test_a_file_that_is_named_is_taken_whatever_its_name(folder: Path) -> None:
    assert find_pictures([str(folder / "notes.txt")]) == [folder / "notes.txt"]


def test_everything_without_a_picture_is_told_at_once(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        find_pictures([str(folder / "c.jpg"), str(folder / "empty"), str(folder / "*.gif"), str(folder / "b.jpg")])
    texts = [f"{problem.where}: {problem.given}" for problem in caught.value.problems]
    assert texts == [
        f"{folder}/c.jpg: there is no such file",
        f"{folder}/empty: a folder without pictures",
        f"{folder}/*.gif: no picture matches this pattern",
    ]


def test_no_two_names_are_equal() -> None:
    assert distinct_names([Path("x/a.jpg"), Path("x/b.jpg")]) == ["a", "b"]
    assert distinct_names([Path("x/a.jpg"), Path("y/a.jpg"), Path("x/a.png")]) == ["x_a.jpg", "y_a.jpg", "x_a.png"]
    # The long name of one can be the stem of another.
    assert distinct_names([Path("x/a.jpg"), Path("y/a.jpg"), Path("x_a.jpg.png")]) == [
        "x_a.jpg",
        "y_a.jpg",
        "x_a.jpg-2",
    ]
    names = distinct_names([Path(f"{os.sep}data/../a.jpg"), Path("a.png")])
    assert names == ["data_a.jpg", "a.png"]
