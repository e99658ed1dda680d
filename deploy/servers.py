"""Redis and Mosquitto of one's own: takes a data directory, gives a server that answers on loopback."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import time
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.debian import FetchError
from deploy.processes import Process, has_ended, kill, spawn, terminate
from deploy.programs import BUNDLES, announce, dynamic_security_plugin, find, get

LOOPBACK = "127.0.0.1"
GATEWAY_USERNAME = "aemos-gateway"
STOP_GRACE_SECONDS = 8.0
PROBE_SECONDS = 1.0


class ServerError(Exception):
    """A server could not be started; the message says why and ends with the tail of its log."""


@dataclass(slots=True, kw_only=True)
class Server:
    """One server: how to start it, where it listens, and its child process while it runs.

    `disposable` is a directory that goes when the server is stopped for good.
    """

    process: Process
    port: int
    username: str
    password: str
    log: Path
    host: str = LOOPBACK
    disposable: Path | None = None
    child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self.child.pid if self.child else None

    def start(self) -> None:
        """Start and wait until it answers; raises ServerError with the tail of the log when it does not in time."""
        with self.log.open("ab") as log:
            self.child = spawn(self.process, output=log)
        deadline = time.monotonic() + self.process.ready_timeout_seconds
        while not self.process.ready():
            if has_ended(self.child) or time.monotonic() > deadline:
                self.kill()
                raise ServerError(f"{self.process.name} does not answer on port {self.port}\n{tail(self.log)}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it for good, gracefully; a stopped server may be stopped again."""
        self._terminate()
        if self.disposable:
            shutil.rmtree(self.disposable, ignore_errors=True)

    def restart(self) -> None:
        """Stop gracefully and start on the same port with the same data."""
        self._terminate()
        self.start()

    def kill(self) -> None:
        """SIGKILL, as a crash would be; `start` brings it back with the same data."""
        if self.child:
            kill(self.child)
            self.child = None

    def _terminate(self) -> None:
        if self.child:
            terminate(self.child, stop_signal=self.process.stop_signal, grace_seconds=STOP_GRACE_SECONDS)
            self.child = None


def start_redis(data: Path, *, port: int = 0, password: str = "") -> Server:
    """Start Redis; port 0 takes a free one, an empty password is generated. Raises FetchError, ServerError."""
    server = redis(data, port=port, password=password)
    server.start()
    return server


def start_mosquitto(data: Path, *, port: int = 0, password: str = "") -> Server:
    """Start Mosquitto with the gateway's user; parameters and errors as for `start_redis`."""
    server = mosquitto(data, port=port, password=password)
    server.start()
    return server


def redis(data: Path, *, port: int = 0, password: str = "") -> Server:
    """Describe a durable, password-protected Redis; writes its configuration but starts nothing."""
    program = get("redis-server")
    port, password = port or free_port(), password or secrets.token_urlsafe(32)
    conf = _private_directory(data) / "redis.conf"
    write_private(
        conf,
        f'bind {LOOPBACK}\nport {port}\nrequirepass {password}\ndir "{data}"\n'
        'daemonize no\nappendonly yes\nappendfsync always\nsave ""\nmaxmemory-policy noeviction\n',
    )
    process = Process(
        name="redis",
        command=(str(program.path), str(conf)),
        environment=program.environment,
        ready=lambda: _redis_answers(port, password=password),
        quiet=True,
    )
    return Server(process=process, port=port, username="default", password=password, log=data / "redis.log")


def mosquitto(data: Path, *, port: int = 0, password: str = "") -> Server:
    """Describe a Mosquitto that knows the gateway's user and refuses everybody else; starts nothing.

    Devices added by the gateway are kept in the data directory. Raises ServerError when the plugin is missing.
    """
    program = get("mosquitto")
    plugin = dynamic_security_plugin(program)
    if plugin is None:
        raise ServerError(f"{program.path} comes without its dynamic-security plugin; install Mosquitto 2 with it")
    port, password = port or free_port(), password or secrets.token_urlsafe(32)
    security = _private_directory(data) / "dynamic-security.json"
    write_private(security, json.dumps(_with_gateway(security, password=password), indent=2))
    conf = data / "mosquitto.conf"
    write_private(conf, _mosquitto_conf(data, port=port, plugin=plugin, security=security))
    process = Process(
        name="mosquitto",
        command=(str(program.path), "-c", str(conf)),
        environment=program.environment,
        ready=lambda: _mosquitto_answers(port, password=password),
        quiet=True,
    )
    return Server(process=process, port=port, username=GATEWAY_USERNAME, password=password, log=data / "mosquitto.log")


def initial_security(username: str, password: str) -> dict[str, Any]:
    """The dynamic-security configuration (Mosquitto 2.0) in which `username` may do all and nobody else anything."""
    salt, iterations = secrets.token_bytes(12), 101
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
    client = {
        "username": username,
        "password": b64encode(digest).decode(),
        "salt": b64encode(salt).decode(),
        "iterations": iterations,
        "roles": [{"rolename": "gateway"}],
    }
    grants = [
        (kind, topic)
        for kind in ("publishClientSend", "publishClientReceive", "subscribePattern", "unsubscribePattern")
        for topic in ("$CONTROL/dynamic-security/#", "$SYS/broker/#", "#")
    ]
    acls = [{"acltype": kind, "topic": topic, "priority": 0, "allow": True} for kind, topic in grants]
    return {
        "defaultACLAccess": {
            "publishClientSend": False, "publishClientReceive": False, "subscribe": False, "unsubscribe": True,
        },
        "clients": [client],
        "groups": [],
        "roles": [{"rolename": "gateway", "acls": acls}],
    }  # fmt: skip


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port of loopback that was free a moment ago. Not one that the system gives to outgoing connections (32768 and above on
    Linux, IANA's dynamic ports elsewhere), which may take it before the server that it is for.
    """
    for _ in range(100):
        port = random.randrange(10_000, 32_768)  # noqa: S311  guards nothing
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise ServerError("a hundred ports of 127.0.0.1 between 10000 and 32767 are in use")


def tail(log: Path, *, lines: int = 15) -> str:
    """The last lines of a log, or a word that there is none."""
    text = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(text[-lines:]) or "(no output)"


def write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner may read, never half written."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def _private_directory(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _with_gateway(security: Path, *, password: str) -> dict[str, Any]:
    """What the broker has written so far, with the gateway's user and role as they have to be now."""
    wanted = initial_security(GATEWAY_USERNAME, password)
    if not security.exists():
        return wanted
    kept: dict[str, Any] = json.loads(security.read_text())
    for part, key in (("clients", "username"), ("roles", "rolename")):
        ours = {entry[key] for entry in wanted[part]}
        kept[part] = [entry for entry in kept.get(part, []) if entry[key] not in ours] + wanted[part]
    return kept


def _mosquitto_conf(data: Path, *, port: int, plugin: Path, security: Path) -> str:
    # Started by root, Mosquitto would become a user that can neither read its configuration nor write its data.
    user = "user root\n" if os.geteuid() == 0 else ""
    return (
        f"per_listener_settings false\nlistener {port} {LOOPBACK}\nallow_anonymous false\n{user}"
        f"plugin {plugin}\nplugin_opt_config_file {security}\n"
        # Held back telemetry waits here; beyond the broker's own bounds it would drop what devices have an acknowledgement for.
        "max_queued_messages 100000\nmax_inflight_messages 1000\nsys_interval 5\n"
        f"persistence true\npersistence_location {data}/\nautosave_interval 60\n"
        "log_dest stderr\nlog_type error\nlog_type warning\nlog_type notice\nconnection_messages false\n"
    )


def exchange(port: int, request: bytes) -> bytes:
    """The first bytes a server answers on loopback; empty when it does not."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=PROBE_SECONDS) as connection:
            connection.sendall(request)
            return connection.recv(256)
    except OSError:
        return b""


def _redis_answers(port: int, *, password: str) -> bool:
    return b"+PONG" in exchange(port, f"AUTH {password}\r\nPING\r\n".encode())


def _mosquitto_answers(port: int, *, password: str) -> bool:
    """Log in with MQTT 3.1.1; CONNACK with return code 0 means that the plugin has loaded the user."""
    fields = ("aemos-ready-probe", GATEWAY_USERNAME, password)
    payload = b"".join(struct.pack("!H", len(each.encode())) + each.encode() for each in fields)
    body = b"\x00\x04MQTT\x04\xc2\x00\x0a" + payload
    return exchange(port, b"\x10" + bytes([len(body)]) + body) == b"\x20\x02\x00\x00"


def main(arguments: list[str] | None = None) -> int:
    """`get [NAME...]` finds or fetches programs and says where they are; 1 when one cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m deploy.servers", description=main.__doc__)
    parser.add_argument("action", choices=["get", "find"], help="get: fetch what is missing; find: only look")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BUNDLES)}; all when none is named")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BUNDLES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    names = options.names or list(BUNDLES)
    if options.action == "get":
        _fetch_missing(names)
    found = {name: find(name) for name in names}
    for name, program in found.items():
        print(f"{name}: {program.path if program else 'not found'}", flush=True)
    return 0 if all(found.values()) else 1


def _fetch_missing(names: list[str]) -> None:
    failed: set[str] = set()  # several programs come from one package, whose failure is reported once
    for name in names:
        try:
            if BUNDLES[name] not in failed:
                get(name)
        except FetchError as error:
            failed.add(BUNDLES[name])
            announce(str(error))


if __name__ == "__main__":
    sys.exit(main())
