"""A whole system for a benchmark, and what its processes use of the machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deploy.local import LocalSystem, local_system


@contextlib.contextmanager
def own_system(**extra: str) -> Iterator[LocalSystem]:
    """On free ports and in a folder that is gone afterwards; its processes are still to be started."""
    with tempfile.TemporaryDirectory(prefix="aemos-bench-") as folder, local_system(Path(folder), **extra) as system:
        yield system


def memory_mb(pid: int, *, field: str = "VmRSS") -> list[float]:
    """Of a process and of each of its children, for the web process has workers; VmHWM is the most there ever was."""
    found = []
    for each in (str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a child has ended meanwhile
            status = Path(f"/proc/{each}/status").read_text()
            if f"{field}:" in status:  # not of one that has ended and is not yet waited for
                found.append(int(status.split(f"{field}:")[1].split()[0]) / 1024)
    return found


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shared_memory_mb(pid: int) -> float:
    """Of a process and all its children, what they share counted once (PSS)."""
    pids = (str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    total = 0
    for each in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a child has ended meanwhile
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
            total += int(rollup.split("\nPss:")[1].split()[0])
    return total / 1024
