"""Files of weights on the web, from a server of this machine: fetched once, each in a place of its own, verified
whenever they are used, never there in part."""

from __future__ import annotations

import hashlib
import os
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.hub
import torchvision

from rcnn.download import digest_in, fetch_weights, is_url, place_of
from rcnn.errors import DownloadError

CONTENT = b"weights" * 1000
OTHER = b"numbers" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


def never(text: str) -> None:
    raise AssertionError(text)


def test_an_address_is_told_from_a_file() -> None:
    assert is_url("http://a/b.pth") and is_url("https://a/b.pth")
    assert not any(is_url(name) for name in ("b.pth", "/a/b.pth", "file:///a/b.pth", "open-mmlab://a", "C:/b.pth"))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("resnet50-0676ba61.pth", "0676ba61"),  # torchvision's
        ("faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth", "047c8118"),  # MMDetection's
        (f"a-{HASH}.safetensors", HASH),
        ("model_final.pth", None),
        ("model_final_280758.pkl", None),  # detectron2's
        ("fcos-20200130.pth", None),  # a day
        ("fcos-2020.pth", None),
    ],
)
def test_names_that_promise_a_digest(name: str, digest: str | None) -> None:
    assert digest_in(name) == digest


@pytest.mark.parametrize("name", [f"fcos-{HASH[:8]}.pth", f"resnet-{HASH}.pth"])
def test_a_name_with_a_digest_lies_where_torch_has_it(web, name: str) -> None:
    """Fetched by torch.hub, used by us, and the other way round; from whatever address."""
    url, other = web.serve(f"/a/{name}", CONTENT), web.serve(f"/b/{name}", CONTENT)
    assert fetch_weights(f"{url}#part", otherwise="go") == web.cache / name == place_of(other)
    assert (web.cache / name).read_bytes() == CONTENT
    assert fetch_weights(other, otherwise="go") == web.cache / name
    assert web.asked == [f"/a/{name}"]
    assert os.listdir(web.cache) == [name]


def test_what_torch_fetched_is_used(web) -> None:
    file = BytesIO()
    torch.save({"a": torch.ones(1)}, file)
    content = file.getvalue()
    url = web.serve(f"/x-{hashlib.sha256(content).hexdigest()[:8]}.pth", content)
    torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True)
    web.close()
    assert fetch_weights(url, otherwise="go").read_bytes() == content


def test_every_file_of_torchvision_lies_where_torch_has_it() -> None:
    """But those of quantized models, which no recipe names."""
    for model in torchvision.models.list_models(exclude="quantized_*"):
        for weights in torchvision.models.get_model_weights(model):
            assert place_of(weights.url).parent == Path(torch.hub.get_dir()) / "checkpoints"


@pytest.mark.parametrize("name", ["model_final.pth", "fcos-20200130.pth"])
def test_addresses_of_one_name_are_told_apart(web, name: str) -> None:
    """And what torch has of that name, which may be from anywhere, is none of them."""
    web.cache.mkdir(parents=True)
    (web.cache / name).write_bytes(b"of neither")
    urls = [web.serve(f"/a/{name}", CONTENT), web.serve(f"/b/{name}", OTHER), web.serve(f"/b/{name}?v=2", CONTENT)]
    said: list[str] = []
    found = [fetch_weights(url, otherwise="go", say=said.append) for url in urls]
    assert [path.read_bytes() for path in found] == [CONTENT, OTHER, CONTENT]
    assert len(set(found)) == 3 and {path.name for path in found} == {name}
    web.close()
    assert [fetch_weights(url, otherwise="go", say=said.append) for url in urls] == found
    assert len(web.asked) == 3
    assert said[:3] == [f"{url}: is being fetched ({path})" for url, path in zip(urls, found, strict=True)]
    assert said[3:] == [f"{url}: was fetched before ({path})" for url, path in zip(urls, found, strict=True)]
    with pytest.raises(DownloadError, match=f"of that name there is {web.cache / name}, from an address that is not"):
        fetch_weights(f"{web.address}/c/{name}", otherwise="go")


def test_the_digest_beside_a_file_is_that_of_sha256sum(web) -> None:
    path = fetch_weights(web.serve("/model.pth", CONTENT), otherwise="go")
    assert sorted(os.listdir(path.parent)) == ["model.pth", "model.pth.sha256"]
    subprocess.run(["sha256sum", "--check", "--strict", "model.pth.sha256"], cwd=path.parent, check=True)


@pytest.mark.parametrize(("name", "promise"), [("model.pth", HASH), (f"x-{HASH[:8]}.pth", HASH[:8])])
@pytest.mark.parametrize("content", [CONTENT[:-1], OTHER, b""])
def test_a_file_that_changed_is_refused_and_stays(web, name: str, promise: str, content: bytes) -> None:
    url = web.serve(f"/{name}", CONTENT)
    path = fetch_weights(url, otherwise="go")
    path.write_bytes(content)
    with pytest.raises(DownloadError) as caught:
        fetch_weights(url, otherwise="go")
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    assert problem.given == f"not the file of {url}: its SHA-256 is {hashlib.sha256(content).hexdigest()}"
    assert promise in problem.allowed and problem.remedy.startswith("delete it")
    assert path.read_bytes() == content
    path.unlink()
    assert fetch_weights(url, otherwise="go").read_bytes() == CONTENT


def test_a_file_that_was_put_there_by_hand(web) -> None:
    path = place_of(f"{web.address}/model.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(OTHER)
    assert fetch_weights(f"{web.address}/model.pth", otherwise="go") == path
    assert web.asked == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.pth", "404"),
        ("cut.pth", "ended after 3500 of 7000 bytes"),
        ("other-821213aa.pth", f"SHA-256 {HASH}, by its name one that begins 821213aa"),
    ],
)
def test_what_does_not_arrive_leaves_nothing(web, name: str, said: str) -> None:
    web.files.update({"/cut.pth": CONTENT, "/other-821213aa.pth": CONTENT})
    web.cut.add("/cut.pth")
    with pytest.raises(DownloadError) as caught:
        fetch_weights(f"{web.address}/{name}", otherwise="name another")
    place = place_of(f"{web.address}/{name}")
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
        fetch_weights(url, otherwise="go", say=never)


@pytest.mark.parametrize("url", ["http://[/a.pth", "http://a b/c.pth", f"http://127.0.0.1:9/{'a' * 300}.pth"])
def test_an_address_that_is_none(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DownloadError):
        fetch_weights(url, otherwise="go")
