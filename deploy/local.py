"""A whole system of its own for tests and benchmarks, whose processes can be killed one by one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy import run
from deploy.installation import LISTENERS, Installation, opened
from deploy.processes import Process, has_ended, kill, spawn, terminate
from deploy.programs import REPOSITORY
from deploy.servers import Server, free_port, start_mosquitto, start_redis, tail

GRACE_SECONDS = 8.0


class LocalSystem:
    """Redis, broker, web, worker, gateway and scheduler with the demo farm, on free ports of loopback."""

    def __init__(self, installation: Installation, extra: Mapping[str, str]) -> None:
        self._installation = installation
        data, ports, kept = installation.var, installation.ports, installation.secrets
        self.redis: Server = start_redis(data / "redis", port=ports["REDIS_PORT"], password=kept["REDIS_PASSWORD"])
        self.broker: Server = start_mosquitto(
            data / "mosquitto", port=ports["MQTT_PORT"], password=kept["MQTT_PASSWORD"]
        )
        self.environment = {**installation.environment(mqtt=True), **extra}
        self._described = {process.name: process for process in run.system(installation, environment=self.environment)}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.farm: dict[str, Any] = {}

    def prepare(self) -> None:
        """Migrates the database and makes the demo farm."""
        self.manage("migrate", "--verbosity", "0")
        self.manage("seed_demo", "--output", str(self._installation.var / "demo.json"))
        self.farm = json.loads((self._installation.var / "demo.json").read_text())

    def start(self, *names: str) -> None:
        """Starts the named processes, all of them without names, and waits until each answers."""
        for name in names or self._described:
            process = self._described[name]
            with self._log(name).open("ab") as log:
                self._running[name] = spawn(process, output=log, directory=REPOSITORY)
            self._wait_until_ready(process)

    def add_second(self, *names: str) -> None:
        """Describes another one of each, with ports of its own: "web" gets a "web 2", and so on."""
        ports = {
            listener.variable: free_port(socket.SOCK_DGRAM if listener.udp else socket.SOCK_STREAM)
            for listener in LISTENERS
            if listener.process.partition(" ")[0] in names
        }
        installation = replace(self._installation, ports={**self._installation.ports, **ports})
        environment = {**self.environment, **{variable: str(port) for variable, port in ports.items()}}
        for process in run.system(installation, environment=environment):
            if process.name in names:
                name = f"{process.name} 2"
                self._described[name] = replace(process, name=name)

    def kill(self, name: str) -> None:
        """SIGKILL, as a crash would be."""
        kill(self._running.pop(name))

    def stop(self, *names: str) -> None:
        for name in names or list(self._running):
            terminate(
                self._running.pop(name), stop_signal=self._described[name].stop_signal, grace_seconds=GRACE_SECONDS
            )

    def close(self) -> None:
        self.stop()
        self.broker.stop()
        self.redis.stop()

    def manage(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a management command of this system to its end."""
        return subprocess.run(
            (sys.executable, "manage.py", *arguments),
            cwd=REPOSITORY,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def running(self) -> list[str]:
        return list(self._running)

    def url(self, name: str, variable: str) -> str:
        """Where a process listens on the port that the variable names."""
        return f"http://127.0.0.1:{self._described[name].environment[variable]}"

    def log(self, name: str) -> str:
        return tail(self._log(name), lines=1_000)

    def newest_logs(self) -> str:
        """The newest lines of each log, for whoever looks for what went wrong."""
        logs = sorted(self._installation.var.rglob("*.log"))
        return "\n".join(f"--- {log.name}\n{tail(log, lines=25)}" for log in logs)

    @property
    def web(self) -> str:
        return f"http://127.0.0.1:{self._installation.ports['PORT']}"

    @property
    def socketio(self) -> str:
        return f"http://127.0.0.1:{self._installation.ports['SOCKETIO_PORT']}"

    @property
    def coap(self) -> str:
        return f"127.0.0.1:{self._installation.ports['COAP_PORT']}"

    def _log(self, name: str) -> Path:
        return self._installation.var / f"{name}.log"

    def _wait_until_ready(self, process: Process) -> None:
        deadline = time.monotonic() + process.ready_timeout_seconds
        while not process.ready():
            if has_ended(self._running[process.name]) or time.monotonic() > deadline:
                raise RuntimeError(f"{process.name} does not answer:\n{self.log(process.name)}")
            time.sleep(0.05)


@contextmanager
def local_system(folder: Path, **extra: str) -> Iterator[LocalSystem]:
    """A prepared system whose processes are still to be started; everything is stopped at the end of the block.

    `extra` are environment variables that every Django process gets.
    """
    ports = {
        listener.variable: str(free_port(socket.SOCK_DGRAM if listener.udp else socket.SOCK_STREAM))
        for listener in LISTENERS
    }
    with opened({"VAR_DIR": str(folder), **ports}, default_var=folder) as installation:
        system = LocalSystem(installation, extra)
        try:
            system.prepare()
            yield system
        except BaseException as error:
            error.add_note(system.newest_logs())
            raise
        finally:
            system.close()
