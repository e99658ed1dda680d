"""Child processes: takes a description of one, gives it running in a group of its own that is not left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1
# Looked up before any fork: the child must not load libraries between fork and exec.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def at_once() -> bool:
    """The readiness of a process that nobody has to wait for."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What to start and how to know that it answers.

    `environment` is added to the parent's and is the only way for a secret into the child.
    A `quiet` process is heard in its log only.
    `ready` is asked until it is true; it returns within about a second and does not raise.
    `user` is the numeric id to run as; None keeps the parent's.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    ready: Callable[[], bool] = at_once
    ready_timeout_seconds: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    user: int | None = None
    quiet: bool = False


def spawn(process: Process, *, output: int | IO[bytes], directory: Path | None = None) -> subprocess.Popen[bytes]:
    """Start `process` with both output streams to `output`; raises OSError when the program cannot be started.

    The new session keeps Ctrl-C at the terminal from reaching the child before its turn. Call it in the main thread:
    the kernel takes the end of the calling thread for the end of the parent.
    """
    return subprocess.Popen(
        process.command,
        env={**os.environ, **process.environment},
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        user=process.user,
        group=process.user,
        extra_groups=None if process.user is None else [],
        preexec_fn=_die_with_parent,  # noqa: PLW1509  safe beside threads: one call, looked up before the fork
    )


def kill(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL the child and everything it started, also after the child itself has ended; reaps it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether the child has ended, without reaping it: its group id stays reserved until `kill` has swept the group."""
    if child.returncode is not None:
        return True
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def terminate(child: subprocess.Popen[bytes], *, stop_signal: signal.Signals, grace_seconds: float) -> None:
    """Ask the child to stop, and kill it and what it left after `grace_seconds`."""
    ask(child, stop_signal)
    deadline = time.monotonic() + grace_seconds
    while not has_ended(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(child)


def ask(child: subprocess.Popen[bytes], stop_signal: signal.Signals) -> None:
    """Send a signal to the child alone; nothing happens when it has ended."""
    if not has_ended(child):
        child.send_signal(stop_signal)


def _die_with_parent() -> None:
    """A supervisor or test run that is killed with SIGKILL cannot clean up, so the kernel does it (Linux only)."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
