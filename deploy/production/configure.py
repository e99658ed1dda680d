"""What a system in production needs before its first start: takes a directory and a host name, gives settings and secrets.

    python -m deploy.production.configure /etc/aemos --host farm.example.org

Run again, it keeps every secret and writes the rest anew. docs/production-deployment.md goes through the files.
"""

from __future__ import annotations

import argparse
import grp
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

from deploy.production import redis_users
from deploy.servers import GATEWAY_USERNAME, initial_security

PROCESSES = ("web", "worker", "gateway", "scheduler", "commands")
PLUGINS = "/usr/lib/*-linux-*/mosquitto_dynamic_security.so"
TEMPLATES = Path(__file__).parent / "templates"
CERTIFICATE_DAYS = 3650
# Settings of aemos.env that come from here; a person's own lines below them stay.
_MARK = "# Your own settings, kept when this file is written again:"
_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the servers are: the host of each, the address they listen on, and where their data is.

    `has_superuser`: PostgreSQL is to be given a password of its superuser.
    """

    hosts: Mapping[str, str]
    listen: str
    redis_data: str
    broker_data: str
    broker_plugin: str = ""
    has_superuser: bool = False


MACHINE = Places(
    hosts=dict.fromkeys(("web", "gateway", "redis", "database", "broker"), "127.0.0.1"),
    listen="127.0.0.1",
    redis_data="/var/lib/redis",
    broker_data="/var/lib/mosquitto",
)
CONTAINERS = Places(
    hosts={"web": "web", "gateway": "gateway", "redis": "redis", "database": "postgresql", "broker": "mosquitto"},
    listen="0.0.0.0",  # noqa: S104  a network of their own, of which compose.yml publishes three ports
    redis_data="/data",
    broker_data="/mosquitto/data",
    broker_plugin="/usr/lib/mosquitto_dynamic_security.so",
    has_superuser=True,
)
"""On one machine, from Debian's packages, and in containers, from the images of deploy/docker/compose.yml."""


class ConfigurationError(Exception):
    """Nothing more was written; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """Where the files go, the group that may read those of AEMOS, and the mode of those of the servers."""

    path: Path
    group: int
    mode_for_servers: int = 0o640

    def read(self, name: str) -> str:
        file = self.path / name
        return file.read_text() if file.exists() else ""

    def write(self, name: str, text: str) -> None:
        """Replaces the file; readable by its owner and the group, and as `mode_for_servers` says below a server's folder."""
        file = self.path / name
        file.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        mode = 0o640 if file.parent == self.path else self.mode_for_servers
        temporary = file.with_name(f".{file.name}.new")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640), "w") as opened:
            opened.write(text)
        temporary.chmod(mode)
        for each in (file.parent, temporary):
            os.chown(each, -1, self.group)
        temporary.replace(file)
        print(f"wrote {file}")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        # The images run as users of their own, which the host does not know: the directory itself keeps others out.
        mode = 0o644 if options.containers else 0o640
        directory = Directory(path=options.directory.absolute(), group=_group(options.group), mode_for_servers=mode)
        if options.new_redis_passwords or options.forget_old_redis_passwords:
            _rotate(directory, forget=options.forget_old_redis_passwords)
        else:
            places = CONTAINERS if options.containers else MACHINE
            plugin = options.broker_plugin or places.broker_plugin or _plugin()
            _configure(directory, host=_host(options.host), places=replace(places, broker_plugin=plugin))
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; run this as a user who may write there", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.production.configure",
        description="Writes the settings, secrets and server configurations of a production system. Secrets that are "
        "there already stay as they are.",
        epilog="The files and what to do with each: docs/production-deployment.md",
    )
    parser.add_argument("directory", type=Path, help="where the files go, such as /etc/aemos")
    parser.add_argument("--host", help="the name under which people and devices reach the system")
    parser.add_argument("--group", default="", help="the group of the user that AEMOS runs as; its members may read")
    parser.add_argument(
        "--broker-plugin",
        default="",
        help="where Mosquitto's mosquitto_dynamic_security.so is; looked for below /usr/lib without it",
    )
    parser.add_argument(
        "--containers", action="store_true", help="for deploy/docker/compose.yml instead of one machine's own servers"
    )
    rotation = parser.add_mutually_exclusive_group()
    rotation.add_argument(
        "--new-redis-passwords",
        action="store_true",
        help="make new passwords of Redis for the processes; the earlier ones stay valid beside them",
    )
    rotation.add_argument(
        "--forget-old-redis-passwords", action="store_true", help="end what --new-redis-passwords has begun"
    )
    return parser


def _host(name: str | None) -> str:
    if not name or not _HOST.match(name):
        raise ConfigurationError(f"--host is {name!r}; give the name alone, such as farm.example.org")
    return name


def _group(name: str) -> int:
    if not name:
        return -1
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigurationError(f"there is no group {name}; make the user first") from None


def _plugin() -> str:
    found = sorted(Path("/").glob(PLUGINS.lstrip("/")))
    if not found:
        raise ConfigurationError(f"no {PLUGINS}: install Mosquitto, or name the file with --broker-plugin")
    return str(found[0])


def _configure(directory: Directory, *, host: str, places: Places) -> None:
    earlier = directory.read("aemos.env")
    made = {name: _variables(earlier).get(name) or secrets.token_urlsafe(48) for name in _SECRETS}
    broker = _kept(directory, "gateway.env", "MQTT_PASSWORD")
    passwords = _redis_passwords(directory)
    directory.write("aemos.env", _shared(host, made, places=places, own=earlier.partition(_MARK)[2]))
    _write_processes(directory, passwords, broker=broker)
    _write_users(directory, {user: [password] for user, password in passwords.items()})
    words = {
        "host": host,
        "database_password": made["DB_PASSWORD"],
        "listen": places.listen,
        "redis_data": places.redis_data,
        "broker_data": places.broker_data,
        "broker_plugin": places.broker_plugin,
        **places.hosts,
    }
    for name in ("redis/redis.conf", "postgresql/aemos.sql", "mosquitto/mosquitto.conf", "caddy/Caddyfile"):
        directory.write(name, Template((TEMPLATES / Path(name).name).read_text()).substitute(words))
    if not directory.read("mosquitto/dynamic-security.json"):
        users = json.dumps(initial_security(GATEWAY_USERNAME, broker), indent=2)
        directory.write("mosquitto/dynamic-security.json", f"{users}\n")
    if places.has_superuser:
        superuser = _kept(directory, "postgresql/superuser.env", "POSTGRES_PASSWORD")
        directory.write("postgresql/superuser.env", f"POSTGRES_PASSWORD={superuser}\n")
    _certificates(directory, host)


def _variables(text: str) -> dict[str, str]:
    lines = (line.partition("=") for line in text.splitlines() if line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in lines}


def _kept(directory: Directory, file: str, name: str) -> str:
    return _variables(directory.read(file)).get(name) or secrets.token_urlsafe(32)


def _redis_passwords(directory: Directory) -> dict[str, str]:
    files = {user: f"{user}.env" for user in PROCESSES} | {redis_users.OPERATOR: "redis/operator.env"}
    return {user: _kept(directory, file, "REDIS_PASSWORD") for user, file in files.items()}


def _write_processes(directory: Directory, passwords: Mapping[str, str], *, broker: str) -> None:
    for user in PROCESSES:
        lines = [f"REDIS_USERNAME={user}", f"REDIS_PASSWORD={passwords[user]}"]
        if user in ("gateway", "commands"):
            lines.append(f"MQTT_PASSWORD={broker}")
        directory.write(f"{user}.env", "\n".join(lines) + "\n")


def _write_users(directory: Directory, passwords: Mapping[str, list[str]]) -> None:
    directory.write("redis/users.acl", redis_users.users_file(passwords))
    operator = passwords[redis_users.OPERATOR][0]
    directory.write("redis/operator.env", f"REDIS_USERNAME={redis_users.OPERATOR}\nREDIS_PASSWORD={operator}\n")


def _rotate(directory: Directory, *, forget: bool) -> None:
    """Two passwords for each user while processes restart one by one; afterwards only the new one."""
    users = directory.read("redis/users.acl")
    if not users:
        raise ConfigurationError(f"{directory.path} has no redis/users.acl; write it first, with --host")
    if not forget and redis_users.has_two_passwords(users):
        raise ConfigurationError(
            "the passwords of the last change are still valid beside the new ones; "
            "restart every process, then run this with --forget-old-redis-passwords"
        )
    current = _redis_passwords(directory)
    # The operator's stays: somebody has to be able to log in to Redis, and tell it to read the file again.
    new = {user: current[user] if forget or user not in PROCESSES else secrets.token_urlsafe(32) for user in current}
    # First what Redis accepts, then what processes send: a write that stops half way leaves all of them able to log in.
    _write_users(
        directory, {user: list(dict.fromkeys([new[user]] if forget else [new[user], current[user]])) for user in new}
    )
    if not forget:
        _write_processes(directory, new, broker=_kept(directory, "gateway.env", "MQTT_PASSWORD"))


def _certificates(directory: Directory, host: str) -> None:
    """A certificate authority of one's own for devices over MQTT, which cannot follow a public one's monthly renewals."""
    folder = directory.path / "mosquitto"
    if (folder / "server.crt").exists():
        return
    ca_key, ca, key, request, certificate = (
        str(folder / name) for name in ("ca.key", "ca.crt", "server.key", "server.csr", "server.crt")
    )
    days = ("-days", str(CERTIFICATE_DAYS))
    names = folder / "server.ext"
    kind = "IP" if re.fullmatch(r"[0-9.]+", host) else "DNS"
    directory.write("mosquitto/server.ext", f"subjectAltName={kind}:{host}\nbasicConstraints=CA:FALSE\n")
    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    _openssl("req", "-x509", *ec, "-keyout", ca_key, "-out", ca, "-subj", "/CN=AEMOS devices", *days)
    _openssl("req", "-new", *ec, "-keyout", key, "-out", request, "-subj", f"/CN={host[:64]}")
    signer = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial")
    _openssl("x509", "-req", "-in", request, *signer, "-out", certificate, "-extfile", str(names), *days)
    for name in ("server.csr", "server.ext"):
        (folder / name).unlink()
    Path(key).chmod(directory.mode_for_servers)
    print(f"wrote {ca} and {certificate}")


def _openssl(*arguments: str) -> None:
    try:
        subprocess.run(("openssl", *arguments), check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigurationError("there is no openssl; install it") from None
    except subprocess.CalledProcessError as error:
        raise ConfigurationError(f"openssl {arguments[0]} failed: {error.stderr.strip().splitlines()[-1]}") from None


_SECRETS = ("SECRET_KEY", "JWT_SECRET", "DEVICE_TOKEN_KEY", "DB_PASSWORD", "METRICS_TOKEN")


def _shared(host: str, made: Mapping[str, str], *, places: Places, own: str) -> str:
    settings = {
        "AEMOS_ENV": "production",
        **made,
        "ALLOWED_HOSTS": f"{host},localhost",
        "CSRF_TRUSTED_ORIGINS": f"https://{host}",
        "SOCKETIO_URL": f"https://{host}",
        "SOCKETIO_ALLOWED_ORIGINS": f"https://{host}",
        "VAR_DIR": "/var/lib/aemos",
        "BIND_HOST": places.listen,
        "SOCKETIO_HOST": places.listen,
        "COAP_HOST": "0.0.0.0",  # noqa: S104  devices reach CoAP without the proxy
        "DB_ENGINE": "postgresql",
        "DB_HOST": places.hosts["database"],
        "REDIS_HOST": places.hosts["redis"],
        "MQTT_HOST": places.hosts["broker"],
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    return "\n".join(["# Settings of every process; docs/configuration.md explains them.", *lines, "", _MARK]) + (
        own or "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
