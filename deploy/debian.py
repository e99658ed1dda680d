"""Debian packages without installing them: takes their names, gives a directory with them and what they miss.

Installing a server package would start a system service and need root. Downloading and unpacking needs neither,
and every file apt writes goes to a temporary directory instead of the machine's own.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

APT_GET = "apt-get"
APT_TIMEOUT_SECONDS = 600

# #clear drops hooks that would clean the machine's own cache; the sandbox user could not enter a private directory.
APT_CONF = """\
#clear APT::Update;
#clear DPkg::Post-Invoke;
#clear Dir::Cache::archives;
Dir::Cache "{work}/cache";
Dir::Cache::archives "{work}/archives";
Debug::NoLocking "true";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"""


class FetchError(Exception):
    """A program could not be had; the message is one line for the person at the terminal."""


def unpack(pattern: str, *, into: Path, say: Callable[[str], None]) -> None:
    """Download the packages matching `pattern` and their missing dependencies, and rename them unpacked to `into`.

    `pattern` is a space-separated list of package names; one that ends in `-N` means its highest version number.
    Raises FetchError when apt is absent, nothing can be reached, or the archive does not have the package.
    """
    if not shutil.which(APT_GET) or not shutil.which("dpkg-deb"):
        raise FetchError("this machine has no apt-get and dpkg-deb")
    into.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=into.parent) as temporary:
        work = Path(temporary)
        archives = _download(pattern, work=work, say=say)
        root = work / "root"
        root.mkdir()
        for archive in archives:
            _run("dpkg-deb", "-x", str(archive), str(root))
        shutil.rmtree(into, ignore_errors=True)
        root.rename(into)


def _download(pattern: str, *, work: Path, say: Callable[[str], None]) -> list[Path]:
    """Download with the machine's package lists; when they are missing or too old, with freshly made private ones."""
    for name in ("cache", "archives/partial"):
        (work / name).mkdir(parents=True)
    conf = work / "apt.conf"
    conf.write_text(APT_CONF.format(work=work))
    try:
        return _download_listed(pattern, conf=conf, say=say)
    except FetchError as error:
        say(f"not with the machine's own package lists ({error}); reading fresh ones into a temporary directory")
    lists, problem = _fresh_lists()
    conf.write_text(APT_CONF.format(work=work) + f'Dir::State::lists "{lists}";\n')
    try:
        return _download_listed(pattern, conf=conf, say=say)
    except FetchError as error:
        raise FetchError(f"{error}; {problem}" if problem else str(error)) from None


@functools.cache
def _fresh_lists() -> tuple[Path, str]:
    """Package lists that this process alone uses, and the first problem with reading them.

    One unreachable source among several is no failure: what matters is whether the packages can be had afterwards.
    """
    work = Path(tempfile.mkdtemp(prefix="aemos-apt-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    for name in ("cache", "archives/partial", "lists/partial"):
        (work / name).mkdir(parents=True)
    conf = work / "apt.conf"
    conf.write_text(APT_CONF.format(work=work) + f'Dir::State::lists "{work}/lists";\n')
    try:
        done = _finished(APT_GET, "-c", str(conf), "-qq", "update")
    except FetchError as error:
        return work / "lists", str(error)
    return work / "lists", _reason(done.stderr, kinds=("E", "W"))


def _download_listed(pattern: str, *, conf: Path, say: Callable[[str], None]) -> list[Path]:
    names = [_newest(name, conf=conf) for name in pattern.split()]
    install = (APT_GET, "-c", str(conf), "-qq", "-y", "--reinstall", "install")
    sizes = re.findall(r"^'\S+' \S+ (\d+)", _run(*install, "--print-uris", *names), re.MULTILINE)
    if not sizes:
        raise FetchError(f"the package lists do not say where {', '.join(names)} can be had")
    say(f"fetching {', '.join(names)}: {len(sizes)} Debian packages, {sum(map(int, sizes)) / 1e6:.1f} MB")
    _run(*install, "--download-only", *names)
    return sorted((conf.parent / "archives").glob("*.deb"))


def _newest(name: str, *, conf: Path) -> str:
    if not name.endswith("-N"):
        return name
    known = _run("apt-cache", "-c", str(conf), "pkgnames", name[:-1]).split()
    versions = [int(match[1]) for each in known if (match := re.fullmatch(re.escape(name[:-1]) + r"(\d+)", each))]
    if not versions:
        raise FetchError(f"the package lists have no {name[:-1]}*")
    return f"{name[:-1]}{max(versions)}"


def _run(*command: str) -> str:
    done = _finished(*command)
    if done.returncode:
        raise FetchError(_reason(done.stderr) or f"{command[0]} failed with code {done.returncode}")
    return done.stdout


def _finished(*command: str) -> subprocess.CompletedProcess[str]:
    # Messages are read below, so they have to be the untranslated ones.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=APT_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"{command[0]} did not finish within {APT_TIMEOUT_SECONDS} s") from None


def _reason(stderr: str, *, kinds: tuple[str, ...] = ("E",)) -> str:
    """The first problem apt names, as part of a line."""
    lines = [line.split(":", 1) for line in stderr.splitlines() if line.startswith(tuple(f"{kind}:" for kind in kinds))]
    return " ".join(lines[0][1].split()).rstrip(".") if lines else ""
