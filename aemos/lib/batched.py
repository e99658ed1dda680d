"""A sequence in, its consecutive slices of at most a given length out: what one statement or one round trip can hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """As itertools.batched of Python 3.12, but gives slices: lists stay lists."""
    return (items[start : start + size] for start in range(0, len(items), size))
