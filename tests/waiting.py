"""Wait for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
WAIT_SECONDS = 20.0


def until(look: Callable[[], T], *, seconds: float = WAIT_SECONDS) -> T:
    """What `look` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"nothing came of it in {seconds:g} s: {seen!r}"
        time.sleep(0.02)
    return seen
