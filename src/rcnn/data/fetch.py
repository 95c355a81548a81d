"""Data sets that are fetched by name: download, go on after an interruption, verify, unpack."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rcnn.errors import DownloadError, Problem, nearest

_TIMEOUT_S = 30
_CHUNK_BYTES = 1 << 20
# In the folder of a data set: the checksums of the archives that were unpacked there.
_RECORD = ".fetched.json"

# Called with the archive's name, the bytes there, and the bytes in all (None where the server does not say).
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A file to download and unpack; `md5` is that of the file that everybody has."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set by name: its archives, where it lies after unpacking, and what people should know."""

    title: str
    archives: tuple[Archive, ...]
    folder: str  # below the output folder; what --data takes


_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
_COCO = "http://images.cocodataset.org"
_COCO_ANNOTATIONS = Archive(
    url=f"{_COCO}/annotations/annotations_trainval2017.zip", md5="f4bbac642086de4f52a3fdda2de5fa2c"
)
_COCO_VAL = Archive(url=f"{_COCO}/zips/val2017.zip", md5="442b8da7639aecaf257c1dceb8ba8c80")
_COCO_TRAIN = Archive(url=f"{_COCO}/zips/train2017.zip", md5="cced6f7f71b7629ddf16f17bbcfab6b2")

CATALOGUE: Mapping[str, Source] = {
    "voc2007": Source(
        title="PASCAL VOC 2007: 9,963 pictures, 20 classes, train, val and test",
        archives=(
            Archive(url=f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar", md5="c52e279531787c972589f7e41ab4ae64"),
            Archive(url=f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar", md5="b6e924de25625d8de591ea690078ad9f"),
        ),
        folder="VOCdevkit/VOC2007",
    ),
    "voc2012": Source(
        title="PASCAL VOC 2012: 11,540 pictures with boxes, 20 classes, train and val",
        archives=(Archive(url=f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar", md5="6cd6e144f989b92b3379bac3b3de84fd"),),
        folder="VOCdevkit/VOC2012",
    ),
    "coco2017": Source(
        title="COCO 2017: 118,287 pictures to train, 5,000 to evaluate, 80 classes (20 GB)",
        archives=(_COCO_ANNOTATIONS, _COCO_VAL, _COCO_TRAIN),
        folder=".",
    ),
    "coco2017-val": Source(
        title="COCO 2017, the 5,000 pictures of val2017 only (1 GB)",
        archives=(_COCO_ANNOTATIONS, _COCO_VAL),
        folder=".",
    ),
}


def fetch_dataset(
    name: str,
    out: Path | str,
    *,
    catalogue: Mapping[str, Source] = CATALOGUE,
    progress: Progress = lambda name, done, total: None,
) -> Path:
    """Fetch and unpack a data set; the folder that it lies in afterwards. What is there already is not fetched again.

    An interrupted download goes on where it stopped. Raises `DownloadError` for an unknown name, a server that is not
    reached, a wrong checksum, a full disk, and an archive that would write outside `out`.
    """
    if name not in catalogue:
        allowed = ", ".join(catalogue)
        raise DownloadError(
            Problem(
                where=name, given="no data set of that name", allowed=allowed, remedy=nearest(name, list(catalogue))
            )
        )
    source, out = catalogue[name], Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        done = _read_record(out)
        for archive in source.archives:
            if done.get(archive.name) == archive.md5:
                continue
            file = _download(archive, out, progress)
            _unpack(file, out)
            done[archive.name] = archive.md5
            (out / _RECORD).write_text(json.dumps(done, indent=1))
            file.unlink()
    except OSError as error:
        raise DownloadError(
            Problem(
                where=str(out),
                given=f"cannot be written to ({error.strerror or error})",
                remedy="make room or choose another",
            )
        ) from error
    return out / source.folder


def _read_record(out: Path) -> dict[str, str]:
    try:
        return dict(json.loads((out / _RECORD).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _download(archive: Archive, out: Path, progress: Progress) -> Path:
    """The archive, verified, in `out`. The part that is there is gone on with where the server can do that."""
    file, part = out / archive.name, out / f"{archive.name}.part"
    if not file.exists():
        _receive(archive, part, progress)
        part.rename(file)
    digest = _md5(file)
    if digest != archive.md5:
        file.unlink()
        given = f"the file that arrived has the md5 {digest}"
        remedy = "it was deleted; try again, and if it stays so the server has another file"
        raise DownloadError(Problem(where=archive.url, given=given, allowed=archive.md5, remedy=remedy))
    return file


def _receive(archive: Archive, part: Path, progress: Progress) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            goes_on = response.status == http.HTTPStatus.PARTIAL_CONTENT
            have = have if goes_on else 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with part.open("ab" if goes_on else "wb") as file:
                for chunk in _chunks(response):
                    _write(file, chunk, part)
                    have += len(chunk)
                    progress(archive.name, have, total)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all of it was there already; the checksum says whether it is right
        raise _failed(archive, f"the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, http.client.HTTPException, ConnectionError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise _failed(archive, f"the server was not reached ({reason})") from error
    if total is not None and have < total:
        raise _failed(archive, f"the connection ended after {have:,} of {total:,} bytes")


def _write(file: IO[bytes], chunk: bytes, part: Path) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        given = f"cannot be written ({error.strerror})"
        remedy = "make room and try again: it goes on where it stopped"
        raise DownloadError(Problem(where=str(part), given=given, remedy=remedy)) from error


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while chunk := response.read(_CHUNK_BYTES):
        yield chunk


def _failed(archive: Archive, given: str) -> DownloadError:
    remedy = "check the connection (or a proxy: https_proxy) and try again; what has arrived is kept"
    return DownloadError(Problem(where=archive.url, given=given, remedy=remedy))


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(file: Path, out: Path) -> None:
    """Unpack into `out`, and nowhere else: no absolute names, no way up, no links, no devices."""
    try:
        if zipfile.is_zipfile(file):
            _unpack_zip(file, out)
        else:
            _unpack_tar(file, out)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DownloadError(Problem(where=str(file), given=f"the archive is damaged ({error})")) from error


def _unpack_zip(file: Path, out: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        for member in members:
            _check_name(file, out, member.filename)
        for member in members:
            target = out / member.filename
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            with archive.open(member) as content:
                _write_member(content, target)


def _unpack_tar(file: Path, out: Path) -> None:
    with tarfile.open(file) as archive:
        members = archive.getmembers()
        for member in members:
            _check_name(file, out, member.name)
            if not (member.isfile() or member.isdir()):
                raise _outside(file, f'"{member.name}" is neither a file nor a folder')
        for member in members:
            target = out / member.name
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            content = archive.extractfile(member)
            assert content is not None
            with content:
                _write_member(content, target)


def _write_member(content: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as opened:
        shutil.copyfileobj(content, opened, _CHUNK_BYTES)


def _check_name(file: Path, out: Path, name: str) -> None:
    root = out.resolve()
    target = Path(os.path.normpath(root / name.replace("\\", "/")))
    if not target.is_relative_to(root) or not (root / name).resolve().is_relative_to(root):
        raise _outside(file, f'"{name}" lies outside the folder')


def _outside(file: Path, given: str) -> DownloadError:
    return DownloadError(
        Problem(where=str(file), given=given, remedy="the archive is not to be trusted; nothing was unpacked")
    )
