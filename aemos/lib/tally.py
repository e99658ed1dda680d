"""Counting in many processes on many machines: what each process counts in, the sums over all of them, in Redis, out.

A process counts in a file mapped into its memory, beside how much of each number is in Redis already. A file whose
process is gone, however it ended, is flushed to Redis and removed by the next process of the machine that flushes.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import mmap
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import gevent
from gevent import monkey
from redis.exceptions import RedisError

from aemos.lib import keys, redis
from aemos.lib.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
# One record: a name, padded with zeros, then what was counted and what of it is in Redis.
RECORD_BYTES = 128
NAME_BYTES = RECORD_BYTES - 16
RECORDS = 2_048
FLUSH_SECONDS = 1.0


class CounterFile:
    """The numbers of one process; the lock on its file says that the process lives."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file
        size = RECORDS * RECORD_BYTES
        if file is not None:
            file.truncate(size)
        self._bytes = mmap.mmap(file.fileno() if file is not None else -1, size)
        self._numbers = memoryview(self._bytes).cast("d")
        self._positions = dict(self._read_names())

    @classmethod
    def create(cls, folder: Path) -> CounterFile:
        """A new one; where the folder cannot be written, one that does not outlive the process."""
        name = f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / f"{name}.new").open("x+b")
            # Locked before it can be seen: nobody must take it for one that was left behind.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / f"{name}.new").rename(folder / f"{name}.counts")
        except OSError as error:
            log.warning("counts of this process would be lost if it were killed: %s", error)
            return cls(None)
        return cls(file)

    @classmethod
    def take_orphan(cls, path: Path) -> CounterFile | None:
        """The numbers of a process that is gone; None while it lives, or when another process was faster."""
        try:
            file = path.open("r+b")
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return cls(file)
        except OSError:
            pass  # its process lives, or it was adopted between the two looks
        file.close()
        return None

    def add(self, name: str, amount: float) -> None:
        position = self._positions.get(name)
        if position is None:
            position = self._place(name)
        self._numbers[position] += amount

    def unflushed(self) -> list[tuple[str, float, float]]:
        """Name, number counted, and how much of it is not in Redis yet."""
        numbers = [(name, self._numbers[at], self._numbers[at + 1]) for name, at in self._positions.items()]
        return [(name, counted, counted - flushed) for name, counted, flushed in numbers if counted != flushed]

    def mark_flushed(self, name: str, counted: float) -> None:
        self._numbers[self._positions[name] + 1] = counted

    def close(self) -> None:
        """Releases the memory and the lock."""
        self._numbers.release()
        self._bytes.close()
        if self._file is not None:
            self._file.close()

    def _place(self, name: str) -> int:
        encoded = name.encode()
        if len(encoded) > NAME_BYTES or len(self._positions) == RECORDS:
            raise ValueError(f"no place for the count {name!r}: labels must be few and short")
        start = len(self._positions) * RECORD_BYTES
        self._bytes[start : start + len(encoded)] = encoded
        self._positions[name] = (start + NAME_BYTES) // 8
        return self._positions[name]

    def _read_names(self) -> Iterator[tuple[str, int]]:
        for start in range(0, RECORDS * RECORD_BYTES, RECORD_BYTES):
            name = self._bytes[start : start + NAME_BYTES].rstrip(b"\0").decode(errors="replace")
            if not name:
                return
            yield name, (start + NAME_BYTES) // 8


class Counters:
    """What this process counts. `add` costs a step in memory; under gevent it is flushed to Redis a second later."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._own: CounterFile | None = None
        self._log = RateLimitedLog(log)
        self._scheduled = False
        self._forget()
        # The counts of a parent are its own; its lock must not be kept alive by a child.
        os.register_at_fork(after_in_child=self._forget_parent)
        atexit.register(self._close)

    def add(self, name: str, amount: float = 1.0) -> None:
        with self._adding:
            own = self._own or self._open()
            own.add(name, amount)
        if not self._scheduled:
            self._schedule()

    def flush(self) -> None:
        """Adds what is new to the sums in Redis, also that of processes that are gone. Raises RedisError; nothing is lost.

        An answer that does not come leaves open whether Redis has added: then the numbers of one flush may count twice.
        """
        with self._flushing:
            if self._own is not None:
                self._flush_file(self._own)
            for path in self._folder().glob("*.counts"):
                if orphan := CounterFile.take_orphan(path):
                    try:
                        self._flush_file(orphan)
                        path.unlink(missing_ok=True)
                    finally:
                        orphan.close()

    def try_flush(self) -> bool:
        """As `flush`; False when Redis is away: the numbers are left for the next time."""
        try:
            self.flush()
        except RedisError as error:
            self._log.log("redis", logging.WARNING, "counts wait for Redis: %s", redis.explain(error))
            return False
        return True

    def _flush_file(self, counts: CounterFile) -> None:
        with self._adding:
            unflushed = counts.unflushed()
        if not unflushed:
            return
        with redis.client().pipeline() as pipeline:
            for name, _, new in unflushed:
                pipeline.hincrbyfloat(keys.METRICS, name, new)
            pipeline.execute()
        for name, counted, _ in unflushed:
            counts.mark_flushed(name, counted)

    def _open(self) -> CounterFile:
        self._own = CounterFile.create(self._folder())
        # Elsewhere somebody has to call `flush`: there, no greenlet would ever have its turn.
        self._scheduled = not monkey.is_module_patched("socket")
        return self._own

    def _schedule(self) -> None:
        self._scheduled = True
        gevent.spawn_later(FLUSH_SECONDS, self._flush_later)

    def _flush_later(self) -> None:
        self._scheduled = False
        if not self.try_flush():
            self._schedule()

    def _close(self) -> None:
        """At exit, without a log line: when Redis is away, the file stays for another process."""
        if self._own is not None:
            with contextlib.suppress(RedisError):
                self.flush()

    def _forget_parent(self) -> None:
        own = self._own
        self._forget()
        if own is not None:
            own.close()

    def _forget(self) -> None:
        self._own = None
        self._adding = threading.Lock()
        self._flushing = threading.Lock()
        self._scheduled = False
