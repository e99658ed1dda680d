"""One machine in production, made by the commands of a guide: its pages in, the system running as systemd would run it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import paho.mqtt.client as mqtt
import psycopg
import redis
import requests
from paho.mqtt.enums import CallbackAPIVersion

from deploy.postgresql import start_postgresql
from deploy.processes import Process, kill, spawn, terminate
from deploy.programs import REPOSITORY, dynamic_security_plugin, get
from deploy.servers import Server, free_port, tail
from tests.waiting import until

HOST = "farm.example.org"
ADMIN_PASSWORD = "correct-horse-battery-staple"
# Done once for a machine, with packages and users of the system; tests have the programs, and run as who they are.
NOT_HERE = (
    "apt-get install", "adduser", "git clone", "git fetch", "git checkout", "python3 -m venv", ".venv/bin/pip install", "chown",
)  # fmt: skip
MACHINE_FOLDERS = ("/etc", "/var/lib", "/var/backups")


class Machine:
    """Folders, ports and servers of its own. Commands of a guide run with its paths in the place of the system's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("PORT", "SOCKETIO_PORT", "REDIS_PORT", "MQTT_PORT", "MQTTS_PORT", "HTTP_PORT", "HTTPS_PORT")
        self.ports = {name: free_port() for name in names} | {"COAP_PORT": free_port(socket.SOCK_DGRAM)}
        for place in ("redis", "mosquitto/certs", "caddy", "systemd/system"):
            (folder / "etc" / place).mkdir(parents=True)
        for place in ("redis/appendonlydir", "mosquitto", "aemos"):
            (folder / "var/lib" / place).mkdir(parents=True)
        (folder / "var/backups").mkdir(parents=True)
        self.postgresql: Server = start_postgresql(durable=True)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.skipped: list[str] = []
        self.said = ""
        self._socket: socket.socket | None = None
        (folder / ".curlrc").write_text(
            f'connect-to = "{HOST}:443:127.0.0.1:{self.ports["HTTPS_PORT"]}"\nmax-time = 20\n'
            f'cacert = "{folder}/caddy/caddy/pki/authorities/local/root.crt"\n'
        )

    # Following a guide

    def follow(self, page: str, *sections: str) -> None:
        """Runs every command of the page's sections (all without names), stopping at the first that fails."""
        text = (REPOSITORY / "docs" / page).read_text()
        for section in re.split(r"^## ", text, flags=re.MULTILINE):
            if not sections or section.splitlines()[0] in sections:
                for block in re.findall(r"^```sh\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL):
                    self._run_block(block)

    def _run_block(self, block: str) -> None:
        script: list[str] = []
        for line in block.splitlines():
            command = re.sub(r"\bsudo (-u \w+ )?", "", line)
            if any(command.startswith(each) for each in NOT_HERE):
                self.skipped.append(command)
            elif command.startswith("systemctl "):
                self.shell("\n".join(script))
                script = []
                self._systemctl(shlex.split(command)[1:])
            else:
                script.append(command)
        self.shell("\n".join(script))

    def shell(self, script: str, *, first_on_path: Path | None = None) -> str:
        """What the commands print. The last answer stays in `said`."""
        if not script.strip():
            return ""
        if "deploy.production.configure" in script:
            script = script.replace(" --group aemos", f" --broker-plugin {dynamic_security_plugin(get('mosquitto'))}")
        script = script.replace("redis-cli ", f"redis-cli -p {self.ports['REDIS_PORT']} ")
        script = re.sub(r"(createsuperuser .*)", r"\1 --noinput", script)
        script = re.sub(r" -[og] \w+(?=.* /)", "", script)  # owners are the system's users
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self._here(script)],
            cwd=REPOSITORY,
            env={
                **self._programs(first_on_path),
                "HOME": str(self.folder),
                "CURL_HOME": str(self.folder),
                "AEMOS_ETC": str(self.folder / "etc/aemos"),
                "ADMIN_PASSWORD": ADMIN_PASSWORD,
                "DJANGO_SUPERUSER_PASSWORD": ADMIN_PASSWORD,
                "PGHOST": "127.0.0.1",
                "PGPORT": str(self.postgresql.port),
                "PGUSER": self.postgresql.username,
                "PGPASSWORD": self._database_password(),
                "PGDATABASE": "postgres",
            },
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}\n{self.logs()}"
        if "deploy.production.configure" in script:
            self._take_free_ports()
        self.said = done.stdout
        return done.stdout

    def _here(self, text: str) -> str:
        for place in MACHINE_FOLDERS:
            text = re.sub(rf"(?<![\w/.-]){place}/", f"{self.folder}{place}/", text)
        return text.replace("/opt/aemos", str(REPOSITORY))

    def _database_password(self) -> str:
        """That of PostgreSQL's superuser, who is called aemos here, until the guide gives the user aemos another."""
        with suppress(psycopg.OperationalError, FileNotFoundError), self.database():
            return self.variables("aemos.env")["DB_PASSWORD"]
        return self.postgresql.password

    def _programs(self, first: Path | None) -> dict[str, str]:
        """Where the shell finds psql and redis-cli, which may be unpacked beside the servers with libraries of their own."""
        programs = [get(name) for name in ("psql", "pg_dump", "redis-cli")]
        libraries = [each.environment["LD_LIBRARY_PATH"] for each in programs if "LD_LIBRARY_PATH" in each.environment]
        path = dict.fromkeys(
            [*([str(first)] if first else []), *(str(each.path.parent) for each in programs), os.environ["PATH"]]
        )
        return {"PATH": ":".join(path), **({"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {})}

    def _take_free_ports(self) -> None:
        """Beside other tests, no port is free for sure; root's Mosquitto would leave its files behind as another user."""
        etc, ports = self.folder / "etc/aemos", self.ports
        self._replace(etc / "redis/redis.conf", {"port 6379": f"port {ports['REDIS_PORT']}"})
        user = {"per_listener_settings": "user root\nper_listener_settings"} if os.geteuid() == 0 else {}
        listeners = {
            "listener 1883": f"listener {ports['MQTT_PORT']}",
            "listener 8883": f"listener {ports['MQTTS_PORT']}",
        }
        self._replace(etc / "mosquitto/mosquitto.conf", {**listeners, **user})
        options = f"{{\n\thttp_port {ports['HTTP_PORT']}\n\thttps_port {ports['HTTPS_PORT']}\n"
        options += "\tlocal_certs\n\tskip_install_trust\n\tadmin off\n}\n"
        upstreams = {":3000": f":{ports['PORT']}", ":3001": f":{ports['SOCKETIO_PORT']}"}
        self._replace(etc / "caddy/Caddyfile", {f"{HOST} {{": f"{options}{HOST} {{", **upstreams})
        shared = etc / "aemos.env"
        if "DB_PORT" not in shared.read_text():
            own = {name: ports[name] for name in ("PORT", "SOCKETIO_PORT", "REDIS_PORT", "MQTT_PORT", "COAP_PORT")}
            own["DB_PORT"] = self.postgresql.port
            shared.write_text(shared.read_text() + "".join(f"{name}={port}\n" for name, port in own.items()))

    def _replace(self, file: Path, words: dict[str, str]) -> None:
        text = file.read_text()
        for old, new in words.items():
            if old in text and new not in text:
                text = text.replace(old, new)
        file.write_text(self._here(text))

    # Being systemd

    def _systemctl(self, words: list[str]) -> None:
        action, names = words[0], [word for word in words[1:] if not word.startswith("--")]
        if action == "daemon-reload":
            return
        assert action in ("restart", "enable", "start", "stop"), words
        for name in names:
            for unit in self._units(name):
                if action in ("restart", "stop"):
                    self.stop(unit)
                if action != "stop" and unit not in self.running:
                    self.start(unit)

    def _units(self, name: str) -> list[str]:
        if name == "aemos.target":
            file = self.folder / "etc/systemd/system/aemos.target"
            wants = re.findall(r"^Wants=(.*)", file.read_text(), re.MULTILINE)
            return [unit.removesuffix(".service") for each in wants for unit in each.split()]
        if "*" in name:
            return [each for each in self.running if each.startswith(name.rstrip("*"))]
        return [name]

    def start(self, unit: str) -> None:
        if unit == "aemos-web.socket":
            return  # as for systemd, it is there before its service
        server = {"redis-server": self._redis, "mosquitto": self._mosquitto, "caddy": self._caddy}.get(unit)
        process = server() if server else self._service(unit)
        with self.log(unit).open("ab") as log:
            how = self._start_with_socket if unit == "aemos-web" else spawn
            self.running[unit] = how(process, output=log, directory=REPOSITORY)
        until(lambda: self._answers(unit, process.ready), seconds=40)

    def _start_with_socket(
        self, process: Process, *, output: int | IO[bytes], directory: Path
    ) -> subprocess.Popen[bytes]:
        """The port is open all the time, and given to each process that serves it."""
        if self._socket is None:
            self._socket = socket.create_server(("127.0.0.1", self.ports["PORT"]), backlog=1024)
        number = self._socket.fileno()
        script = f'exec 3<&{number}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        return subprocess.Popen(
            ("bash", "-c", script, "bash", *process.command),
            pass_fds=[number],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def restart_ended(self) -> None:
        """As Restart=always of the units does: who starts while Redis is away says so, and ends."""
        for unit in [unit for unit, child in self.running.items() if child.poll() is not None]:
            del self.running[unit]
            self.start(unit)

    def _answers(self, unit: str, ready: Callable[[], bool]) -> bool:
        assert self.running[unit].poll() is None, f"{unit} ended\n{tail(self.log(unit), lines=40)}"
        return ready()

    def stop(self, unit: str) -> None:
        if unit in self.running:
            terminate(self.running.pop(unit), stop_signal=signal.SIGTERM, grace_seconds=20)

    def kill(self, unit: str) -> None:
        """With SIGKILL."""
        kill(self.running.pop(unit))

    def crash(self) -> None:
        """The power fails: everything but the database, which others of the machine may use, ends at once."""
        for unit in list(self.running):
            self.kill(unit)

    def close(self) -> None:
        for unit in reversed(list(self.running)):
            self.stop(unit)
        self.postgresql.stop()
        if self._socket:
            self._socket.close()

    def _redis(self) -> Process:
        program = get("redis-server")
        command = (str(program.path), str(self.folder / "etc/redis/redis.conf"))
        return Process(
            name="redis", command=command, environment=program.environment, ready=lambda: self._listens("REDIS_PORT")
        )

    def _mosquitto(self) -> Process:
        program = get("mosquitto")
        command = (str(program.path), "-c", str(self.folder / "etc/mosquitto/mosquitto.conf"))
        return Process(
            name="mosquitto",
            command=command,
            environment=program.environment,
            ready=lambda: self._listens("MQTTS_PORT"),
        )

    def _caddy(self) -> Process:
        environment = {"XDG_DATA_HOME": str(self.folder / "caddy"), "XDG_CONFIG_HOME": str(self.folder / "caddy")}
        command = (str(get("caddy").path), "run", "--config", str(self.folder / "etc/caddy/Caddyfile"))
        root = self.folder / "caddy/caddy/pki/authorities/local/root.crt"
        return Process(
            name="caddy", command=command, environment=environment,
            ready=lambda: root.exists() and self._listens("HTTPS_PORT"),
        )  # fmt: skip

    def _service(self, unit: str) -> Process:
        """A service of ours: the settings of its unit files, and no others."""
        units = self.folder / "etc/systemd/system"
        file = units / f"{re.sub(r'@.*', '@', unit)}.service"
        text = (units / "aemos-.service.d/common.conf").read_text() + file.read_text()
        settings = [line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#")]
        environment: dict[str, str] = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        for name, _, value in settings:
            if name == "EnvironmentFile":
                lines = Path(self._here(value)).read_text().splitlines()
                environment |= dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
            elif name == "Environment":
                environment |= dict(word.split("=", 1) for word in value.split())
        environment["VAR_DIR"] = self._here(environment["VAR_DIR"] + "/").rstrip("/")
        command = next(value for name, _, value in settings if name == "ExecStart")
        # systemd adds the number of the process and of its sockets.
        words = [f"{name}={value}" for name, value in environment.items()]
        clean = 'exec env -i ${LISTEN_PID:+LISTEN_PID=$LISTEN_PID LISTEN_FDS=1} "$@"'
        wrapped = ("sh", "-c", clean, "sh", *words)
        port = {"aemos-web": "PORT", "aemos-gateway": "SOCKETIO_PORT"}.get(unit)
        return Process(
            name=unit,
            command=(*wrapped, *shlex.split(self._here(command))),
            ready=(lambda: self._listens(port)) if port else (lambda: True),
        )

    def _listens(self, port: str) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.ports[port]), 1).close()
        except OSError:
            return False
        return True

    # Looking

    def log(self, unit: str) -> Path:
        return self.folder / f"{unit}.log"

    def logs(self) -> str:
        return "\n".join(f"--- {file.name}\n{tail(file, lines=30)}" for file in sorted(self.folder.glob("*.log")))

    def variables(self, *files: str) -> dict[str, str]:
        """Settings of files below /etc/aemos, the later ones first."""
        texts = [(self.folder / "etc/aemos" / file).read_text() for file in files]
        lines = [line for text in texts for line in text.splitlines() if line and not line.startswith("#")]
        return dict(line.split("=", 1) for line in lines)

    def database(self) -> psycopg.Connection[Any]:
        """A connection of the database's superuser."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.postgresql.port,
            user=self.postgresql.username,
            password=self.variables("aemos.env")["DB_PASSWORD"],
            dbname="aemos",
        )

    def redis(self, user: str) -> redis.Redis:
        """A client with the login of one of Redis' users."""
        file = "redis/operator.env" if user == "operator" else f"{user}.env"
        login = self.variables(file)
        return redis.Redis(
            port=self.ports["REDIS_PORT"], username=login["REDIS_USERNAME"], password=login["REDIS_PASSWORD"]
        )


class Sensor:
    """A sensor of the farm on a machine, made over REST; it reports over HTTP, and again after a refusal."""

    def __init__(self, machine: Machine, *, name: str) -> None:
        self._machine = machine
        machine.restart_ended()
        self._api = f"https://{HOST}:{machine.ports['HTTPS_PORT']}/api/v1"
        self._session = requests.Session()
        self._session.trust_env = False  # REQUESTS_CA_BUNDLE would go before `verify`
        self._session.headers["Host"] = HOST
        self._session.mount("https://", _ToLoopback())
        self._session.verify = str(machine.folder / "caddy/caddy/pki/authorities/local/root.crt")
        login = self._ask("POST", "auth/login", json={"username": "admin", "password": ADMIN_PASSWORD})
        self._session.headers["Authorization"] = f"Bearer {login['access']}"
        farms = self._ask("GET", "organizations")["results"]
        farm = farms[0] if farms else self._ask("POST", "organizations", json={"name": "Farm of tests"})
        self.organization = farm["uuid"]
        self.uuid = self._ask("POST", "sensors", json={"organization": self.organization, "name": name})["uuid"]
        self._ask("POST", "variables", json={"sensor": self.uuid, "name": "ph", "datatype": "number"})
        self.token = self._ask("POST", "device-tokens", json={"sensor": self.uuid})["token"]

    def attempts(self, secrets: dict[str, str]) -> list[str]:
        """The answers, with their headers, to requests that carry these secrets where secrets do and do not belong."""
        login = {"username": "admin", "password": secrets["password"]}
        bearer = {"Authorization": f"Bearer {secrets['bearer']}"}
        query = {"token": secrets["query"], "api_key": secrets["query"]}
        body = {"values": {"ph": secrets["body"]}, "password": secrets["body"]}
        asked: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "api/v1/auth/login", {"json": login}),
            ("POST", "admin/login/", {"data": login}),
            ("POST", "api/v1/auth/refresh", {"json": {"refresh": secrets["bearer"]}}),
            ("GET", "api/v1/sensors", {"headers": bearer}),
            ("GET", "api/v1/metrics/prometheus", {"headers": bearer}),
            ("GET", "api/v1/health", {"headers": bearer}),
            ("GET", "api/v1/sensors", {"params": query}),
            ("POST", "api/v1/telemetry", {"json": {"values": {"ph": 1}}, "headers": bearer, "params": query}),
            ("POST", "api/v1/telemetry", {"json": {"values": {"ph": 1}}, "headers": self._token_header()}),
            ("POST", "api/v1/telemetry", {"json": body, "headers": self._token_header()}),
            ("GET", f"join/{secrets['invite']}", {}),
            ("POST", f"join/{secrets['invite']}", {"data": login}),
            ("GET", f"nowhere?token={secrets['query']}", {}),
            ("PATCH", "api/v1/device-tokens", {"json": body}),
        ]
        site = self._api.removesuffix("api/v1")
        found = [self._session.request(method, site + path, timeout=20, **how) for method, path, how in asked]
        return [
            f"{answer.status_code} {answer.headers} {self._unquoted(answer.text, secrets['body'])}" for answer in found
        ]

    def _unquoted(self, text: str, body: str) -> str:
        """A sender's own value may come back to it in the answer that says what is wrong with it."""
        return text.replace(body, "")

    def _token_header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def values(self) -> list[float]:
        """All that are stored, in rising order."""
        page = self._ask("GET", "readings", params={"sensor": self.uuid, "pageSize": 500})
        assert page["next"] is None
        return sorted(row["value"] for row in page["results"])

    @contextmanager
    def reporting(self) -> Iterator[list[float]]:
        """Readings of rising values until the end of the block; those that were accepted are in the list."""
        accepted: list[float] = []
        self.refused: list[int] = []
        stop = threading.Event()

        def report() -> None:
            for number in itertools.count(1):
                if stop.is_set():
                    return
                body = {"values": {"ph": number / 100}, "timestamp": datetime.now(UTC).isoformat()}
                while (status := self.report(body)) != 202:
                    self.refused.append(status)
                    time.sleep(0.1)
                accepted.append(number / 100)
                time.sleep(0.05)

        sender = threading.Thread(target=report)
        sender.start()
        try:
            yield accepted
        finally:
            stop.set()
            sender.join()

    def report(self, body: dict[str, Any]) -> int:
        """The status of the answer; 0 without one."""
        headers = self._token_header()
        with suppress(requests.RequestException):
            return self._session.post(f"{self._api}/telemetry", json=body, headers=headers, timeout=20).status_code
        return 0

    def _ask(self, method: str, path: str, **arguments: Any) -> Any:
        answer = self._session.request(method, f"{self._api}/{path}", timeout=20, **arguments)
        assert answer.ok, answer.text
        return answer.json()


class Doser(Sensor):
    """A sensor each of whose readings makes a pump dose, and the pump, which acknowledges each dose over MQTT."""

    def __init__(self, machine: Machine, *, name: str) -> None:
        super().__init__(machine, name=name)
        pump = self._ask("POST", "devices", json={"organization": self.organization, "name": name})["uuid"]
        dose = {"device": pump, "name": "dose", "kind": "momentary", "datatype": "number"}
        self._ask("POST", "device-states", json=dose)
        self._pump, self._token = pump, self._ask("POST", "device-tokens", json={"device": pump})["token"]
        condition = {"sourceType": "sensor", "UUID": self.uuid, "key": "ph", "operator": ">", "value": 0}
        command = {"type": "device_command", "deviceUuid": pump, "stateName": "dose", "value": 5}
        nodes = [
            {"name": "measured", "type": "filter", "config": condition, "next": "dose"},
            {"name": "dose", "type": "action", "config": command},
        ]
        self._ask("POST", "rule-chains", json={"organization": self.organization, "name": name, "nodes": nodes})

    def measure(self, first: int, last: int) -> None:
        """Readings of these hundredths, all of them accepted."""
        for number in range(first, last + 1):
            body = {"values": {"ph": number / 100}, "timestamp": datetime.now(UTC).isoformat()}
            assert self.report(body) == 202

    def acknowledged(self) -> int:
        """How many doses the pump has acknowledged, as the system knows."""
        found = self._ask("GET", "state-changes", params={"device": self._pump, "pageSize": 500})
        return sum(row["command"]["state"] == "applied" for row in found["results"])

    @contextmanager
    def dosing(self) -> Iterator[list[str]]:
        """The ids of the commands that the pump gets until the end of the block."""
        received: list[str] = []
        username = self._token.split("_")[1]
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=username, clean_session=False)
        client.username_pw_set(username, self._token)
        commands = f"devices/{self._pump}/commands"

        def act(_client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
            command = json.loads(message.payload)["id"]
            received.append(command)
            client.publish(f"{commands}/ack", json.dumps({"id": command, "status": "applied"}), qos=1)

        client.on_message = act
        ready = threading.Event()
        client.on_subscribe = lambda *_: ready.set()

        def subscribe(*_: Any) -> None:
            client.subscribe(commands, qos=2)

        client.on_connect = subscribe
        client.reconnect_delay_set(1, 1)
        client.connect("127.0.0.1", self._machine.ports["MQTT_PORT"])
        client.loop_start()
        try:
            assert ready.wait(40), "the broker does not know the pump"
            time.sleep(3)  # until every worker has noticed the rule chain
            yield received
        finally:
            client.disconnect()
            client.loop_stop()


class _ToLoopback(requests.adapters.HTTPAdapter):
    """Connects to this machine, whatever the name in the certificate."""

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        host["host"] = "127.0.0.1"
        return host, {**pool, "server_hostname": HOST, "assert_hostname": HOST}


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    made = Machine(folder)
    try:
        yield made
    except BaseException as error:
        error.add_note(made.logs())
        raise
    finally:
        made.close()


def installed(machine: Machine) -> float:
    """Follows the guide from the first command to the first reading; the seconds that it took."""
    begun = time.monotonic()
    sections = [line.removeprefix("## ") for line in _guide().splitlines() if re.match(r"## [1-7]\. ", line)]
    machine.follow("production-deployment.md", *sections)
    return time.monotonic() - begun


def _guide() -> str:
    return (REPOSITORY / "docs" / "production-deployment.md").read_text()
