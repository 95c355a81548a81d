"""Files that are either whole or not there: written beside their place, flushed to the disk, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from rcnn.errors import Problem, RunError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def staged_path(path: Path) -> Path:
    """Where the new content of `path` lies until it is put in place: a fixed name, so that a cut can be found."""
    return path.with_name(f".{path.name}.new")


def stage(path: Path, content: bytes, *, total_bytes: int = 0, keeps: Path | None = None) -> Path:
    """Writes `content` beside `path` and flushes it to the disk; `path` itself stays as it is.

    Raises RunError; where the disk is full it says how much room is needed (`total_bytes` where this is one file of
    several) and which file (`keeps`, or `path`) is intact.
    """
    staged = staged_path(path)
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise RunError(_write_problem(keeps or path, total_bytes or len(content), error)) from error
    return staged


def put_in_place(path: Path) -> None:
    """Renames what `stage` wrote to `path`: readers see the old file or the new one, never a part."""
    try:
        os.replace(staged_path(path), path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise RunError(_write_problem(path, 0, error)) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """`stage` and `put_in_place`; makes the folder. Raises RunError, and leaves the old file as it was."""
    make_folder(path.parent)
    stage(path, content.encode() if isinstance(content, str) else content)
    try:
        put_in_place(path)
    except RunError:
        staged_path(path).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece; it takes the place of `path` when the block ends, and is gone where that failed.

    Makes the folder. Raises RunError, and leaves the old file as it was.
    """
    make_folder(path.parent)
    staged = staged_path(path)
    try:
        with staged.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(path)
    except OSError as error:
        raise RunError(_write_problem(path, 0, error)) from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes the folder where it is not there. Raises RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(_write_problem(folder, 0, error)) from error


def refuse_unwritable(files: Iterable[Path]) -> None:
    """Raises RunError with every file that cannot be written: asked before long work whose results they will hold."""
    problems = []
    for path in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            problems.append(_write_problem(path, 0, error))
    if problems:
        raise RunError(problems)


def _write_problem(path: Path, num_bytes: int, error: OSError) -> Problem:
    """`num_bytes`: what the file needs; 0 where that is not known yet."""
    kept = f"; the previous file is intact: {path}" if path.is_file() else ""
    if error.errno not in FULL_DISK:
        given = f"cannot be written: {error.strerror or error}"
        return Problem(where=str(path), given=given, remedy=f"choose another place{kept}")
    needed = f"{_amount(num_bytes)} are needed, " if num_bytes else ""
    return Problem(
        where=str(path),
        given=f"the disk is full: {needed}{_room(path.parent)} free",
        remedy=f"make room and go on (a training with --resume){kept}",
    )


def _room(folder: Path) -> str:
    try:
        return f"{_amount(shutil.disk_usage(folder).free)} are"
    except OSError:
        return "too little is"


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"
