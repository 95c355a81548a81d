"""Trainings from recipes: what they leave, how they start and go on, every layout and option, and what ends them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rcnn
from rcnn.config.edit import edit
from rcnn.config.text import load_yaml
from rcnn.engine.checkpoint import read_weights
from rcnn.engine.run_folder import RunFolder
from rcnn.errors import CheckpointError, DataError, ImageError, RecipeError, RunError
from rcnn.recipes.catalogue import faster_rcnn_vgg16, quickstart
from rcnn.recipes.recipe import AdamSpec, AdamWSpec, CosineSpec, MultiStepSpec, Recipe, SGDSpec, TrainSpec, WarmUpSpec
from rcnn.recipes.training import TrainResult, build_optimizer, build_schedule, resume

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture
def train(tiny, tmp_path: Path):
    """`train(*overrides, data=..., run=...)`: a tiny training into `tmp_path / run`."""

    def call(*overrides: str, data: Path | None = None, run: str = "run", **options: Any) -> TrainResult:
        recipe = rcnn.recipe("quickstart", *tiny.overrides, *overrides)
        return rcnn.train(recipe, run_folder=tmp_path / run, data=data or tiny.data, device="cpu", **options)

    return call


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return dict(read_weights(run / "checkpoints" / f"{name}.safetensors").state_dict)


def assert_same_weights(one: Path, other: Path, name: str = "last") -> None:
    torch.testing.assert_close(weights(one, name), weights(other, name), rtol=0, atol=0)


def test_what_a_run_leaves(tiny) -> None:
    run = RunFolder(tiny.run)
    recipe = load_yaml(run.recipe, Recipe)
    assert recipe.data.path == str(tiny.data)
    assert recipe.detector.image.short_side == 64
    rows = list(run.rows())
    assert [row["kind"] for row in rows] == ["train", "evaluation"]
    assert {"step", "lr", "loss", "loss/rpn_box", "loss/roi_box", "images_per_second"} <= set(rows[0])
    assert {"AP", "AP50", "AR@100", "mAP"} <= set(rows[1])
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "best.safetensors", "last.safetensors", "last.state.pt"
    ]  # fmt: skip
    assert sorted(path.name for path in run.predictions.glob("*.png")) == ["000001.png", "000005.png"]
    assert len(list((run.predictions / "step-000003").glob("*.png"))) == 2
    page = run.report.read_text()
    assert "circle" in page and ";base64," in page


def test_tensorboard_has_curves_and_pictures(tiny) -> None:
    events = EventAccumulator(str(tiny.run / "tensorboard"))
    events.Reload()
    scalars, images = events.Tags()["scalars"], events.Tags()["images"]
    assert {"train/loss", "train/lr", "train/loss/rpn_classification", "evaluation/AP", "evaluation/mAP"} <= set(
        scalars
    )
    assert images == ["predictions/000001", "predictions/000005"]


def test_what_a_checkpoint_says(tiny) -> None:
    for name in ("best", "last"):
        meta = read_weights(tiny.run / "checkpoints" / f"{name}.safetensors").meta
        assert meta.classes.names == ("circle", "square", "triangle", "star", "cross")
        assert meta.version == rcnn.__version__
        assert meta.recipe == (tiny.run / "recipe.yaml").read_text()
        assert meta.step == 3


def test_rcnn_evaluate_gives_the_trainings_own_numbers(tiny) -> None:
    row = list(RunFolder(tiny.run).rows())[-1]
    evaluation = rcnn.evaluate(tiny.checkpoint, data=tiny.data)
    expected = {name: row[name] for name, _ in evaluation.coco.items()}
    assert dict(evaluation.coco.items()) == expected
    assert evaluation.voc[1].mean_ap == row["mAP"]
    assert max(expected.values()) > 0


def test_the_same_seed_gives_the_same_weights(tiny, train, tmp_path: Path) -> None:
    train()
    assert_same_weights(tiny.run, tmp_path / "run")
    train("train.seed=1", run="other")
    assert not torch.equal(weights(tiny.run)["roi.predictor.classes.weight"],
                           weights(tmp_path / "other")["roi.predictor.classes.weight"])  # fmt: skip


def test_a_training_that_goes_on_with_more_steps(tiny, train, tmp_path: Path) -> None:
    """A constant rate, so that the length of the training is not in the first steps."""
    constant = ("train.schedule.type=multi_step", "train.schedule.milestones=[]", "train.warm_up=null")
    train(*constant, "train.max_steps=8", run="whole")
    train(*constant, "train.max_steps=4", run="cut")
    result = resume(tmp_path / "cut", overrides=["train.max_steps=8"], device="cpu")
    assert result.summary.step == 8
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert load_yaml(tmp_path / "cut/recipe.yaml", Recipe).train.max_steps == 8


def test_a_finished_run_is_judged_again_and_stays(tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.run, tmp_path / "run")
    result = resume(tmp_path / "run", device="cpu")
    assert result.evaluation is not None
    assert_same_weights(tiny.run, tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == (tiny.run / "metrics.jsonl").read_text()


def test_the_best_checkpoint_is_judged_in_the_end(tiny, train) -> None:
    """Three evaluations; the table is that of the best one, whichever it is."""
    result = train("train.max_steps=null", "train.epochs=3", "evaluate.every_epochs=1")
    rows = [row for row in result.run.rows() if row["kind"] == "evaluation"]
    assert [row["step"] for row in rows] == [3, 6, 9]
    best = max(rows, key=lambda row: row["AP"])
    assert result.summary.best_step == best["step"]
    assert result.evaluation is not None
    assert dict(result.evaluation.coco.items())["AP50"] == best["AP50"]


def test_started_from_a_checkpoint_of_the_same_classes(tiny, train) -> None:
    # The first step of the warm-up is a millionth of the rate: the weights are those that it started from.
    result = train("train.max_steps=1", "train.warm_up.factor=0", init_from=tiny.checkpoint)
    start, now = weights(tiny.run, "best"), weights(result.run.path)
    learned = [name for name in start if "running" not in name and "tracked" not in name]
    torch.testing.assert_close({n: now[n] for n in learned}, {n: start[n] for n in learned}, rtol=0, atol=0)


def renamed(tiny, root: Path, **names: str) -> Path:
    """The tiny data with classes of other names."""
    shutil.copytree(tiny.data, root)
    for path in root.glob("annotations/*.json"):
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["name"] = names.get(category["name"], category["name"])
        path.write_text(json.dumps(content))
    return root


def test_started_from_a_checkpoint_of_other_classes(tiny, train, tmp_path: Path) -> None:
    """Everything but the predictor is taken."""
    data = renamed(tiny, tmp_path / "data", circle="disc")
    result = train("train.max_steps=1", "train.warm_up.factor=0", init_from=tiny.checkpoint, data=data)
    start, now = weights(tiny.run, "best"), weights(result.run.path)
    assert torch.equal(now["proposals.head.tower.deltas.weight"], start["proposals.head.tower.deltas.weight"])
    assert not torch.equal(now["roi.predictor.classes.weight"], start["roi.predictor.classes.weight"])
    assert read_weights(result.run.last).meta.classes.names[0] == "disc"


def test_started_from_another_structure(tiny, train, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="a detector of another structure; choose the recipe that it was"
    ) as caught:
        train("detector.roi.box_head.features=64", init_from=tiny.checkpoint)
    assert caught.value.problems[0].where == str(tiny.checkpoint)
    assert "roi.box_head.fc6.weight" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.precision=bf16",),
        ("train.optimizer.type=sgd", "train.optimizer.lr=0.01", "train.clip_norm=1.0"),
        ("train.optimizer.type=adam", "train.schedule.type=multi_step"),
        ("train.accumulate=2", "train.max_steps=2"),
        ("data.short_sides=[48, 64]", "data.skip_empty=true", "evaluate.metric=voc"),
        ("detector.roi.regression=agnostic", "detector.roi.pooling.type=roi_pool", "train.clip_norm=null"),
    ],
    ids=" ".join,
)
def test_other_ways_to_train(train, overrides: tuple[str, ...]) -> None:
    result = train(*overrides)
    assert result.summary.step in (2, 3)
    row = next(result.run.rows())
    assert np.isfinite([row["loss"], row["gradient_norm"]]).all()
    assert all(value.dtype != torch.bfloat16 for value in weights(result.run.path).values())


def test_loss_falls(train) -> None:
    changes = ("train.max_steps=40", "train.epochs=40", "train.optimizer.lr=0.001", "train.warm_up=null")
    result = train(*changes, "evaluate.every_epochs=40")
    rows = [row["loss"] for row in result.run.rows() if row["kind"] == "train"]  # means of 20 steps
    assert rows[1] < 0.9 * rows[0]


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_other_layouts_of_the_same_data(tiny, train, tmp_path: Path, rcnn_command, kind: str) -> None:
    """The same pictures and boxes (but for rounding and the order of classes): the first stage learns the same."""
    shutil.copytree(tiny.data, tmp_path / "coco")
    for picture in (tmp_path / "coco/val").iterdir():  # VOC keeps all pictures in one folder
        picture.rename(picture.with_name(f"val-{picture.name}"))
    annotations = tmp_path / "coco/annotations/instances_val.json"
    annotations.write_text(annotations.read_text().replace('"file_name": "', '"file_name": "val-'))
    assert rcnn_command("data", "convert", tmp_path / "coco", "--to", kind, "-o", tmp_path / kind)[0] == 0
    result = train(data=tmp_path / kind)
    assert result.evaluation is not None
    assert (result.evaluation.truth.format, len(result.evaluation.truth)) == (kind.upper(), 5)
    classes = read_weights(result.run.last).meta.classes.names
    assert set(classes) == {"circle", "square", "triangle", "star", "cross"}
    row, expected = next(result.run.rows()), next(RunFolder(tiny.run).rows())
    assert row["loss/rpn_classification"] == pytest.approx(expected["loss/rpn_classification"], rel=0.02)


def test_real_pictures_in_voc_layout(shared: Path, train, tmp_path: Path) -> None:
    """A slice of bccd: four pictures to train, two to test."""
    source, target = shared / "data/bccd", tmp_path / "bccd"
    for split, count in (("train", 4), ("test", 2)):
        stems = (source / f"ImageSets/Main/{split}.txt").read_text().split()[:count]
        (target / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (target / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems))
        for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
            (target / folder).mkdir(exist_ok=True)
            for stem in stems:
                shutil.copy(source / folder / f"{stem}.{suffix}", target / folder)
    result = train(data=target)
    assert result.evaluation is not None
    assert (result.evaluation.truth.split, len(result.evaluation.truth)) == ("test", 2)
    assert read_weights(result.run.last).meta.classes.names == ("Platelets", "RBC", "WBC")


def test_without_a_split_to_evaluate_on(tiny, train, tmp_path: Path) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    (tmp_path / "data/annotations/instances_val.json").unlink()
    held_out = train(data=tmp_path / "data")
    assert held_out.evaluation is not None
    assert len(held_out.evaluation.truth) == 2  # a fifth of twelve
    again = rcnn.evaluate(held_out.run.best, data=tmp_path / "data")
    assert dict(again.coco.items()) == dict(held_out.evaluation.coco.items())
    blind = train("data.holdout=0", data=tmp_path / "data", run="blind")
    assert blind.evaluation is None
    assert not blind.run.best.exists() and blind.run.last.exists()
    assert not blind.run.report.exists()


def test_a_training_that_is_never_evaluated(tiny, tmp_path: Path, rcnn_command) -> None:
    """The last checkpoint alone, trained as with evaluations, and it is said; data to evaluate on are not looked at."""
    shutil.copytree(tiny.data, tmp_path / "data")
    annotations = tmp_path / "data/annotations/instances_val.json"
    whole = annotations.read_text()
    annotations.write_text("{")
    arguments = ["train", "quickstart", "--data", tmp_path / "data", *tiny.overrides, "evaluate.every_epochs=0"]
    code, out, err = rcnn_command(*arguments, "-o", tmp_path / "run", "--device", "cpu")
    assert code == 0, err
    assert "no evaluation: evaluate.every_epochs is 0; the last checkpoint is kept, and none is the best" in err
    run = RunFolder(tmp_path / "run")
    assert f"checkpoint:  {run.last}" in out and f"rcnn predict {run.last}" in out and "AP" not in out
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["last.safetensors", "last.state.pt"]
    assert [row["kind"] for row in run.rows()] == ["train"]
    assert not run.report.exists()
    assert_same_weights(tiny.run, run.path)
    annotations.write_text(whole)
    # Taken up with evaluations it has what was missing.
    result = resume(run.path, overrides=["evaluate.every_epochs=1"], device="cpu")
    assert (result.summary.step, result.summary.best_step) == (3, 3)
    assert_same_weights(run.path, run.path, "best")
    # And the other way round: a best one of before stays, and is not taken for that of the end.
    result = resume(run.path, overrides=["evaluate.every_epochs=0", "train.max_steps=4"], device="cpu")
    assert result.evaluation is None
    assert [read_weights(path).meta.step for path in (run.best, run.last)] == [3, 4]


def odd_data(root: Path) -> Path:
    """COCO data of a picture with alpha, a grey one, one of 16 bits, one turned by EXIF and one without a box."""
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels = rng.integers(0, 256, (60, 80, 4), dtype=np.uint8)
    pictures = {
        "alpha.png": (Image.fromarray(pixels), {}),
        "grey.jpg": (Image.fromarray(pixels[:, :, 0]), {}),
        "deep.png": (Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257), {}),
        "turned.jpg": (Image.fromarray(pixels[:, :, :3]), {"exif": turned}),
        "empty.jpg": (Image.fromarray(pixels[:, :, :3]), {}),
    }
    (root / "annotations").mkdir(parents=True)
    images, annotations = [], []
    for number, (name, (picture, options)) in enumerate(pictures.items()):
        width, height = (60, 80) if name == "turned.jpg" else (80, 60)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        if name != "empty.jpg":
            # The bottom right corner of what a person sees.
            box = [width - 20, height - 20, 20, 20]
            annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box})
        for split in ("train", "val"):
            (root / split).mkdir(exist_ok=True)
            picture.save(root / split / name, **options)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "corner"}]}
    for split in ("train", "val"):
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def test_odd_pictures_and_empty_ones_are_trained_on(train, tmp_path: Path) -> None:
    result = train(data=odd_data(tmp_path / "data"))
    assert result.evaluation is not None
    assert len(result.evaluation.truth) == 5
    assert np.isfinite(next(result.run.rows())["loss"])


def test_annotations_made_on_unturned_pixels_are_told(train, tmp_path: Path) -> None:
    root = odd_data(tmp_path / "data")
    for path in root.glob("annotations/*.json"):
        path.write_text(path.read_text().replace('"width": 60, "height": 80', '"width": 80, "height": 60'))
    with pytest.raises(DataError, match="EXIF-rotated: the annotations were made on the unturned pixels"):
        train(data=root)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_says_how_to_find_all_and_loses_nothing(tiny, train, tmp_path: Path, workers: int) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny.data, root)
    result = train(data=root)
    before = result.run.best.read_bytes()
    for number in (2, 3):
        picture = root / f"val/00000{number}.jpg"
        picture.write_bytes(picture.read_bytes()[:1000])
    with pytest.raises(ImageError) as caught:
        resume(result.run.path, overrides=["train.max_steps=4", f"data.workers={workers}"], device="cpu")
    message = str(caught.value)
    assert "000002.jpg: the file is cut short or damaged" in message
    assert f"rcnn data check {root} --decode names all that cannot be used" in message
    assert f"then rcnn train --resume {result.run.path}" in message
    assert read_weights(result.run.last).meta.step == 4  # saved before the evaluation that failed
    assert result.run.best.read_bytes() == before


def test_a_batch_that_cannot_be_shared_out_is_told_before_the_data_are_read(train, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.batch_size: 4 pictures for 1 processes and 3 forward passes each"):
        train("train.accumulate=3", data=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_but_may_be_numbered(tiny, train, tmp_path: Path) -> None:
    shutil.copytree(tiny.run, tmp_path / "run")
    with pytest.raises(RunError, match=r"holds a run already; go on with it: rcnn train --resume .*run; or choose"):
        train()
    from rcnn.recipes.training import train as run_training

    recipe = edit(rcnn.recipe("quickstart", *tiny.overrides), {"train.max_steps": 1, "data.path": str(tiny.data)})
    for name in ("run-2", "run-3"):
        result = run_training(recipe, run_folder=tmp_path / "run", if_taken="number", device="cpu")
        assert result.run.path == tmp_path / name


def test_data_that_were_moved(tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.run, tmp_path / "run")
    shutil.copytree(tiny.data, tmp_path / "moved")
    old = ["data.path=/nowhere/data"]
    with pytest.raises(
        DataError, match=r"/nowhere/data: the data of the run are not there any more; .*data\.path=FOLDER"
    ):
        resume(tmp_path / "run", overrides=old, device="cpu")
    result = resume(tmp_path / "run", overrides=[f"data.path={tmp_path}/moved", "train.max_steps=4"], device="cpu")
    assert result.summary.step == 4


def test_other_classes_cannot_go_on(tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.run, tmp_path / "run")
    data = renamed(tiny, tmp_path / "data", circle="disc")
    with pytest.raises(CheckpointError, match=r"classes: .*disc.*resume as it began"):
        resume(tmp_path / "run", overrides=[f"data.path={data}"], device="cpu")


def test_weights_that_are_not_there_leave_no_run(train, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file; check detector\.backbone\.weights"):
        train(f"detector.backbone.weights={tmp_path}/nowhere.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match=r"wrong\.pth: .*missing in the file"):
        train(f"detector.backbone.weights={tmp_path}/wrong.pth")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- schedules and optimizers


def test_milestones_are_shares_of_the_training() -> None:
    """VGG16's: 14 epochs, a tenth of the rate after nine; no warm-up."""
    schedule = build_schedule(faster_rcnn_vgg16().train, steps_per_epoch=100)
    assert [schedule(step) for step in (0, 899, 900, 1399)] == pytest.approx([1, 1, 0.1, 0.1])


def test_max_steps_shortens_the_whole_schedule() -> None:
    spec = TrainSpec(epochs=10, max_steps=50, schedule=MultiStepSpec(milestones=(0.5,)), warm_up=None)
    schedule = build_schedule(spec, steps_per_epoch=100)
    assert [schedule(24), schedule(25)] == pytest.approx([1, 0.1])


def test_warm_up_and_cosine() -> None:
    spec = TrainSpec(epochs=1, schedule=CosineSpec(), warm_up=WarmUpSpec(steps=10, factor=0.5))
    schedule = build_schedule(spec, steps_per_epoch=100)
    assert schedule(0) == pytest.approx(0.5)
    assert schedule(99) < 0.01
    values = [schedule(step) for step in range(10, 100)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [(SGDSpec(lr=0.3, momentum=0.7, nesterov=True), torch.optim.SGD), (AdamSpec(lr=0.3, betas=(0.5, 0.6)),
      torch.optim.Adam), (AdamWSpec(lr=0.3, betas=(0.5, 0.6)), torch.optim.AdamW)],
)  # fmt: skip
def test_optimizers(spec: Any, kind: type) -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), spec)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.3
    if kind is torch.optim.SGD:
        assert (group["momentum"], group["nesterov"]) == (0.7, True)
    else:
        assert group["betas"] == (0.5, 0.6)


def test_the_recipe_of_simple_faster_rcnn_doubles_the_rate_of_biases() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), faster_rcnn_vgg16().train.optimizer)
    rates = {(len(group["params"][0].shape), group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {(2, 1e-3, 5e-4), (1, 2e-3, 0.0)}


def test_the_quickstart_needs_no_download() -> None:
    assert quickstart().detector.backbone.weights is None
