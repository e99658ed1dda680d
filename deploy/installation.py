"""One system of this checkout: takes the environment, gives its data directory, ports, secrets and environments."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.servers import GATEWAY_USERNAME, LOOPBACK, write_private

SECRETS = ("SECRET_KEY", "JWT_SECRET", "DEVICE_TOKEN_KEY", "REDIS_PASSWORD", "MQTT_PASSWORD")


class InstallationError(Exception):
    """Nothing was started; the message has one line per problem, each with what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A port that a process of the system wants, and the variable that changes it."""

    process: str
    variable: str
    default: int
    host_variable: str = ""
    udp: bool = False


LISTENERS = (
    Listener(process="web", variable="PORT", default=3000, host_variable="BIND_HOST"),
    Listener(process="gateway (Socket.IO)", variable="SOCKETIO_PORT", default=3001, host_variable="SOCKETIO_HOST"),
    Listener(process="gateway (CoAP)", variable="COAP_PORT", default=5683, host_variable="COAP_HOST", udp=True),
    Listener(process="redis", variable="REDIS_PORT", default=16379),
    Listener(process="mosquitto", variable="MQTT_PORT", default=11883),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """Where the data is, who listens where, and the secrets; ports and hosts by the name of their variable."""

    var: Path
    ports: Mapping[str, int]
    hosts: Mapping[str, str]
    secrets: Mapping[str, str]

    @property
    def demo_file(self) -> Path:
        """The demo farm's logins and tokens."""
        return self.var / "demo.json"

    @property
    def logs(self) -> Path:
        return self.var / "log"

    def addresses(self, *, mqtt: bool) -> dict[str, str]:
        """Where everything listens, for a process that is trusted with no secret."""
        return {
            **{name: str(port) for name, port in self.ports.items()},
            **self.hosts,
            "REDIS_HOST": LOOPBACK,
            "MQTT_ENABLED": str(mqtt).lower(),
            "MQTT_HOST": LOOPBACK,
            "PYTHONUNBUFFERED": "1",
        }

    def environment(self, *, mqtt: bool) -> dict[str, str]:
        """The environment of every Django process of this installation."""
        # A secret's _FILE variant, a user name or TLS meant for other servers must not reach these processes.
        silenced = {f"{name}_FILE": "" for name in SECRETS}
        return {
            **silenced,
            **self.addresses(mqtt=mqtt),
            **self.secrets,
            "AEMOS_ENV": "development",
            "VAR_DIR": str(self.var),
            "DB_ENGINE": "sqlite",
            "DB_NAME": str(self.var / "aemos.sqlite3"),
            "REDIS_USERNAME": "",
            "REDIS_DB": "0",
            "REDIS_TLS": "false",
            "MQTT_USERNAME": GATEWAY_USERNAME,
            "MQTT_TLS": "false",
        }


@contextmanager
def opened(environment: Mapping[str, str], *, default_var: Path) -> Iterator[Installation]:
    """Hold the installation for this run; raises InstallationError when it already runs or a port is in use."""
    var = Path(environment.get("VAR_DIR") or default_var).absolute()
    with _held(var):
        ports = {listener.variable: _port(environment, listener) for listener in LISTENERS}
        hosts = {
            listener.host_variable: environment.get(listener.host_variable) or LOOPBACK
            for listener in LISTENERS
            if listener.host_variable
        }
        _check_free(ports, hosts=hosts)
        yield Installation(var=var, ports=ports, hosts=hosts, secrets=_kept_secrets(var / "secrets.json"))


@contextmanager
def _held(var: Path) -> Iterator[None]:
    """The lock is the kernel's: it goes with the process, however that ends."""
    try:
        var.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (var / "run.lock").open("a+")
    except OSError as error:
        raise InstallationError(f"cannot write to {var}: {error.strerror}; set VAR_DIR to another directory") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InstallationError(
                f"AEMOS already runs on {var} (process {lock.read().strip() or 'unknown'}); stop it there with Ctrl-C"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _port(environment: Mapping[str, str], listener: Listener) -> int:
    text = environment.get(listener.variable) or str(listener.default)
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise InstallationError(f"{listener.variable}={text} is not a port; set it to a number from 1 to 65535")
    return int(text)


def _check_free(ports: Mapping[str, int], *, hosts: Mapping[str, str]) -> None:
    problems = []
    with ExitStack() as held:
        for listener in LISTENERS:
            port, host = ports[listener.variable], hosts.get(listener.host_variable, LOOPBACK)
            try:
                held.enter_context(_occupied(host, port, udp=listener.udp))
            except OSError as error:
                problems.append(_refusal(listener, port=port, host=host, error=error))
    if problems:
        raise InstallationError("\n".join(problems))


def _occupied(host: str, port: int, *, udp: bool) -> socket.socket:
    """Held until all are checked, so that two listeners given the same port are noticed too."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
    try:
        if not udp:
            # Connections just closed do not keep a server from the port, so they are no reason to refuse.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        if not udp:
            probe.listen(1)
    except OSError:
        probe.close()
        raise
    return probe


def _refusal(listener: Listener, *, port: int, host: str, error: OSError) -> str:
    kind = "UDP" if listener.udp else "TCP"
    if error.errno != errno.EADDRINUSE:
        return (
            f"{kind} port {port} on {host}, wanted by {listener.process}, cannot be opened: {error.strerror or error}"
        )
    return (
        f"{kind} port {port} is in use and {listener.process} wants it: "
        f"stop what uses it, or choose another with {listener.variable}={port + 10} make run"
    )


def _kept_secrets(path: Path) -> dict[str, str]:
    """Generated once per data directory; what a later version adds is generated then."""
    kept: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    wanted = {name: kept.get(name) or secrets.token_urlsafe(48) for name in SECRETS}
    if wanted != kept:
        write_private(path, json.dumps(wanted, indent=2))
    return wanted
