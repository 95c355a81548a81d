"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rcnn.atomic_file import open_atomically, refuse_unwritable, write_atomically
from rcnn.errors import RunError


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "new folder" / "kept.json"
    write_atomically(path, "old")

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(RunError, match="the disk is full") as caught:
            patch.setattr(os, function, full_disk)
            write_atomically(path, "new")
        assert f"the previous file is intact: {path}" in str(caught.value)
        assert path.read_text() == "old"
        assert [one.name for one in path.parent.iterdir()] == ["kept.json"]


def test_unwritable_places_are_told_before_the_work_and_together(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file" / "a.json", tmp_path / "good" / "b.json", tmp_path]
    with pytest.raises(RunError) as caught:
        refuse_unwritable(places)
    assert [problem.where for problem in caught.value.problems] == [str(places[0]), str(tmp_path)]
    assert "cannot be written: File exists; choose another place" in str(caught.value)
    assert "Is a directory" in str(caught.value)
    assert os.listdir(tmp_path / "good") == []


def test_a_file_in_pieces_is_whole_or_not_there(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "new folder" / "kept.bin"
    with open_atomically(path) as file:
        file.write(b"12")
        assert not path.exists()
        file.write(b"34")
        file.seek(0)
        file.write(b"0")
    assert path.read_bytes() == b"0234"
    with pytest.raises(ValueError, match="ours"), open_atomically(path) as file:
        file.write(b"new")
        raise ValueError("ours")
    with pytest.raises(RunError, match=r"the disk is full: .* free") as caught, open_atomically(path) as file:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "needed" not in str(caught.value), "how much will come is not known"
    assert f"the previous file is intact: {path}" in str(caught.value)
    assert path.read_bytes() == b"0234"
    assert [one.name for one in path.parent.iterdir()] == ["kept.bin"]
