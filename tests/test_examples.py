"""The examples do what their page says: its blocks run as they stand, from top to bottom, against a running system."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.installation import LISTENERS
from deploy.local import LocalSystem, local_system
from deploy.programs import REPOSITORY, get
from tests.system_clients import Person
from tests.waiting import until

pytestmark = pytest.mark.timeout(300)
SOON_SECONDS = 20.0
FOLDER = REPOSITORY / "examples"
PAGE = (FOLDER / "README.md").read_text()
FENCE = re.compile(r"```(\w+)\n(.*?)```\n", re.DOTALL)
LISTENS = "# in a terminal of its own\n"
# It needs a device of its own, which tests/test_actuators.py makes and cuts the power of.
OF_ACTUATORS = "mqtt_doser"
NO_PROGRAMS = {"__init__", "connection", OF_ACTUATORS}
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NO_PROGRAMS)


@dataclass(frozen=True, slots=True)
class Step:
    """A block of commands, and the lines that come of it, here and in the terminals that were opened before."""

    commands: str
    output: tuple[str, ...]


def steps() -> list[Step]:
    """What the page says after the system runs."""
    found: list[Step] = []
    for language, text in FENCE.findall(PAGE):
        if language == "sh":
            found.append(Step(text, ()))
        else:
            assert language == "text"
            assert found[-1].output == (), "one block of output belongs to one of commands"
            found[-1] = Step(found[-1].commands, tuple(text.splitlines()))
    first, *rest = found
    assert first == Step("make run ARGS=--no-demo\n", ()), "that is what a LocalSystem stands for"
    return rest


class Terminal:
    """A shell that runs one block in the repository, and what it has printed."""

    def __init__(self, commands: str, log: Path, environment: dict[str, str]) -> None:
        self._log = log
        with log.open("wb") as output:
            self.child = subprocess.Popen(
                # A suite that a script runs in the background ignores SIGINT, and what it starts would, too.
                ["env", "--default-signal=INT", "bash", "-euc", commands],
                cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self._log.read_text()

    def interrupt(self) -> None:
        """Ctrl-C, as the terminal sends it: to everything that runs in it."""
        os.killpg(self.child.pid, signal.SIGINT)
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"Ctrl-C did not end in 30 s what printed\n{self.text}") from None

    def kill(self) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()


class Desk:
    """All terminals that somebody who follows the page has open."""

    def __init__(self, system: LocalSystem, folder: Path) -> None:
        self._system = system
        self._folder = folder
        self._terminals: list[Terminal] = []
        self._listening: list[Terminal] = []
        self._setup = ""  # what is evaluated in every terminal

    def follow(self, step: Step) -> None:
        if step.commands.startswith("eval "):
            self._setup += step.commands
            return
        seen = {terminal: len(terminal.text) for terminal in self._terminals}
        log = self._folder / f"{len(self._terminals)}.log"
        terminal = Terminal(self._setup + step.commands, log, self._environment())
        self._terminals.append(terminal)
        listens = step.commands.startswith(LISTENS)
        if not listens:
            assert terminal.child.wait(30) == 0, terminal.text
        for line in step.output:
            self._wait_for(line, seen, step)
        if listens:
            assert terminal.child.poll() is None, terminal.text
            self._listening.append(terminal)

    def _wait_for(self, line: str, seen: dict[Terminal, int], step: Step) -> None:
        deadline = time.monotonic() + SOON_SECONDS
        while not self._shows(line, seen):
            told = "\n".join(terminal.text for terminal in self._terminals)
            assert time.monotonic() < deadline, f"{step.commands}\ndoes not lead to\n\n{line}\n\nbut to\n\n{told}"
            time.sleep(0.05)

    def _shows(self, line: str, seen: dict[Terminal, int]) -> bool:
        pattern = re.compile(self._pattern(line), re.MULTILINE)
        return any(pattern.search(terminal.text[seen.get(terminal, 0) :]) for terminal in self._terminals)

    def _pattern(self, line: str) -> str:
        """The page has the ports of `make run`, the system others."""
        for listener in LISTENERS:
            line = line.replace(f":{listener.default}", f":{self._system.environment[listener.variable]}")
        return "^" + ".*".join(map(re.escape, line.split("…"))) + "$"

    def _environment(self) -> dict[str, str]:
        system = self._system.environment
        names = [*(listener.variable for listener in LISTENERS), "VAR_DIR"]
        path = f"{self._folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, **{name: system[name] for name in names}, "PATH": path}

    def leave(self) -> None:
        """Ctrl-C in every terminal; no example answers it with a traceback."""
        for terminal in self._listening:
            terminal.interrupt()
        for terminal in self._terminals:
            assert "Traceback" not in terminal.text, terminal.text

    def close(self) -> None:
        for terminal in self._terminals:
            terminal.kill()


@pytest.fixture
def system(tmp_path: Path) -> Iterator[LocalSystem]:
    with local_system(tmp_path / "system") as running:
        running.start()
        yield running


def install_tools(folder: Path) -> None:
    """Under their own names on PATH, printing each line at once, as on a terminal."""
    folder.mkdir()
    for name in ("mosquitto_sub", "mosquitto_pub", "coap-client-notls"):
        program = get(name)
        environment = [f"export {key}={shlex.quote(value)}" for key, value in program.environment.items()]
        command = f'exec stdbuf -oL {shlex.quote(str(program.path))} "$@"'
        (folder / name).write_text("\n".join(["#!/bin/sh", *environment, command, ""]))
        (folder / name).chmod(0o755)


def test_the_page_of_examples_can_be_followed_from_top_to_bottom(system: LocalSystem, tmp_path: Path) -> None:
    install_tools(tmp_path / "bin")
    desk = Desk(system, tmp_path)
    try:
        for step in steps():
            desk.follow(step)
        person, pump = Person(system), system.farm["devices"][0]["uuid"]
        until(lambda: person.get("state-changes", device=pump, commandState="applied")["count"])
        assert person.get(f"devices/{pump}")["connected"] is True
        desk.leave()
        until(lambda: person.get(f"devices/{pump}")["connected"] is False)  # the device said goodbye
    finally:
        desk.close()


def test_every_example_is_run_by_the_page() -> None:
    commands = "".join(step.commands for step in steps())
    scripts = [path.name for path in FOLDER.glob("*.sh")]
    pages = [path.name for path in FOLDER.glob("*.html")]
    assert [name for name in PROGRAMS if f"-m examples.{name}" not in commands] == []
    assert OF_ACTUATORS in (REPOSITORY / "docs" / "actuators.md").read_text()
    assert [name for name in scripts if f"examples/{name}" not in commands] == []
    assert [name for name in pages if f"/static/notifications/{name}" not in PAGE] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_help_of_an_example_says_what_it_does_and_what_can_be_set(name: str) -> None:
    command = [sys.executable, "-m", f"examples.{name}", "--help"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30).stdout
    usage, description, *_ = shown.split("\n\n")
    assert usage.startswith("usage: ")
    assert description.endswith((".", '"'))
    assert "--demo" in shown


def test_the_script_says_how_it_is_used_and_what_it_does_not_understand(tmp_path: Path) -> None:
    script = [str(FOLDER / "api-trigger-notification.sh")]
    environment = {**os.environ, "VAR_DIR": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*script, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=30
        )

    assert "Usage:" in run("--help").stdout
    assert (run("maybe").returncode, "not maybe" in run("maybe").stderr) == (2, True)
    assert "Start 'make run' first" in run("on").stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_without_a_running_system_says_what_to_do(name: str, tmp_path: Path) -> None:
    arguments = ["tell", "x"] if name == "rest_operator" else []
    command = [sys.executable, "-m", f"examples.{name}", "--demo", str(tmp_path / "demo.json"), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "Start `make run` first" in done.stderr
