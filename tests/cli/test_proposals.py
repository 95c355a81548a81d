"""`rcnn proposals`: a file and a checkpoint give the same numbers, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest
import safetensors.numpy

import rcnn
from rcnn.data.folder import read_dataset
from rcnn.data.proposals import ProposalFile
from rcnn.evaluation.recall import proposal_recall
from rcnn.evaluation.table import DetectionTable

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture(scope="module")
def dumped(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rcnn.recipes.proposing import dump_proposals

    path = tmp_path_factory.mktemp("proposals") / "val.safetensors"
    dump_proposals(tiny.checkpoint, path, data=str(tiny.data), device="cpu")
    return path


@pytest.fixture
def copied(dumped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(dumped, tmp_path / "copy.safetensors"))


def test_the_file_holds_what_the_detector_proposes(tiny, rcnn_command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = rcnn_command("proposals", "dump", tiny.checkpoint, "--data", tiny.data, "--device", "cpu")
    assert code == 0
    file = ProposalFile(Path("proposals-val.safetensors"))
    assert f"{file.num_proposals:,} proposals of 5 pictures: proposals-val.safetensors (0.0 MB)" in out
    assert 'split "val": 5 pictures, 18 boxes' in err
    assert (file.origin.detector, file.version, file.format) == ("best.safetensors", rcnn.__version__, "COCO")
    assert "backbone:" in file.origin.recipe
    table = read_dataset(tiny.data, split="val")
    for index, expected in enumerate(rcnn.load(tiny.checkpoint, device="cpu").propose([*map(table.path, range(5))])):
        assert 0 < len(file[index]) <= 20
        np.testing.assert_array_equal(file[index].boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_array_equal(file[index].scores, expected.scores)


def test_a_file_and_its_checkpoint_are_judged_alike(tiny, dumped, rcnn_command, tmp_path: Path) -> None:
    results = []
    for source in (dumped, tiny.checkpoint):
        files = ["--json", tmp_path / "new/n.json", "--chart", tmp_path / "c.svg"]
        code, out, err = rcnn_command("proposals", "eval", source, "--data", tiny.data, *files)
        assert code == 0
        assert 'split "val": 5 pictures, 18 boxes' in err
        assert "5 pictures, 18 boxes; proposals in a picture:" in out
        assert f"chart: {tmp_path}/c.svg" in out
        assert minidom.parse(str(tmp_path / "c.svg")).documentElement.tagName == "svg"
        results.append((json.loads((tmp_path / "new/n.json").read_text()), out))
    assert results[0] == results[1]
    numbers = results[0][0]
    assert set(numbers["classes"]) == {"circle", "square", "triangle", "star", "cross"}
    truth, file = read_dataset(tiny.data, split="val"), ProposalFile(dumped)
    found = file.read(0, 5)
    table = DetectionTable(
        image_ids=np.repeat(truth.image_ids, [len(one) for one in found]),
        boxes_xyxy=np.concatenate([one.boxes_xyxy for one in found]).astype(np.float64),
        scores=np.concatenate([one.scores for one in found if one.scores is not None]),
        labels=np.zeros(file.num_proposals, np.int64),
    )
    expected = proposal_recall(truth, table)
    assert numbers["AR@10"] == expected.average[0]
    assert numbers["recall"]["10"]["0.50"] == expected.recall[0, 0]
    assert numbers["AR@1000"] == numbers["AR@50"] > 0, "20 proposals at most"
    assert (
        numbers["perfect_second_stage"]["10"]["right_boxes_too"]["AP"]
        >= (numbers["perfect_second_stage"]["10"]["right_classes"]["AP"])
    )


def test_two_processes_write_the_file_of_one(tiny, dumped, tmp_path: Path) -> None:
    """Five pictures: one process has three, the other two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rcnn"]
    arguments = ["proposals", "dump", tiny.checkpoint, "--data", tiny.data, "-o", tmp_path / "two", "--device", "cpu"]
    done = subprocess.run(
        [*command, *map(str, arguments)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("proposals of 5 pictures") == 1
    one, two = ProposalFile(dumped), ProposalFile(tmp_path / "two")
    np.testing.assert_array_equal(two.starts, one.starts)
    for index in range(5):
        np.testing.assert_allclose(two[index].boxes_xyxy, one[index].boxes_xyxy, atol=1e-3)


def test_another_split_other_settings_and_the_rule_of_coco(tiny, rcnn_command, tmp_path: Path) -> None:
    path = tmp_path / "train"
    code, out, err = rcnn_command(
        "proposals", "dump", tiny.checkpoint, "--data", tiny.data, "--split", "train", "-o", path,
        "detector.proposals.test.post_nms=3",
    )  # fmt: skip
    assert code == 0
    assert "12 pictures" in out
    assert '"train" is the split that was trained on: mind the numbers' in err
    files = ["--json", tmp_path / "n.json", "--pairing", "score"]
    code, out, _ = rcnn_command("proposals", "eval", path, "--data", tiny.data, *files)
    assert code == 0
    assert "3.0 on average, 3 at most" in out
    assert json.loads((tmp_path / "n.json").read_text())["pairing"] == "score"


def test_classes_that_the_checkpoint_does_not_know_are_no_matter(tiny, rcnn_command, tmp_path: Path) -> None:
    """Proposals have no class."""
    shutil.copytree(tiny.data, tmp_path / "data")
    path = tmp_path / "data/annotations/instances_val.json"
    path.write_text(path.read_text().replace('"circle"', '"disc"'))
    code, out, _ = rcnn_command("proposals", "eval", tiny.checkpoint, "--data", tmp_path / "data", "--split", "val")
    assert code == 0
    assert "disc" in out


def test_some_pictures_of_a_split(tiny, dumped, rcnn_command, tmp_path: Path) -> None:
    """A file of pictures that were held out: only these are judged, and it is said."""
    shutil.copytree(tiny.data, tmp_path / "data")
    whole, part = tmp_path / "data/annotations/instances_val.json", tmp_path / "data/annotations/instances_part.json"
    content = json.loads(whole.read_text())
    shutil.copytree(tmp_path / "data/val", tmp_path / "data/part")
    part.write_text(json.dumps({**content, "images": content["images"][:2], "annotations": content["annotations"][:1]}))
    arguments = ("proposals", "dump", tiny.checkpoint, "--data", tmp_path / "data", "--split", "part")
    assert rcnn_command(*arguments, "-o", tmp_path / "file")[0] == 0
    part.write_text(whole.read_text())
    code, out, err = rcnn_command("proposals", "eval", tmp_path / "file", "--data", tmp_path / "data")
    assert code == 0
    assert out.startswith("2 pictures")
    assert "these are the pictures of the file; the split has 5" in err


@pytest.fixture
def refused(tiny, rcnn_command):
    def call(verb: str, source: Path, *options: object, data: Path | None = None, expected: int = 1) -> str:
        code, out, err = rcnn_command("proposals", verb, source, "--data", data or tiny.data, *options)
        assert (code, out) == (expected, "")
        return err

    return call


def test_a_file_for_other_pictures(tiny, copied, refused, tmp_path: Path) -> None:
    err = refused("eval", copied, "--split", "train")
    assert f"{copied}: 12 of the 12 pictures of the data are not in it, the first" in err
    assert "it has 5 others (some have the same name, in another split or with another id)" in err
    assert 'allowed: proposals for split "train" (12 pictures)' in err
    assert 'these are for split "val" of COCO data' in err
    assert "rcnn proposals dump CHECKPOINT --data DIR" in err
    shutil.copytree(tiny.data, tmp_path / "data")
    path = tmp_path / "data/annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["images"][1]["file_name"] = "new.jpg"
    path.write_text(json.dumps(content))
    shutil.copy(tiny.data / "val/000001.jpg", tmp_path / "data/val/new.jpg")
    err = refused("eval", copied, data=tmp_path / "data")
    assert "1 of its 5 pictures are not in the data, the first" in err


def test_boxes_that_cannot_be(copied, refused) -> None:
    with safetensors.safe_open(copied, framework="np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(copied)
    rows = tensors["proposals"].copy()
    starts = tensors["starts"]
    rows[0, 2] = 5000
    rows[starts[1], :4] = [9, 2, 3, 4]
    rows[starts[2], 1] = np.nan
    safetensors.numpy.save_file(tensors | {"proposals": rows}, copied, metadata)
    err = refused("eval", copied)
    assert "(3 problems)" in err
    assert "boxes are outside the picture of" in err
    assert "boxes are reversed, the first (9, 2, 3, 4)" in err
    assert "boxes are not a number" in err
    assert err.count("allowed: 0 <= x1 <= x2 <= width") == 3


def test_what_is_neither_a_file_of_proposals_nor_a_checkpoint(copied, refused, tmp_path: Path) -> None:
    neither = "allowed: a file of proposals (rcnn proposals dump), or a checkpoint of ours (rcnn train, rcnn convert)"
    whole = copied.read_bytes()
    contents = {
        "truncated: ": whole[:-100],
        "truncated: 50 bytes, its header alone": whole[:50],
        "a pickle or zip": pickle.dumps({"boxes": []}),
        "no safetensors file": b"hello, I am a text" * 100,
        "an empty file": b"",
    }
    for complaint, content in contents.items():
        copied.write_bytes(content)
        err = refused("eval", copied)
        assert f"{copied}: {complaint}" in err
        assert neither in err
    assert "No such file" in refused("eval", tmp_path / "none")
    safetensors.numpy.save_file({"a": np.zeros(3)}, copied)
    assert "another safetensors file, not proposals" in refused("eval", copied)


def test_a_checkpoint_is_needed_to_dump(dumped, refused) -> None:
    err = refused("dump", dumped, "-o", dumped.parent / "x")
    assert "its description of itself is malformed" in err or "not a checkpoint" in err
    assert not (dumped.parent / "x").exists()


def test_a_file_has_no_recipe(dumped, refused) -> None:
    err = refused("eval", dumped, "detector.proposals.test.post_nms=3", "data.flip=0", "data.classes=[star]")
    assert "(2 problems)" in err
    assert err.count("a file of proposals has no recipe that could be changed; allowed: data.classes and data.bad") == 2
    assert 'class "disc" was chosen (data.classes), and the data have' in refused("eval", dumped, "data.classes=[disc]")
    assert "star more than once" in refused("eval", dumped, "data.classes=[star,star]")


def test_chosen_classes(tiny, dumped, rcnn_command, tmp_path: Path) -> None:
    """Of a file as of a checkpoint, by the command or by the recipe that the file was made by: as if there were no
    others."""
    content = json.loads((tiny.data / "annotations/instances_val.json").read_text())
    ids = {category["id"] for category in content["categories"] if category["name"] in ("star", "circle")}
    boxes = [one for one in content["annotations"] if one["category_id"] in ids]
    assert 0 < len(boxes) < 18
    chosen, path = "data.classes=[star,circle]", tmp_path / "chosen"
    dump = ("proposals", "dump", tiny.checkpoint, "--data", tiny.data, "-o", path, "--device", "cpu")
    assert rcnn_command(*dump, chosen)[0] == 0
    results = {}
    for name, arguments in {
        "the file": [dumped, chosen], "a file of these": [path], "all": [path, "data.classes=null"],
        "the checkpoint": [tiny.checkpoint, chosen],
    }.items():  # fmt: skip
        file = tmp_path / "n.json"
        code, _, err = rcnn_command("proposals", "eval", *arguments, "--data", tiny.data, "--json", file)
        assert code == 0, err
        results[name] = json.loads(file.read_text())
    assert list(results["the file"]["classes"]) == ["star", "circle"]
    assert results["the file"]["boxes"] == len(boxes)
    assert results["the file"] == results["a file of these"] == results["the checkpoint"]
    assert results["all"]["boxes"] == 18


def test_places_that_cannot_be_written(tiny, dumped, refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    err = refused("eval", dumped, "--json", tmp_path / "file/a.json", "--chart", tmp_path / "file/c.svg")
    assert "(2 problems)" in err
    assert "must end" not in err
    for place in (tmp_path / "file/out", tmp_path):
        err = refused("dump", tiny.checkpoint, "-o", place)
        assert f"{place}: cannot be written" in err
        assert "evaluating" not in err
    assert "does not end in .svg" in refused("eval", dumped, "--chart", tmp_path / "c.png", expected=2)


def test_a_damaged_picture_leaves_no_file(tiny, refused, tmp_path: Path) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    picture = tmp_path / "data/val/000003.jpg"
    picture.write_bytes(picture.read_bytes()[:900])
    err = refused("dump", tiny.checkpoint, "-o", tmp_path / "out/file", data=tmp_path / "data")
    assert "000003.jpg: the file is cut short or damaged" in err
    assert f"rcnn data check {tmp_path}/data --decode names all that cannot be used" in err
    assert list((tmp_path / "out").iterdir()) == []
