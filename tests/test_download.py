"""Files of weights on the web, from a server of this machine: fetched once, verified, never there in part."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from rcnn.download import fetch_weights, is_url, place_of
from rcnn.errors import DownloadError

CONTENT = b"weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "missing" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:100] if "cut" in self.path else CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(Server, "asked", [], raising=False)
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_is_told_from_a_file() -> None:
    assert is_url("http://a/b.pth") and is_url("https://a/b.pth")
    assert not any(is_url(name) for name in ("b.pth", "/a/b.pth", "file:///a/b.pth", "open-mmlab://a", "C:/b.pth"))


@pytest.mark.parametrize("name", ["plain.pth", f"fcos-{HASH[:8]}.pth", f"resnet-{HASH}.pth", "fcos_2020-04.pth"])
def test_fetched_once(address: str, tmp_path: Path, name: str) -> None:
    found = fetch_weights(f"{address}/a/b/{name}?download=true", otherwise="go")
    assert found == tmp_path / "hub" / "checkpoints" / name == place_of(f"{address}/{name}")
    assert found.read_bytes() == CONTENT
    assert fetch_weights(f"{address}/a/b/{name}", otherwise="go") == found
    assert Server.asked == [f"/a/b/{name}?download=true"]
    assert list(found.parent.iterdir()) == [found]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.pth", "404"),
        ("cut.pth", "ended after 100 of 7000 bytes"),
        ("other-821213aa.pth", f"SHA-256 {HASH}, by its name one that begins 821213aa"),
    ],
)
def test_what_does_not_arrive_leaves_nothing(address: str, name: str, said: str) -> None:
    with pytest.raises(DownloadError) as caught:
        fetch_weights(f"{address}/{name}", otherwise="name another")
    place = place_of(f"{address}/{name}")
    assert said in str(caught.value)
    assert f"put the file at {place}, or name another" in str(caught.value)
    assert list(place.parent.iterdir()) == []


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DownloadError) as caught:
        fetch_weights("http://127.0.0.1:9/fcos-821213aa.pth", otherwise="name another")
    assert len(caught.value.problems) == 1
    assert f"put the file at {tmp_path / 'checkpoints' / 'fcos-821213aa.pth'}" in str(caught.value)


@pytest.mark.parametrize("url", ["http://a", "http://a/", "http://a/b/..", "http://a/b%0Ac.pth"])
def test_an_address_without_a_file(url: str) -> None:
    with pytest.raises(DownloadError, match="without the name of a file"):
        fetch_weights(url, otherwise="go")


@pytest.mark.parametrize("url", ["http://[/a.pth", "http://a b/c.pth"])
def test_an_address_that_is_none(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DownloadError):
        fetch_weights(url, otherwise="go")
