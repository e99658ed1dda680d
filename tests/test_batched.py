"""Slices that together are the whole."""

from __future__ import annotations

import pytest

from aemos.lib.batched import batched


@pytest.mark.parametrize(
    ("number", "slices"),
    [(0, []), (1, [[0]]), (3, [[0, 1, 2]]), (4, [[0, 1, 2], [3]]), (6, [[0, 1, 2], [3, 4, 5]])],
)
def test_slices_have_the_size_and_the_last_has_the_rest(number: int, slices: list[list[int]]) -> None:
    assert list(batched(list(range(number)), 3)) == slices
