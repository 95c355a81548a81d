"""Tables of keys, forward and backward, and every mistake at once."""

from __future__ import annotations

import pytest
import torch

from rcnn.converters.key_map import Added, Change, Dropped, KeyMap, Rule
from rcnn.errors import CheckpointError

DOUBLED = Change(forward=lambda value: value * 2, backward=lambda value: value / 2)
TABLE = KeyMap(
    rules=(
        Rule(theirs="head.{}.conv.{}", ours="tower.convs.{}.{}"),
        Rule(theirs="body.{}", ours="backbone.{}", change=DOUBLED),
    ),
    dropped=(Dropped(pattern=r"body\..*counter", reason="nobody counts"),),
)


def test_forward() -> None:
    state = {"head.0.conv.weight": torch.ones(1), "body.a.b": torch.ones(1), "body.counter": torch.ones(1)}
    found = TABLE.to_ours(state)
    assert found.names == {"head.0.conv.weight": "tower.convs.0.weight", "body.a.b": "backbone.a.b"}
    assert {name: value.item() for name, value in found.state.items()} == {"tower.convs.0.weight": 1, "backbone.a.b": 2}
    assert found.dropped == {"body.counter": "nobody counts"}


def test_backward_undoes_forward() -> None:
    state = {"head.0.conv.weight": torch.randn(2), "head.11.conv.bias": torch.randn(2), "body.x": torch.randn(3)}
    torch.testing.assert_close(TABLE.to_theirs(TABLE.to_ours(state).state), state)


def test_points_in_a_pattern_are_points() -> None:
    with pytest.raises(CheckpointError):
        TABLE.to_ours({"bodyXweight": torch.ones(1)})


def test_every_unknown_key_is_named() -> None:
    state = {"body.a": torch.ones(1), "tail.weight": torch.ones(2, 3), "tail.bias": torch.ones(2)}
    with pytest.raises(CheckpointError) as caught:
        TABLE.to_ours(state)
    assert [str(problem) for problem in caught.value.problems] == [
        "tail.weight: no rule for a tensor of shape (2, 3)",
        "tail.bias: no rule for a tensor of shape (2,)",
    ]
    with pytest.raises(CheckpointError, match=r"neck\.weight: this system has no place for it"):
        TABLE.to_theirs({"neck.weight": torch.ones(1)})


def test_two_tensors_for_one_place() -> None:
    table = KeyMap(rules=(Rule(theirs="a.{}", ours="x.{}"), Rule(theirs="b.{}", ours="x.{}")))
    with pytest.raises(CheckpointError, match=r"b\.weight: the second tensor that becomes x\.weight"):
        table.to_ours({"a.weight": torch.ones(1), "b.weight": torch.ones(1)})


def test_what_the_peer_does_not_have() -> None:
    table = KeyMap(
        rules=(Rule(theirs="a.{}", ours="x.{}"),), added=(Added(ours="mean", value=torch.ones(()), reason="not saved"),)
    )
    state = {"a.weight": torch.zeros(1)}
    found = table.to_ours(state)
    assert list(found.state) == ["x.weight", "mean"]
    assert found.added == {"mean": "not saved"}
    assert table.to_theirs(found.state) == state
