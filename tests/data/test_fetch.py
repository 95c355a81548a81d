from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rcnn.data.fetch import CATALOGUE, Archive, Source, fetch_dataset
from rcnn.errors import DownloadError


@dataclass
class Server:
    """Serves files from memory; may cut connections, and may not know ranges."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: list[str | None] = field(default_factory=list)  # asked for
    knows_ranges: bool = True
    cut_after: int | None = None
    address: str = ""

    def archive(self, name: str, data: bytes, md5: str | None = None) -> Archive:
        self.files[f"/{name}"] = data
        return Archive(url=f"{self.address}/{name}", md5=md5 or hashlib.md5(data).hexdigest())

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        data = self.files.get(handler.path)
        asked = handler.headers["Range"]
        self.ranges.append(asked)
        if data is None:
            handler.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.knows_ranges else 0
        if start >= len(data):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.wfile.write(data[start : self.cut_after])


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=lambda: http.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def zip_of(**files: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/"), text)
    return stream.getvalue()


def tar_of(*members: tuple[str, str | tarfile.TarInfo]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            if isinstance(content, str):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content.encode()))
            else:
                archive.addfile(content)
    return stream.getvalue()


def catalogue_of(*archives: Archive) -> dict[str, Source]:
    return {"small": Source(title="small", archives=archives, folder="kit")}


def test_fetch_and_unpack_then_nothing_more(server: Server, tmp_path: Path) -> None:
    catalogue = catalogue_of(
        server.archive("a.zip", zip_of(kit__one="1", kit__deep__two="2")),
        server.archive("b.tar", tar_of(("kit/three", "3"))),
    )
    seen = []
    folder = fetch_dataset(
        "small", tmp_path / "out", catalogue=catalogue, progress=lambda *arguments: seen.append(arguments)
    )
    assert folder == tmp_path / "out/kit"
    files = {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert files == {"one": "1", "deep/two": "2", "three": "3"}
    assert [name for name, done, total in seen if done == total] == ["a.zip", "b.tar"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".fetched.json", "kit"]  # archives are gone
    fetch_dataset("small", tmp_path / "out", catalogue=catalogue)
    assert len(server.ranges) == 2


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_an_interrupted_download_is_gone_on_with(server: Server, tmp_path: Path, knows_ranges: bool) -> None:
    data = zip_of(kit__one="1" * 5000)
    catalogue = catalogue_of(server.archive("a.zip", data))
    server.cut_after, server.knows_ranges = 1000, knows_ranges
    with pytest.raises(DownloadError, match="what has arrived is kept"):
        fetch_dataset("small", tmp_path, catalogue=catalogue)
    assert (tmp_path / "a.zip.part").stat().st_size == 1000
    server.cut_after = None
    assert (fetch_dataset("small", tmp_path, catalogue=catalogue) / "one").read_text() == "1" * 5000
    assert server.ranges == [None, "bytes=1000-"]


def test_a_part_that_is_whole_already(server: Server, tmp_path: Path) -> None:
    data = zip_of(kit__one="1")
    (tmp_path / "a.zip.part").write_bytes(data)
    fetch_dataset("small", tmp_path, catalogue=catalogue_of(server.archive("a.zip", data)))
    assert (tmp_path / "kit/one").read_text() == "1"


def test_a_wrong_checksum_is_deleted_and_said(server: Server, tmp_path: Path) -> None:
    data = zip_of(kit__one="1")
    catalogue = catalogue_of(server.archive("a.zip", data, md5="0" * 32))
    with pytest.raises(DownloadError) as raised:
        fetch_dataset("small", tmp_path, catalogue=catalogue)
    assert hashlib.md5(data).hexdigest() in str(raised.value)
    assert "allowed: " + "0" * 32 in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_have_it(server: Server, tmp_path: Path) -> None:
    catalogue = catalogue_of(Archive(url=f"{server.address}/absent.zip", md5=""))
    with pytest.raises(DownloadError, match=r"absent\.zip: the server answered 404"):
        fetch_dataset("small", tmp_path, catalogue=catalogue)


def test_no_server_at_all(tmp_path: Path) -> None:
    # Port 1 of this machine: refused at once.
    catalogue = catalogue_of(Archive(url="http://127.0.0.1:1/a.zip", md5=""))
    with pytest.raises(DownloadError, match="the server was not reached") as raised:
        fetch_dataset("small", tmp_path, catalogue=catalogue)
    assert len(raised.value.problems) == 1


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r'allowed: voc2007, .*did you mean "voc2007"\?'):
        fetch_dataset("voc207", tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written to"):
        fetch_dataset("voc2007", tmp_path / "file")


def link(name: str, target: str, kind: bytes) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


@pytest.mark.parametrize(
    "data",
    [
        tar_of(("fine", "1"), ("../evil", "1")),
        tar_of(("fine", "1"), ("/tmp/rcnn-evil", "1")),
        tar_of(("fine", "1"), ("a/../../evil", "1")),
        tar_of(("fine", "1"), link("inside", "..", tarfile.SYMTYPE), ("inside/evil", "1")),
        tar_of(("fine", "1"), link("hard", "/etc/passwd", tarfile.LNKTYPE)),
        tar_of(("fine", "1"), link("pipe", "", tarfile.FIFOTYPE)),
        zip_of(**{"fine": "1", "../evil": "1"}),
        zip_of(**{"fine": "1", "..\\evil": "1"}),
    ],
)
def test_archives_write_nothing_outside(server: Server, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DownloadError, match="nothing was unpacked"):
        fetch_dataset("small", tmp_path / "out", catalogue=catalogue_of(server.archive("a.bin", data)))
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out/fine").exists()


def test_a_damaged_archive(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="the archive is damaged"):
        fetch_dataset("small", tmp_path, catalogue=catalogue_of(server.archive("a.tar", b"x" * 5000)))


def test_the_catalogue_has_the_known_checksums() -> None:
    known = {archive.name: archive.md5 for source in CATALOGUE.values() for archive in source.archives}
    # torchvision.datasets.voc, and the md5sums that COCO's mirrors are checked with
    assert known == {
        "VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
        "VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
        "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
        "annotations_trainval2017.zip": "f4bbac642086de4f52a3fdda2de5fa2c",
        "val2017.zip": "442b8da7639aecaf257c1dceb8ba8c80",
        "train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2",
    }
