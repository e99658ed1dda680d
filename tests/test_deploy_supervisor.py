"""The supervisor with small stand-in processes, run as a process of its own so that signals are real."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.programs import REPOSITORY
from deploy.supervisor import next_delay
from deploy.terminal import Terminal

# Runs the processes given as name=code; the supervisor under test is the real one.
PROGRAM = """
import sys
from pathlib import Path
from deploy.processes import Process
from deploy.supervisor import StartError, Supervisor
from deploy.terminal import Terminal

supervisor = Supervisor(logs=Path(sys.argv[1]), directory=Path.cwd(), terminal=Terminal(width=8))
stand_ins = [each.split("=", 1) for each in sys.argv[2:]]
try:
    with supervisor.session():
        for name, code in stand_ins:
            ready = (lambda: False) if name == "deaf" else (lambda: True)
            process = Process(name=name, command=(sys.executable, "-uc", code), ready=ready)
            (supervisor.run if name == "once" else supervisor.start)(process)
        supervisor.watch()
except StartError as error:
    print(error)
    sys.exit(1)
"""
SLEEPS = "import os, time; print('pid', os.getpid()); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"
SAYS_GOODBYE = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('goodbye'), sys.exit())); "
    "print('pid', os.getpid()); time.sleep(60)"
)
HAS_CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-uc', {SLEEPS!r}]); {SLEEPS}"

Supervise = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Supervise]:
    started: list[subprocess.Popen[str]] = []

    def start(**stand_ins: str) -> subprocess.Popen[str]:
        words = [f"{name}={code}" for name, code in stand_ins.items()]
        supervisor = subprocess.Popen(
            [sys.executable, "-uc", PROGRAM, str(tmp_path / "log"), *words],
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(supervisor)
        return supervisor

    yield start
    for supervisor in started:
        with supervisor:
            supervisor.kill()


def pid_shown(supervisor: subprocess.Popen[str]) -> int:
    """The process id in the next line that shows one."""
    assert supervisor.stdout
    return next(int(line.split()[-1]) for line in supervisor.stdout if "| pid" in line)


def assert_gone(*pids: int) -> None:
    deadline = time.monotonic() + 5
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"left behind: {[pid for pid in pids if _alive(pid)]}"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """An orphan that nobody has reaped yet has ended all the same."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_process_is_started_again(supervise: Supervise) -> None:
    supervisor = supervise(worker=SLEEPS)
    first = pid_shown(supervisor)
    os.kill(first, signal.SIGKILL)
    assert supervisor.stdout
    assert supervisor.stdout.readline() == "aemos    | worker was ended by SIGKILL; it starts again in 0.5 s\n"
    second = pid_shown(supervisor)
    assert second != first
    supervisor.send_signal(signal.SIGTERM)
    supervisor.communicate(timeout=10)
    assert_gone(second)


def test_what_a_process_started_goes_with_it(supervise: Supervise) -> None:
    supervisor = supervise(web=HAS_CHILD)
    pids = [pid_shown(supervisor), pid_shown(supervisor)]
    os.kill(pids[0], signal.SIGKILL)
    assert_gone(*pids[:1])
    replacements = [pid_shown(supervisor), pid_shown(supervisor)]
    assert_gone(*pids)
    supervisor.send_signal(signal.SIGTERM)
    supervisor.communicate(timeout=10)
    assert_gone(*replacements)


def test_ctrl_c_stops_in_reverse_order(supervise: Supervise) -> None:
    supervisor = supervise(redis=SAYS_GOODBYE, worker=SAYS_GOODBYE)
    pids = [pid_shown(supervisor), pid_shown(supervisor)]
    supervisor.send_signal(signal.SIGINT)
    output, _ = supervisor.communicate(timeout=10)
    assert [line for line in output.splitlines() if "goodbye" in line] == ["worker   | goodbye", "redis    | goodbye"]
    assert supervisor.returncode == 0
    assert_gone(*pids)


def test_a_process_that_ignores_the_signal_is_gone_within_ten_seconds(supervise: Supervise) -> None:
    supervisor = supervise(redis=SAYS_GOODBYE, stubborn=STUBBORN)
    pids = [pid_shown(supervisor), pid_shown(supervisor)]
    supervisor.send_signal(signal.SIGTERM)
    output, _ = supervisor.communicate(timeout=10)
    assert "redis    | goodbye" in output
    assert "stubborn did not stop when asked and was killed" in output
    assert_gone(*pids)


def test_second_ctrl_c_kills_at_once(supervise: Supervise) -> None:
    supervisor = supervise(stubborn=STUBBORN)
    pid = pid_shown(supervisor)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.stdout
    assert "stopping" in supervisor.stdout.readline()
    supervisor.send_signal(signal.SIGINT)
    supervisor.communicate(timeout=4)
    assert_gone(pid)


def test_a_killed_supervisor_leaves_nothing_behind(supervise: Supervise) -> None:
    supervisor = supervise(redis=SLEEPS, stubborn=STUBBORN)
    pids = [pid_shown(supervisor), pid_shown(supervisor)]
    supervisor.kill()
    supervisor.communicate(timeout=10)
    assert_gone(*pids)


def test_a_process_that_ends_before_it_answers_stops_everything_and_shows_why(
    supervise: Supervise, tmp_path: Path
) -> None:
    log = tmp_path / "log" / "redis.log"
    ends = f"import time\nwhile 'pid' not in open({str(log)!r}).read(): time.sleep(0.02)\nraise SystemExit('no such database')"
    supervisor = supervise(redis=SLEEPS, deaf=ends)
    pid = pid_shown(supervisor)
    output, _ = supervisor.communicate(timeout=10)
    assert output.endswith("deaf ended with code 1:\nno such database\n")
    assert supervisor.returncode == 1
    assert_gone(pid)


def test_a_one_time_command_runs_to_its_end_before_the_next_process(supervise: Supervise) -> None:
    supervisor = supervise(once="import time; time.sleep(0.2); print('migrated')", worker=SLEEPS)
    assert supervisor.stdout
    assert supervisor.stdout.readline() == "once     | migrated\n"
    pid_shown(supervisor)


def test_a_failed_one_time_command_starts_nothing_more(supervise: Supervise) -> None:
    supervisor = supervise(once="raise SystemExit('no such table')", worker=SLEEPS)
    output, _ = supervisor.communicate(timeout=10)
    assert output.endswith("once ended with code 1:\nno such table\n")
    assert "worker" not in output


def test_output_is_prefixed_whole_and_kept_in_a_private_log(supervise: Supervise, tmp_path: Path) -> None:
    long = "import sys; sys.stdout.write('x' * 100_000 + '\\n'); sys.stdout.write('unfinished'); sys.stdout.flush()"
    supervisor = supervise(once=long, worker=SLEEPS)
    pid_shown(supervisor)
    log = tmp_path / "log" / "once.log"
    assert log.read_text().replace("\n", "") == "x" * 100_000 + "unfinished"
    assert log.stat().st_mode & 0o077 == 0


def test_restarts_back_off_to_ten_seconds_and_begin_anew_after_half_a_minute() -> None:
    delays = [0.0]
    for _ in range(7):
        delays.append(next_delay(delays[-1], alive_seconds=1))
    assert delays[1:] == [0.5, 1, 2, 4, 8, 10, 10]
    assert next_delay(10, alive_seconds=30) == 0.5


def test_colours_are_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(stream: io.StringIO) -> str:
        Terminal(stream, width=6).line("web", "ready")
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(Screen()) == "\x1b[36mweb    |\x1b[0m ready\n"
    assert shown(io.StringIO()) == "web    | ready\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(Screen()) == "web    | ready\n"
