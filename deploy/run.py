"""The whole system on one machine: takes options and the environment, gives it running until Ctrl-C."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from deploy.debian import FetchError
from deploy.installation import LISTENERS, Installation, InstallationError, opened
from deploy.processes import Process
from deploy.programs import REPOSITORY, announce
from deploy.servers import ServerError, mosquitto, redis
from deploy.supervisor import StartError, Supervisor
from deploy.terminal import Terminal

PROBE_SECONDS = 1.0
LISTENING_SECONDS = 5.0
EXAMPLES = {
    "simulator": "simulator",
    "socketio": "socketio_listener",
    "mqtt": "mqtt_subscriber",
    "coap": "coap_observer",
}
DESCRIPTION = """\
Starts Redis, the MQTT broker, the web process, a worker, the gateway and the scheduler, and restarts what ends.
A simulated farm then sends readings, and one listener per protocol shows what comes back. Ctrl-C stops everything;
the data stays in var/ for the next run."""


def main(arguments: list[str] | None = None) -> int:
    """Run until a stop is requested; 0 after a stop, 1 when something could not be started."""
    options = _parser().parse_args(arguments)
    if options.port:
        os.environ["PORT"] = str(options.port)
    os.umask(0o077)  # data, logs and sockets are this user's alone
    try:
        with opened(os.environ, default_var=REPOSITORY / "var") as installation:
            _run(installation, demo=options.demo)
    except (InstallationError, FetchError, ServerError, StartError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    ports = ", ".join(f"{listener.variable} ({listener.process}, {listener.default})" for listener in LISTENERS)
    epilog = f"Environment: VAR_DIR (data and logs, var/); the ports {ports}; the addresses BIND_HOST, COAP_HOST."
    parser = argparse.ArgumentParser(prog="python -m deploy.run", description=DESCRIPTION, epilog=epilog)
    parser.add_argument("--port", type=int, help="port of the web process; the same as PORT in the environment")
    parser.add_argument("--no-demo", dest="demo", action="store_false", help="no simulator and no listeners")
    return parser


def _run(installation: Installation, *, demo: bool) -> None:
    data, ports, kept = installation.var, installation.ports, installation.secrets
    store = redis(data / "redis", port=ports["REDIS_PORT"], password=kept["REDIS_PASSWORD"])
    servers = [store.process, *_broker(installation)]
    mqtt = len(servers) == 2
    environment = installation.environment(mqtt=mqtt)
    terminal = Terminal(width=10)
    supervisor = Supervisor(logs=installation.logs, directory=REPOSITORY, terminal=terminal)
    with supervisor.session():
        terminal.say(f"starting {' and '.join(server.name for server in servers)}")
        supervisor.start(*servers)
        terminal.say("preparing the database")
        supervisor.run(_django("migrate", "migrate", "--verbosity", "0", environment=environment))
        seed = ("seed_demo", "--history", "--output", str(installation.demo_file))
        supervisor.run(_django("seed", *seed, environment=environment))
        terminal.say("starting web, worker, gateway and scheduler")
        supervisor.start(*system(installation, environment=environment))
        terminal.plain(_summary(installation, mqtt=mqtt))
        if demo:
            _start_demo(supervisor, installation, mqtt=mqtt)
        supervisor.watch()


def _broker(installation: Installation) -> list[Process]:
    """The broker, or nothing: the system works without MQTT."""
    port, password = installation.ports["MQTT_PORT"], installation.secrets["MQTT_PASSWORD"]
    try:
        return [mosquitto(installation.var / "mosquitto", port=port, password=password).process]
    except (FetchError, ServerError) as error:
        announce(f"MQTT is off: {error}")
        return []


def system(installation: Installation, *, environment: dict[str, str]) -> list[Process]:
    """The processes of AEMOS itself, in the order in which they start."""
    host, port = installation.hosts["BIND_HOST"], installation.ports["PORT"]
    web = Process(
        name="web",
        command=(sys.executable, "-m", "gunicorn", "-c", "aemos/gunicorn.conf.py", "aemos.wsgi:application"),
        environment=environment,
        ready=lambda: _web_answers(_reachable(host), port),
    )
    worker = _django("worker", "rqworker", "critical", "normal", "low", environment=environment)
    gateway = Process(
        name="gateway",
        command=(sys.executable, "manage.py", "rungateway"),
        environment=environment,
        ready=lambda: _port_answers(
            _reachable(installation.hosts["SOCKETIO_HOST"]), installation.ports["SOCKETIO_PORT"]
        ),
    )
    scheduler = _django("scheduler", "runscheduler", environment=environment)
    return [web, worker, gateway, scheduler]


def _start_demo(supervisor: Supervisor, installation: Installation, *, mqtt: bool) -> None:
    """The listeners first, so that they hear what the first readings lead to; one that cannot connect holds up nobody."""
    environment = installation.addresses(mqtt=mqtt)
    simulator, *listeners = [
        Process(
            name=name,
            command=(sys.executable, "-m", f"examples.{module}", "--demo", str(installation.demo_file)),
            environment=environment,
        )
        for name, module in EXAMPLES.items()
        if mqtt or name != "mqtt"
    ]
    logs = [installation.logs / f"{listener.name}.log" for listener in listeners]
    supervisor.start(*listeners)
    supervisor.watch(until=lambda: all(_listens(log) for log in logs), seconds=LISTENING_SECONDS)
    supervisor.start(simulator)


def _listens(log: Path) -> bool:
    """Each of the listeners says so when the server has taken its subscription."""
    return any(word in log.read_text(errors="replace") for word in ("listening on", "observing"))


def _django(name: str, *arguments: str, environment: dict[str, str]) -> Process:
    return Process(name=name, command=(sys.executable, "manage.py", *arguments), environment=environment)


def _summary(installation: Installation, *, mqtt: bool) -> str:
    """What a person needs next. These two secrets are shown because nobody could use the system without them."""
    farm = json.loads(installation.demo_file.read_text())
    admin, sensor = farm["admin"], farm["sensors"][0]
    ports, hosts = installation.ports, {name: _reachable(host) for name, host in installation.hosts.items()}
    web = f"http://{hosts['BIND_HOST']}:{ports['PORT']}"
    rows = {
        "Farm": f"{web}/   log in as {admin['username']} with {admin['password']}",
        "Admin": f"{web}/admin/   the same login",
        "API": f"{web}/api/v1/docs",
        "Live page": f"{web}/static/notifications/socketio.html   the same login",
        "Health": f"{web}/api/v1/health",
        "Socket.IO": f"http://{hosts['SOCKETIO_HOST']}:{ports['SOCKETIO_PORT']}",
        "MQTT": f"mqtt://127.0.0.1:{ports['MQTT_PORT']}" if mqtt else "off",
        "CoAP": f"coap://{hosts['COAP_HOST']}:{ports['COAP_PORT']}",
        "Token": f"{sensor['token']}   (sensor {sensor['name']}; all of them: {installation.demo_file})",
        "Data, logs": f"{installation.var} and its log/; kept for the next run",
        "Stop": "Ctrl-C",
        "Next": "examples/README.md",
    }
    return "\n".join(["", "AEMOS runs.", *(f"  {name:<11} {value}" for name, value in rows.items()), ""])


def _reachable(host: str) -> str:
    """An address to knock at for a server that listens on all of them."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared with, not bound to


def _web_answers(host: str, port: int) -> bool:
    """A refusal is an answer too: who sets ALLOWED_HOSTS need not list the name that is used here."""
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", "/api/v1/health/liveness", headers={"Host": "localhost"})
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _port_answers(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=PROBE_SECONDS):
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
