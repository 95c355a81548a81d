"""simple-faster-rcnn-pytorch's files: every key there and back, which pixels, and what its options say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcnn.converters.interface import ForeignFile, ForeignModel, Wanted
from rcnn.converters.simple_faster_rcnn import VOC_CLASSES, SimpleFasterRCNNSystem
from rcnn.errors import CheckpointError
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import TwoStageSpec


@pytest.fixture(scope="module")
def layout(shared: Path) -> dict[str, Tensor]:
    """The recorded state dict, each row with a number of its own."""
    manifest = json.loads((shared / "oracles/simple_faster_rcnn/vgg16_voc20/manifest.json").read_text())
    state = {}
    for number, (key, shape, _) in enumerate(manifest["state_dict"]):
        rows = torch.arange(shape[0], dtype=torch.float32) + 1000 * number
        state[key] = rows.reshape([-1] + [1] * (len(shape) - 1)).expand(shape)
    return state


def recognised(state: dict[str, Tensor], wanted: Wanted | None = None, **config: object) -> ForeignModel:
    file = ForeignFile(path=Path("fasterrcnn.pth"), tensors=state, meta={"config": config} if config else {})
    return SimpleFasterRCNNSystem().recognise(file, wanted or Wanted())


def detector_of(model: ForeignModel) -> TwoStageSpec:
    assert isinstance(model.recipe.detector, TwoStageSpec)
    return model.recipe.detector


def test_every_key_there_and_back(layout: dict[str, Tensor]) -> None:
    model = recognised(layout)
    key_map = model.key_map(model.recipe)
    converted = key_map.to_ours(layout)
    assert set(converted.names) == set(layout)
    with torch.device("meta"):
        own = build_detector(model.recipe.detector, num_classes=20, pretrained=False).state_dict()
    assert {name: value.shape for name, value in converted.state.items()} == {n: v.shape for n, v in own.items()}
    back = key_map.to_theirs(converted.state)
    for kind in ("weight", "bias"):
        # The score of an anchor hangs on the difference of its two logits alone: odd rows less even ones.
        two = back[f"rpn.score.{kind}"]
        assert torch.equal(two[1::2] - two[0::2], layout[f"rpn.score.{kind}"][1::2] - layout[f"rpn.score.{kind}"][::2])
        assert not back[f"head.cls_loc.{kind}"][:4].any()
    others = {key for key in layout if not key.startswith(("rpn.score", "head.cls_loc"))}
    weights = {key for key in others if key.endswith("weight")}  # a number to a row
    torch.testing.assert_close(*({k: rows[k].flatten(1)[:, 0] for k in weights} for rows in (back, layout)))
    torch.testing.assert_close(*({k: rows[k] for k in others - weights} for rows in (back, layout)))


def test_rows_go_to_their_places(layout: dict[str, Tensor]) -> None:
    model = recognised(layout)
    biases = {key: value % 1000 for key, value in layout.items() if key.endswith("bias")}
    ours = model.key_map(model.recipe).to_ours(biases).state
    # dy dx dh dw to dx dy dw dh, anchor by anchor.
    assert ours["proposals.head.tower.deltas.bias"][:8].tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    # The first four rows are the background's.
    assert ours["roi.predictor.deltas.bias"][:4].tolist() == [5, 4, 7, 6]
    assert ours["roi.predictor.classes.bias"].tolist() == [*range(1, 21), 0]
    assert ours["proposals.head.tower.classes.bias"].tolist() == [1] * 9


def test_pixels_by_the_options(layout: dict[str, Tensor]) -> None:
    caffe, torchvision = (recognised(layout, caffe_pretrain=told) for told in (True, False))
    image = detector_of(caffe).image
    assert (image.channel_order, image.mean) == ("bgr", (122.7717, 115.9465, 102.9801))
    assert detector_of(torchvision).image.mean == (123.675, 116.28, 103.53)
    assert caffe.assumptions == torchvision.assumptions == ("the 20 classes of VOC; for others: --classes",)


def test_pixels_by_the_first_layer(shared: Path, layout: dict[str, Tensor]) -> None:
    """No option tells: the first layer is as torchvision publishes it, or it is not."""
    published = torch.load(shared / "weights/vgg16_features.pth", weights_only=True)
    model = recognised({**layout, "extractor.0.bias": published["features.0.bias"]})
    assert detector_of(model).image.channel_order == "rgb"
    assert "as torchvision's VGG16 has them" in model.assumptions[0]
    model = recognised(layout)
    assert detector_of(model).image.channel_order == "bgr"
    assert "as Caffe's VGG16 has them" in model.assumptions[0]


def test_the_options_of_a_training(layout: dict[str, Tensor]) -> None:
    with_dropout = {key.replace("classifier.2", "classifier.3"): value for key, value in layout.items()}
    model = recognised(
        with_dropout, caffe_pretrain=False, min_size=400, max_size=700, epoch=18, lr=5e-4, use_adam=True,
        rpn_sigma=2.0, weight_decay=0, plot_every=40, voc_data_dir="VOC2007",
    )  # fmt: skip
    detector, train = detector_of(model), model.recipe.train
    assert (detector.image.short_side, detector.image.max_long_side) == (400, 700)
    assert detector.roi.box_head.dropout == 0.5
    # Smooth L1 with sigma 2 is a parabola up to 1 / 2^2.
    assert detector.proposals.head.box_loss.beta == 0.25
    assert (train.optimizer.type, train.optimizer.lr, train.epochs) == ("adam", 5e-4, 18)
    # The rate falls after the ninth epoch, whatever the number of epochs.
    assert train.schedule.milestones == (0.5,)


def test_classes(layout: dict[str, Tensor]) -> None:
    assert recognised(layout).classes.names == VOC_CLASSES
    assert (VOC_CLASSES[0], VOC_CLASSES[14], VOC_CLASSES[19]) == ("aeroplane", "person", "tvmonitor")
    names = tuple(f"class {number}" for number in range(20))
    assert recognised(layout, Wanted(class_names=names)).classes.names == names
    with pytest.raises(CheckpointError, match="20 classes and background, and 1 class names"):
        recognised(layout, Wanted(class_names=("cat",)))
    two = {**layout, "head.score.weight": layout["head.score.weight"][:3]}
    with pytest.raises(CheckpointError, match=r"2 classes and background, and no class names.*--classes"):
        recognised(two)


def test_what_does_not_fit(layout: dict[str, Tensor]) -> None:
    without = {key: value for key, value in layout.items() if key != "head.cls_loc.weight"}
    with pytest.raises(CheckpointError, match=r"head\.cls_loc\.weight: missing"):
        recognised(without)
    with pytest.raises(CheckpointError, match=r"rpn\.score\.weight: shape \(\)"):
        recognised({**layout, "rpn.score.weight": torch.ones(())})
    odd = {**layout, "rpn.loc.bias": torch.zeros(35), "vgg.extra": torch.zeros(1)}
    model = recognised(odd)
    with pytest.raises(CheckpointError) as caught:
        model.key_map(model.recipe).to_ours(odd)
    assert [problem.where for problem in caught.value.problems] == ["rpn.loc.bias", "vgg.extra"]
    assert SimpleFasterRCNNSystem().signs(ForeignFile(path=Path("a.pth"), tensors=without)) is None
