"""A PostgreSQL for tests and benchmarks, which answers on loopback and is gone when it is stopped."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import struct
import subprocess
import tempfile
from pathlib import Path

from deploy.processes import Process
from deploy.programs import UNPACKED, Program, get
from deploy.servers import LOOPBACK, Server, ServerError, exchange, free_port, write_private

SUPERUSER = "aemos"


def start_postgresql(*, port: int = 0, durable: bool = False) -> Server:
    """Start a PostgreSQL, its data in a temporary directory that `stop` removes. Raises FetchError, ServerError.

    For tests it need not survive a power cut; a `durable` one syncs at every commit, as PostgreSQL does by default.
    """
    server = postgresql(port=port, durable=durable)
    try:
        server.start()
    except ServerError:
        server.stop()
        raise
    return server


def postgresql(*, port: int = 0, durable: bool = False) -> Server:
    """Describe a PostgreSQL with an initialised cluster in a directory that its user can reach; starts nothing.

    PostgreSQL refuses to run as root, so root hands it to another user.
    """
    program, initdb = get("postgres"), get("initdb")
    port, password = port or free_port(), secrets.token_urlsafe(32)
    home = Path(tempfile.mkdtemp(prefix="aemos-postgresql-"))
    user = _unprivileged_user() if os.geteuid() == 0 else None
    try:
        if user is not None and UNPACKED in program.path.parents and not _reachable(UNPACKED):
            program, initdb = _copied(program, into=home), _copied(initdb, into=home)
        _initialise_cluster(initdb, home=home, user=user, password=password)
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise
    settings = {
        "listen_addresses": LOOPBACK, "port": port, "unix_socket_directories": home, "jit": "off", "max_connections": 100,
    }  # fmt: skip
    if not durable:
        settings |= dict.fromkeys(("fsync", "full_page_writes", "synchronous_commit"), "off")
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    process = Process(
        name="postgresql",
        command=(str(program.path), "-D", str(home / "data"), *options),
        environment=program.environment,
        ready=lambda: _postgresql_answers(port),
        stop_signal=signal.SIGINT,  # its "fast" shutdown: does not wait for clients to leave
        user=user,
        quiet=True,
    )
    log = home / "postgresql.log"
    return Server(process=process, port=port, username=SUPERUSER, password=password, log=log, disposable=home)


def _unprivileged_user() -> int:
    known = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
    return known.get("postgres", known.get("nobody", 65534))


def _reachable(directory: Path) -> bool:
    """Whether any user may go through all directories down to this one."""
    return all(place.stat().st_mode & 0o001 for place in (directory, *directory.parents))


def _copied(program: Program, *, into: Path) -> Program:
    source, target = UNPACKED / "postgresql", into / "program"
    if not target.exists():
        # The compiler library is two thirds of the size and only needed for jit, which is off.
        unneeded = shutil.ignore_patterns("libLLVM*", "doc", "man", "locale")
        shutil.copytree(source, target, symlinks=True, ignore=unneeded)
    environment = {key: value.replace(str(source), str(target)) for key, value in program.environment.items()}
    return Program(target / program.path.relative_to(source), environment)


def _initialise_cluster(initdb: Program, *, home: Path, user: int | None, password: str) -> None:
    password_file = home / "password"
    write_private(password_file, password)
    if user is not None:
        os.chown(home, user, user)
        os.chown(password_file, user, user)
    command = [
        str(initdb.path), "-D", str(home / "data"), "-U", SUPERUSER, f"--pwfile={password_file}",
        "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync",
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **initdb.environment}, cwd=home, user=user, group=user,
        extra_groups=None if user is None else [], capture_output=True, text=True, check=False,
    )  # fmt: skip
    password_file.unlink()
    if done.returncode:
        raise ServerError(f"initdb failed: {done.stderr.strip() or done.stdout.strip()}")


def _postgresql_answers(port: int) -> bool:
    """Send a startup message; a server that is up asks for the password, one that starts up answers with an error."""
    body = struct.pack("!I", 3 << 16) + f"user\0{SUPERUSER}\0database\0postgres\0\0".encode()
    return exchange(port, struct.pack("!I", len(body) + 4) + body).startswith(b"R")
