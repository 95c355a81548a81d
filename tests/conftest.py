"""Fixtures of all tests. `shared` is the only way to the files beside the project."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with oracles, data and weights: $RCNN_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("RCNN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"the shared folder is absent ({folder}); set RCNN_SHARED to where it is")
    return folder


# A detector of half a megabyte on thumbnails: every path of the application in a second or two.
TINY = (
    "detector.backbone.name=test_resnet",
    "detector.image.short_side=64",
    "detector.image.max_long_side=96",
    "detector.neck.channels=16",
    "detector.roi.box_head.features=32",
    "detector.roi.sampler.total=32",
    "detector.proposals.train.pre_nms=100",
    "detector.proposals.train.post_nms=50",
    "detector.proposals.test.pre_nms=100",
    "detector.proposals.test.post_nms=20",
    "data.workers=0",
    "train.batch_size=4",
    "train.max_steps=3",
    "evaluate.pictures=2",
)


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A trained run, its data (12 pictures to train, 5 to evaluate, five classes) and what makes the recipe small."""

    data: Path
    run: Path
    overrides: tuple[str, ...]

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "best.safetensors"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """`rcnn train quickstart`, made small. Its tests share a worker: @pytest.mark.xdist_group("tiny")."""
    import rcnn
    from rcnn.data.shapes import draw_shapes_dataset

    root = tmp_path_factory.mktemp("tiny")
    draw_shapes_dataset(root / "data", train_images=12, val_images=5)
    rcnn.train(rcnn.recipe("quickstart", *TINY), run_folder=root / "run", data=root / "data", device="cpu")
    return Tiny(data=root / "data", run=root / "run", overrides=TINY)


@dataclass(kw_only=True)
class Web:
    """A server on this machine. `files`: what it answers, by path; `cut`: paths of which half arrives; `asked`: the
    paths that were wanted. `cache` is where torch would put what is fetched."""

    address: str
    cache: Path
    close: Callable[[], None]
    files: dict[str, bytes] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def serve(self, path: str, content: bytes) -> str:
        """The address at which it is then found."""
        self.files[path] = content
        return f"{self.address}{path}"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Web]:
    """A live server, and an empty $TORCH_HOME, for this process and those that it starts."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append(self.path)
            content = made.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if self.path in made.cut else content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})

    def close() -> None:
        if thread.is_alive():
            server.shutdown()
            thread.join()
            server.server_close()

    made = Web(address=f"http://127.0.0.1:{server.server_port}", cache=tmp_path / "torch/hub/checkpoints", close=close)
    thread.start()
    yield made
    close()


@pytest.fixture
def rcnn_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`rcnn_command(*arguments)`, in this process: exit code, standard output, standard error."""
    from rcnn.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        assert isinstance(end.value.code, int)
        assert "Traceback" not in streams.err
        return end.value.code, streams.out, streams.err

    return call
