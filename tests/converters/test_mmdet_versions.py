"""Layouts of MMDetection 1 and 2: names, and rows by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rcnn.converters.mmdet_versions import modern_names, modern_tensors, version_of
from rcnn.errors import CheckpointError
from rcnn.priors import cell_anchors


def rows(*numbers: float) -> Tensor:
    return torch.tensor(numbers)


def test_versions() -> None:
    assert version_of("2.11.0+unknown") == (2, 11)
    assert version_of("1.0rc0+d3ca926") == (1, 0)
    assert [version_of(text) for text in ("unknown", None, 2.5, "")] == [None] * 4


def test_background_goes_from_first_to_last() -> None:
    """Two classes. Rows 0 are background's; of the boxes its four rows have no use."""
    old = {
        "rpn_head.rpn_cls.weight": rows(1, 2, 3),
        "bbox_head.fc_cls.weight": rows(10, 11, 12)[:, None],
        "bbox_head.fc_cls.bias": rows(20, 21, 22),
        "bbox_head.fc_reg.weight": torch.arange(12.0)[:, None],
        "bbox_head.fc_reg.bias": torch.arange(12.0),
        "mask_head.convs.0.conv.weight": rows(0),
    }
    new = modern_tensors(old, (1, 0))
    assert list(new) == ["rpn_head.rpn_cls.weight", *(f"roi_head.{key}" for key in list(old)[1:])]
    assert new["roi_head.bbox_head.fc_cls.weight"].flatten().tolist() == [11, 12, 10]
    assert new["roi_head.bbox_head.fc_cls.bias"].tolist() == [21, 22, 20]
    assert new["roi_head.bbox_head.fc_reg.weight"].flatten().tolist() == list(range(4, 12))
    assert new["roi_head.bbox_head.fc_reg.bias"].tolist() == list(range(4, 12))
    assert torch.equal(new["rpn_head.rpn_cls.weight"], old["rpn_head.rpn_cls.weight"])


def test_boxes_for_all_classes_have_no_background() -> None:
    """A cascade of one stage that is numbered."""
    old = {
        "bbox_head.0.fc_cls.weight": torch.arange(3.0)[:, None],
        "bbox_head.0.fc_reg.weight": torch.arange(4.0)[:, None],
    }
    new = modern_tensors(old, None)
    assert new["roi_head.bbox_head.0.fc_cls.weight"].flatten().tolist() == [1, 2, 0]
    assert new["roi_head.bbox_head.0.fc_reg.weight"].flatten().tolist() == [0, 1, 2, 3]


def test_a_file_of_version_2_stays() -> None:
    state = {
        "roi_head.bbox_head.fc_cls.weight": torch.arange(3.0)[:, None],
        "roi_head.bbox_head.fc_reg.weight": torch.arange(8.0)[:, None],
    }
    assert all(value is state[key] for key, value in modern_tensors(state, (2, 0)).items())


def test_the_softmax_rpn_before_2_5() -> None:
    """Three anchors, each background and object: they change places."""
    state = {
        "rpn_head.rpn_cls.weight": torch.arange(6.0).reshape(6, 1, 1, 1),
        "rpn_head.rpn_cls.bias": torch.arange(6.0),
        "rpn_head.rpn_reg.weight": torch.zeros(12, 1, 1, 1),
    }
    old, new = modern_tensors(state, (2, 4)), modern_tensors(state, (2, 5))
    assert old["rpn_head.rpn_cls.bias"].tolist() == [1, 0, 3, 2, 5, 4]
    assert old["rpn_head.rpn_cls.weight"].flatten().tolist() == [1, 0, 3, 2, 5, 4]
    assert new["rpn_head.rpn_cls.bias"] is state["rpn_head.rpn_cls.bias"]
    # Without a version it is of 2.5 or later.
    assert modern_tensors(state, None)["rpn_head.rpn_cls.bias"] is state["rpn_head.rpn_cls.bias"]


def test_names() -> None:
    old = {
        "module.bbox_head.fcos_cls.weight": rows(1),
        "module.bbox_head.cls_convs.3.weight": rows(2),
        "module.bbox_head.reg_convs.0.bias": rows(3),
    }
    assert list(modern_names(old)) == [
        "bbox_head.conv_cls.weight",
        "bbox_head.cls_convs.3.conv.weight",
        "bbox_head.reg_convs.0.conv.bias",
    ]
    with pytest.raises(CheckpointError, match="under its old and its new name"):
        modern_names({"bbox_head.fcos_cls.bias": rows(1), "bbox_head.conv_cls.bias": rows(1)})
    with pytest.raises(CheckpointError, match="with and without the prefix"):
        modern_names({"module.backbone.conv1.weight": rows(1), "backbone.conv1.weight": rows(1)})


def test_anchors_of_version_1() -> None:
    """Its boxes end at their last pixel. On stride 4, scale 8 (32 px), ratio 1/2: 45.25 wide, 22.63 high, around
    (4 - 1) / 2 = 1.5: x from round(1.5 - 44.25 / 2) = -21 to round(1.5 + 44.25 / 2) = 24, so its end is at 25;
    y from round(1.5 - 21.63 / 2) = -9 to round(1.5 + 21.63 / 2) = 12, so at 13. Ours are rounded, then moved by half
    a stride."""
    (wide,) = cell_anchors([32.0], [0.5], rounded=True)
    assert (wide + 2).tolist() == [-21, -9, 25, 13]
