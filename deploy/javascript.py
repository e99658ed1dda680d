"""The packages of JavaScript programs: takes a folder with package.json and its lock, gives where node finds what they name."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from deploy.debian import FetchError
from deploy.programs import UNPACKED, announce, locked

FILES = ("package.json", "package-lock.json")
FETCH_SECONDS = 300


def modules(source: Path) -> Path:
    """The node_modules folder for NODE_PATH, fetched into .servers/ with `npm ci` once for each state of the lock.

    Raises FetchError with one line saying what is missing and what to do.
    """
    target = UNPACKED / f"javascript-of-{source.parent.name}"
    with locked():
        if not _is_current(source, target):
            announce(
                f"fetching the packages of {source.parent.name}/{source.name}/package-lock.json into {UNPACKED.name}/"
            )
            _fetch(source, target)
    return target / "node_modules"


def _is_current(source: Path, target: Path) -> bool:
    return all(
        (target / name).is_file() and (target / name).read_bytes() == (source / name).read_bytes() for name in FILES
    )


def _fetch(source: Path, target: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("npm is not on this machine, though node is; install it with your system's packages")
    if os.environ.get("AEMOS_SERVERS_OFFLINE") == "1":
        raise FetchError(
            f"no packages of {source.parent.name}/{source.name}/package-lock.json (AEMOS_SERVERS_OFFLINE=1 forbids fetching)"
        )
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=UNPACKED) as work:
        root = Path(work, "root")
        root.mkdir()
        for name in FILES:
            shutil.copy(source / name, root)
        _install(npm, root)
        shutil.rmtree(target, ignore_errors=True)
        root.rename(target)


def _install(npm: str, root: Path) -> None:
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, timeout=FETCH_SECONDS, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["npm failed"])[-1]
        raise FetchError(f"npm ci failed ({reason}); is there a network?")
