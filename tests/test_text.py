"""Texts from outside fit the columns that hold them."""

from __future__ import annotations

from aemos.lib.text import storable


def test_a_text_is_cut_and_loses_its_nul_characters() -> None:
    assert storable("valve stuck", 5) == "valve"
    assert storable("a\0b", 2) == "ab"
