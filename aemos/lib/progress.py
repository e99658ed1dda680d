"""A progress bar: one line on a terminal that says how much of how many is done."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

WIDTH = 30
DRAW_SECONDS = 0.1


class Output(Protocol):
    """What is needed of Django's OutputWrapper."""

    def isatty(self) -> bool: ...
    def write(self, msg: str = "", style_func: None = None, ending: str | None = None) -> None: ...
    def flush(self) -> None: ...


class ProgressBar:
    """Draws nothing where `out` is no terminal. The line ends with the `with` block."""

    def __init__(self, out: Output, *, unit: str = "", draw_seconds: float = DRAW_SECONDS) -> None:
        self._out = out
        self._unit = f" {unit}" if unit else ""
        self._draw_seconds = draw_seconds
        self._drawn_at = float("-inf")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._drawn_at > float("-inf"):
            self._out.write("")

    def draw(self, done: int, *, of: int) -> None:
        """At most every `draw_seconds`; the last step is always drawn."""
        now = time.monotonic()
        if not self._out.isatty() or (now - self._drawn_at < self._draw_seconds and done < of):
            return
        self._drawn_at = now
        full = WIDTH * done // max(of, done, 1)
        bar = "#" * full + "." * (WIDTH - full)
        self._out.write(f"\r[{bar}] {done:,} of {of:,}{self._unit}", ending="")
        self._out.flush()
