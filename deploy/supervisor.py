"""One supervisor: takes processes, keeps them running, shows their output and leaves none behind when it stops."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from deploy.processes import Process, ask, has_ended, kill, spawn
from deploy.terminal import LogFile, Terminal

BACKOFF_FIRST_SECONDS = 0.5
BACKOFF_MAX_SECONDS = 10.0
BACKOFF_RESET_SECONDS = 30.0
ASK_SECONDS = 6.0  # by then every process has been asked to stop
KILL_SECONDS = 8.0  # by then what still runs is killed
TICK_SECONDS = 0.1
READ_BYTES = 65536
LINE_LIMIT_BYTES = 65536
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StartError(Exception):
    """A process did not come up, or a one-time command failed; the message ends with the tail of its output."""


class StopRequested(Exception):
    """Ctrl-C or SIGTERM arrived; `Supervisor.session` turns it into a stop."""


@dataclass(slots=True, kw_only=True, eq=False)
class Child:
    """A supervised process and what its restarts need; times are seconds of the supervisor's clock."""

    process: Process
    log: LogFile
    running: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    delay_seconds: float = 0.0
    restart_at: float = 0.0
    output: int | None = None
    unfinished: bytes = field(default=b"", repr=False)


def next_delay(previous_seconds: float, *, alive_seconds: float) -> float:
    """How long to wait before the restart of a process that lived `alive_seconds`; 0 means it never ended before."""
    if previous_seconds == 0 or alive_seconds >= BACKOFF_RESET_SECONDS:
        return BACKOFF_FIRST_SECONDS
    return min(previous_seconds * 2, BACKOFF_MAX_SECONDS)


class Supervisor:
    """Starts, watches, restarts and stops processes, all in one thread.

    `logs` is the directory for one file per process, `directory` where the processes are started.
    """

    def __init__(
        self, *, logs: Path, directory: Path, terminal: Terminal, clock: Callable[[], float] = time.monotonic
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._directory = directory
        self._terminal = terminal
        self._clock = clock
        self._children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._stop_requested = False
        self._interrupts = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        """Catch the stop signals inside the block and stop all processes at its end, however it ends."""
        previous = {number: signal.signal(number, self._request_stop) for number in STOP_SIGNALS}
        try:
            yield
        except StopRequested:
            self._terminal.say("stopping; Ctrl-C again kills")
        finally:
            self.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def start(self, *processes: Process) -> None:
        """Start all of them in order, then wait until each answers; raises StartError, StopRequested."""
        children = [self._add(process) for process in processes]
        started = [(child, self._spawn(child)) for child in children]
        for child, popen in started:
            self._wait_until_ready(child, popen)

    def run(self, process: Process) -> None:
        """Run a one-time command to its end; raises StartError when it fails, StopRequested."""
        child = self._add(process)
        popen = self._spawn(child)
        while not has_ended(popen):
            self._tick()
        code = self._reap(child, popen)
        self._children.remove(child)
        if code != 0:
            raise StartError(f"{process.name} {_ending(code)}:\n{child.log.tail()}")

    def watch(self, *, until: Callable[[], bool] = lambda: False, seconds: float = float("inf")) -> None:
        """Restart what ends, until something is true or so many seconds have passed; raises StopRequested."""
        begun = self._clock()
        while not until() and self._clock() - begun < seconds:
            self._tick()
            for child in self._children:
                self._restart_if_ended(child)

    def stop(self) -> None:
        """Stop all in reverse order within KILL_SECONDS; a second Ctrl-C kills at once."""
        begun = self._clock()
        left = [child for child in reversed(self._children) if child.running]
        asked: list[Child] = []
        while left and self._interrupts < 2:
            # Each gets its share of the time, so that one that ignores the signal cannot keep the others from it.
            patience = max(ASK_SECONDS - (self._clock() - begun), 0.0) / len(left)
            child = left.pop(0)
            self._ask(child)
            asked.append(child)
            self._wait_for([child], until=self._clock() + patience)
        self._wait_for(asked, until=begun + KILL_SECONDS)
        for child in self._children:
            if child.running:
                self._terminal.say(f"{child.process.name} did not stop when asked and was killed")
                self._reap(child, child.running)
            child.log.close()
        self._children.clear()

    def _add(self, process: Process) -> Child:
        child = Child(process=process, log=LogFile(self._logs / f"{process.name}.log"))
        self._children.append(child)
        return child

    def _spawn(self, child: Child) -> subprocess.Popen[bytes]:
        child.started_at = self._clock()
        reading, writing = os.pipe()
        try:
            popen = spawn(child.process, output=writing, directory=self._directory)
        except OSError as error:
            os.close(reading)
            raise StartError(f"{child.process.name} cannot be started: {error}") from None
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        self._selector.register(reading, selectors.EVENT_READ, child)
        child.running, child.output = popen, reading
        return popen

    def _wait_until_ready(self, child: Child, popen: subprocess.Popen[bytes]) -> None:
        process = child.process
        while not process.ready():
            self._tick()
            if has_ended(popen):
                raise StartError(f"{process.name} {_ending(self._reap(child, popen))}:\n{child.log.tail()}")
            if self._clock() - child.started_at > process.ready_timeout_seconds:
                seconds = process.ready_timeout_seconds
                raise StartError(f"{process.name} does not answer after {seconds:.0f} s:\n{child.log.tail()}")

    def _restart_if_ended(self, child: Child) -> None:
        if child.running is None:
            if self._clock() >= child.restart_at:
                self._spawn_again(child)
        elif has_ended(child.running):
            ending = f"{child.process.name} {_ending(self._reap(child, child.running))}"
            if child.process.quiet:
                self._terminal.say(child.log.tail())
            self._schedule_restart(child, reason=ending)

    def _spawn_again(self, child: Child) -> None:
        try:
            self._spawn(child)
        except StartError as error:
            self._schedule_restart(child, reason=str(error))

    def _schedule_restart(self, child: Child, *, reason: str) -> None:
        alive = self._clock() - child.started_at
        child.delay_seconds = next_delay(child.delay_seconds, alive_seconds=alive)
        child.restart_at = self._clock() + child.delay_seconds
        self._terminal.say(f"{reason}; it starts again in {child.delay_seconds:g} s")

    def _ask(self, child: Child) -> None:
        if child.running:
            ask(child.running, child.process.stop_signal)

    def _wait_for(self, children: list[Child], *, until: float) -> None:
        while self._interrupts < 2:
            for child in children:
                if child.running and has_ended(child.running):
                    self._reap(child, child.running)
            if self._clock() >= until or not any(child.running for child in children):
                return
            self._read_output()

    def _reap(self, child: Child, popen: subprocess.Popen[bytes]) -> int:
        """End the process group, show the rest of its output, and return the exit code of its leader."""
        kill(popen)
        while self._read(child):
            pass
        self._close_output(child)
        if child.unfinished:
            self._show(child, child.unfinished)
        child.running, child.unfinished = None, b""
        code: int = popen.returncode
        return code

    def _tick(self) -> None:
        self._read_output()
        if self._stop_requested:
            raise StopRequested

    def _read_output(self) -> None:
        for key, _ in self._selector.select(timeout=TICK_SECONDS):
            self._read(key.data)

    def _read(self, child: Child) -> bool:
        """Show what there is to read; false when there is nothing, now or for ever."""
        if child.output is None:
            return False
        with suppress(BlockingIOError):
            if chunk := os.read(child.output, READ_BYTES):
                self._show_lines(child, chunk)
                return True
            self._close_output(child)
        return False

    def _close_output(self, child: Child) -> None:
        if child.output is not None:
            self._selector.unregister(child.output)
            os.close(child.output)
            child.output = None

    def _show_lines(self, child: Child, chunk: bytes) -> None:
        *lines, child.unfinished = (child.unfinished + chunk).split(b"\n")
        for line in lines:
            self._show(child, line)
        if len(child.unfinished) > LINE_LIMIT_BYTES:
            self._show(child, child.unfinished)
            child.unfinished = b""

    def _show(self, child: Child, line: bytes) -> None:
        child.log.write(line)
        if not child.process.quiet and line.strip():
            self._terminal.line(child.process.name, line.decode(errors="replace").rstrip("\r"))

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        self._stop_requested = True
        # Only Ctrl-C counts twice: make passes SIGTERM on to a child that the sender may have reached already.
        self._interrupts += number == signal.SIGINT


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
