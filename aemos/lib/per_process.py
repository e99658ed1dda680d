"""Objects of which each process has one: made when first asked for, and forgotten all at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import _lru_cache_wrapper, cache
from typing import Any, TypeVar

T = TypeVar("T")
_kept: list[_lru_cache_wrapper[Any]] = []


def per_process(make: Callable[..., T]) -> _lru_cache_wrapper[T]:
    """Decorates a function whose result this process keeps, one for each set of arguments."""
    kept = cache(make)
    _kept.append(kept)
    return kept


def forget_all() -> None:
    """Forgets every such object: a process that was just forked must not use the sockets of its parent."""
    for each in _kept:
        each.cache_clear()
