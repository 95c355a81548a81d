"""Tests of one group run in one process, which their fixtures count on: a version of pytest once made groups void."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("groups")
def test_a_group_is_part_of_a_tests_name(request: pytest.FixtureRequest) -> None:
    if not hasattr(request.config, "workerinput") or not request.config.getoption("loadgroup"):
        pytest.skip("tests run in one process, or without --dist loadgroup")
    assert request.node.nodeid.endswith("@groups")
