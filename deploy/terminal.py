"""What a person sees: takes processes' output by lines, gives it prefixed on the terminal and bounded in files."""

from __future__ import annotations

import os
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO

COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
LOG_LIMIT_BYTES = 50_000_000
TAIL_LINES = 15
OWN_NAME = "aemos"


class Terminal:
    """Prefixes each line with an aligned name; coloured on a terminal unless NO_COLOR is set."""

    def __init__(self, stream: IO[str] | None = None, *, width: int = 12) -> None:
        self._stream = stream or sys.stdout
        self._width = width
        self._coloured = self._stream.isatty() and not os.environ.get("NO_COLOR")
        self._colours: dict[str, int] = {}

    def line(self, name: str, text: str) -> None:
        """Show one line of a process."""
        prefix = f"{name:<{self._width}} |"
        if self._coloured:
            colour = self._colours.setdefault(name, COLOURS[len(self._colours) % len(COLOURS)])
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        self.plain(f"{prefix} {text}")

    def say(self, text: str) -> None:
        """Show what the supervisor itself has to say."""
        for line in text.splitlines():
            self.line(OWN_NAME, line)

    def plain(self, text: str) -> None:
        """Show text without a prefix. A reader that has gone must not take the processes with it."""
        with suppress(BrokenPipeError, OSError):
            self._stream.write(f"{text}\n")
            self._stream.flush()


class LogFile:
    """One process's output of this run; starts over when it reaches LOG_LIMIT_BYTES."""

    def __init__(self, path: Path) -> None:
        # Output may hold what a library prints of its settings, so nobody else may read it.
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0)
        self._size = 0
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def write(self, line: bytes) -> None:
        """Append one line without its line end."""
        if self._size > LOG_LIMIT_BYTES:
            self._file.seek(0)
            self._file.truncate()
            self._size = 0
        self._size += self._file.write(line + b"\n")
        self._tail.append(line.decode(errors="replace"))

    def tail(self) -> str:
        """The last lines, or a word that there is none."""
        return "\n".join(self._tail) or "(no output)"

    def close(self) -> None:
        self._file.close()
