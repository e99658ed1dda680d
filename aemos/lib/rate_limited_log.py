"""A log that writes each kind of message at most once per interval."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable


class RateLimitedLog:
    """Writes one message of each kind per `seconds`, and with the next one how many were suppressed."""

    def __init__(
        self, logger: logging.Logger, *, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._seconds = seconds
        self._clock = clock
        self._written_at: dict[str, float] = {}
        self._suppressed: Counter[str] = Counter()

    def is_due(self, kind: str) -> bool:
        """Whether the next message of this kind is written: for callers that add up by themselves what they report."""
        return self._clock() - self._written_at.get(kind, float("-inf")) >= self._seconds

    def log(self, kind: str, level: int, text: str, *arguments: object, trace: bool = False) -> None:
        """`text` and `arguments` are those of `logging`; messages of one `kind` share one limit. `trace` adds the traceback."""
        if not self.is_due(kind):
            self._suppressed[kind] += 1
            return
        self._written_at[kind] = self._clock()
        suppressed = self._suppressed.pop(kind, 0)
        if suppressed:
            text, arguments = f"{text} (and %d times before)", (*arguments, suppressed)
        self._logger.log(level, text, *arguments, exc_info=trace)

    def recovered(self, kind: str, text: str = "", *arguments: object) -> None:
        """Ends what was logged as `kind`, if anything was: logs `text`, and the next message of the kind is written at once."""
        if self._written_at.pop(kind, None) is None:
            return
        self._suppressed.pop(kind, None)
        if text:
            self._logger.warning(text, *arguments)
