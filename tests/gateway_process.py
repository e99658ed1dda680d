"""Gateways, and the person who operates them, as processes of their own: gevent patches a whole process, and not pytest's.

`python -m tests.gateway_process gateway SPEC` runs a Gateway and `... operator` changes the database on request; both
print JSON, one value a line. The classes and functions before them start and use such processes in tests.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

from deploy.processes import Process, has_ended, kill, spawn, terminate
from tests.waiting import WAIT_SECONDS, until

T = TypeVar("T")
REPOSITORY = Path(__file__).resolve().parent.parent
MODULE = "tests.gateway_process"


class Operator:
    """A process with the gateways' database: `ask("seed")` and the other functions at the end of this module."""

    def __init__(self, directory: str) -> None:
        self.environment = {"DB_ENGINE": "sqlite", "DB_NAME": f"{directory}/gateway.sqlite3"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", MODULE, "operator"],
            env={**os.environ, **self.environment},
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str, **arguments: Any) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps([name, arguments]) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        assert answer, f"the operator died of {name}"
        return json.loads(answer)

    def close(self) -> None:
        self._child.communicate()  # the end of its input ends it


@cache
def operator() -> Operator:
    """The one operator of this test run; its database is migrated once."""
    directory = tempfile.TemporaryDirectory(prefix="aemos-gateway-")
    atexit.register(directory.cleanup)
    found = Operator(directory.name)
    atexit.register(found.close)
    return found


class GatewayProcess:
    """A gateway that runs: what it printed, and its end."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        process = Process(name="gateway", command=tuple(command), environment={**operator().environment, **environment})
        self._log = log
        with log.open("ab") as output:
            self.child = spawn(process, output=output, directory=REPOSITORY)

    @property
    def text(self) -> str:
        return self._log.read_text()

    def printed(self, key: str) -> list[Any]:
        """The values that were printed as {key: value}."""
        lines = (line for line in self.text.splitlines() if line.startswith("{") and line.endswith("}"))
        return [value[key] for value in map(json.loads, lines) if key in value]

    def delivered(self, protocol: str) -> list[str]:
        return [message for by, message in self.printed("delivered") if by == protocol]

    def wait_for(self, look: Callable[[], T], *, seconds: float = WAIT_SECONDS) -> T:
        def looked() -> T:
            assert not has_ended(self.child), self.text
            return look()

        try:
            return until(looked, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None

    def addresses(self) -> dict[str, tuple[str, int]]:
        """Where its transports listen; waits until it is ready."""
        (found,) = self.wait_for(lambda: self.printed("ready"))
        return {protocol: (host, port) for protocol, (host, port) in found.items()}

    def stop(self) -> int:
        """SIGTERM; the exit status, -9 when it had to be killed."""
        terminate(self.child, stop_signal=signal.SIGTERM, grace_seconds=8.0)
        return self.child.returncode

    def kill(self) -> None:
        kill(self.child)


@contextmanager
def running(log: Path, *transports: dict[str, Any], **environment: str) -> Iterator[GatewayProcess]:
    """A gateway of these transports, ready; see `_transport` for what they may be."""
    command = [sys.executable, "-m", MODULE, "gateway", json.dumps(transports)]
    gateway = GatewayProcess(command, log, **environment)
    try:
        gateway.addresses()
        yield gateway
    finally:
        gateway.kill()


def memory(protocol: str, **behaviour: Any) -> dict[str, Any]:
    """A memory transport. `acknowledging`: false never acknowledges; `failure`: permanent, temporary or unforeseen;
    `failures`: how many times; `slow_seconds`: how long a delivery takes."""
    return {"kind": "memory", "protocol": protocol, **behaviour}


def main(mode: str, *arguments: str) -> None:
    if mode == "gateway":
        from gevent import monkey

        monkey.patch_all()
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "aemos.settings")
    django.setup()
    if mode == "gateway":
        _run_gateway(json.loads(arguments[0]))
    else:
        _run_operator()


def _run_gateway(spec: list[dict[str, Any]]) -> None:
    import gevent
    from gevent.event import Event

    from gateway.dispatcher import Gateway
    from gateway.live_readings import LiveReadings

    transports = [_transport(**each) for each in spec]
    background_tasks = {
        each.protocol: LiveReadings(each).run for each in transports if hasattr(each, "send_to_watchers")
    }
    gateway = Gateway(transports, background_tasks=background_tasks)
    stop = Event()
    gevent.signal_handler(signal.SIGTERM, stop.set)
    gateway.start()
    _print(ready={each.protocol: each.address for each in transports if each.address})
    stop.wait()
    gateway.stop(timeout_seconds=6.0)
    _print(counts={protocol: dict(counts) for protocol, counts in gateway.counts.items()})


def _print(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _transport(kind: str, **options: Any) -> Any:
    if kind == "socketio":
        from gateway.socketio import engine, replay
        from gateway.socketio.transport import SocketIoTransport

        replay.MAXIMUM_REPLAYED = options.get("replayed", replay.MAXIMUM_REPLAYED)
        if files := options.get("files"):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
            engine.REQUEST_SECONDS = 2.0  # so that a test need not wait so long for those who say nothing
        return SocketIoTransport(port=0)
    if kind == "mqtt":
        from gateway.mqtt.transport import MqttTransport

        _lead_in_short_terms()
        return MqttTransport(_ingest)
    if kind == "coap":
        from gateway.coap.transport import CoapTransport

        return CoapTransport(_ingest, port=0)
    return _memory_transport(**options)


def _lead_in_short_terms() -> None:
    """So that a test need not wait five seconds for each successor."""
    from aemos.lib import leader
    from gateway import cursors

    leader.TERM_MS, cursors.ASK_TO_LEAD_SECONDS = 2_000, 0.3


def _memory_transport(
    *,
    protocol: str,
    acknowledging: bool = True,
    failure: str = "",
    failures: int = 10**9,
    slow_seconds: float = 0.0,
    status: str = "delivered",
    reason: str = "",
) -> Any:
    import gevent

    from gateway.memory import MemoryTransport
    from gateway.transport import DeliveryReport, OnReport, Status, TransportError
    from notifications.messages import Message, Protocol

    errors: dict[str, Exception] = {
        "permanent": TransportError("never", permanent=True),
        "temporary": TransportError("not now"),
        "unforeseen": RuntimeError("nobody thought of this"),
    }

    class Announcing(MemoryTransport):
        """Prints what it is given, because the test is another process."""

        left = failures

        def deliver(self, message: Message, on_report: OnReport) -> None:
            gevent.sleep(slow_seconds)
            self.failure = errors.get(failure) if self.left > 0 else None
            self.left -= 1
            if self.failure is not None:
                _print(refused=[self.protocol, str(message.id)])
            super().deliver(message, lambda _: on_report(DeliveryReport(message, Status(status), reason)))
            _print(delivered=[self.protocol, str(message.id)])

    return Announcing(Protocol(protocol), acknowledging=acknowledging)


def _ingest(payload: bytes, *, credential: Any, protocol: str, uuid: str | None = None, **_: Any) -> Any:
    """Refuses who has no credential or another's, and takes everything else."""
    from devices.exceptions import Forbidden, Unauthorized
    from rules.ingest import Receipt

    class Taken:
        def wait(self) -> Receipt:
            return Receipt(accepted=1)

    if credential is None:
        raise Unauthorized("Send a live token.")
    if uuid is not None and uuid != credential.originator.uuid:
        raise Forbidden("The token belongs to another.")
    _print(ingested=[payload.decode(errors="backslashreplace"), credential.originator.uuid, protocol, uuid])
    return Taken()


def _run_operator() -> None:
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    functions = {
        each.__name__: each
        for each in (
            seed,
            access_token,
            publish,
            publish_many,
            write,
            sweep,
            switch_and_die,
            measure,
            deliveries,
            deliveries_of_device,
            settle_deliveries,
            wanted,
            revoke,
            deactivate,
            leave,
            set_state,
            add_membership,
            add_person,
            add_devices,
            set_role,
            switch,
            command_states,
        )
    }
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(functions[name](**arguments)), flush=True)


def seed() -> dict[str, Any]:
    """An organization with a person, a device with the state `power`, a sensor with a variable, and their tokens."""
    from django.contrib.auth import get_user_model

    from devices.models import Device, DeviceState, DeviceToken, Membership, Organization, Sensor, Variable

    name = uuid4().hex[:12]
    organization = Organization.objects.create(name=name)
    user = get_user_model().objects.create_user(f"person-{name}")
    Membership.objects.create(user=user, organization=organization)
    device = Device.objects.create(organization=organization, name="pump")
    other_device = Device.objects.create(organization=organization, name="lamp")
    DeviceState.objects.create(device=device, name="power", value="off")
    sensor = Sensor.objects.create(organization=organization, name="tank")
    variable = Variable.objects.create(sensor=sensor, name="ph")
    return {
        "organization": str(organization.uuid),
        "user": user.pk,
        "device": str(device.uuid),
        "other_device": str(other_device.uuid),
        "sensor": str(sensor.uuid),
        "variable": str(variable.uuid),
        "device_token": DeviceToken.objects.issue(device)[1],
        "other_device_token": DeviceToken.objects.issue(other_device)[1],
        "sensor_token": DeviceToken.objects.issue(sensor)[1],
        "access_token": access_token(user=user.pk),
    }


def access_token(*, user: int, seconds: float = 600) -> str:
    from datetime import timedelta

    from django.contrib.auth import get_user_model

    from devices.people.jwt import AccessToken

    token = AccessToken.for_user(get_user_model().objects.get(pk=user))
    token.set_exp(lifetime=timedelta(seconds=seconds))
    return str(token)


def publish(
    *,
    organization: str,
    device: str | None = None,
    event: str = "alert",
    protocols: Sequence[str] = ("socketio", "mqtt", "coap"),
    expires_at: float | None = None,
    payload: dict[str, Any] | None = None,
) -> str:
    """A notification the way an effect makes one: rows, then the stream; its id."""
    from devices.models import Device, Organization
    from notifications import outbox
    from notifications.messages import Protocol

    over = tuple(Protocol(each) for each in protocols)
    message = new_message(
        organization,
        device=device,
        event=event,
        protocols=over,
        expires_at=expires_at,
        payload=payload or {"text": "ph is 9"},
    )
    owner = Organization.objects.get(uuid=organization)
    row = Device.objects.get(uuid=device).pk if device else None
    outbox.publish(outbox.write([(message, owner.pk, row)]))
    return str(message.id)


def write(*, organization: str, device: str | None = None, event: str = "alert", **fields: Any) -> str:
    """Rows of a notification that nobody has published yet; its id."""
    from devices.models import Device, Organization
    from notifications import outbox

    message = new_message(organization, device=device, event=event, **fields)
    owner = Organization.objects.get(uuid=organization)
    outbox.write([(message, owner.pk, Device.objects.get(uuid=device).pk if device else None)])
    return str(message.id)


def sweep(*, seconds: float = 3_600) -> int:
    """What the scheduler does for the outbox so many seconds from now; how many it published."""
    from datetime import timedelta

    from django.utils import timezone

    from notifications import outbox

    return outbox.sweep(timezone.now() + timedelta(seconds=seconds))


def switch_and_die(*, device: str) -> int:
    """Another process makes the change of a person and is killed after its commit, before it publishes; its exit status."""
    code = (
        "import os, signal, django; django.setup()\n"
        "from unittest import mock\n"
        "from django.contrib.auth.models import User\n"
        "from devices.models import DeviceState\n"
        "from notifications import outbox\n"
        "from rules.effects import states\n"
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"state = DeviceState.objects.get(device__uuid={device!r}, name='power')\n"
        "with mock.patch.object(outbox, 'append', die):\n"
        "    states.change_by_person(state, 'on', user=User.objects.first())\n"
    )
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "aemos.settings"}
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, check=False).returncode


def measure(*, variable: str, values: Sequence[float]) -> int:
    """Live readings of a variable, a microsecond apart, as a worker sends them; how many somebody watches."""
    from devices.models import Variable
    from notifications import live_channel

    key = Variable.objects.get(uuid=variable).pk
    rows = [(key, 1_767_323_045_000_000 + number, value, None, None) for number, value in enumerate(values)]
    chosen = live_channel.select(rows, wanted=live_channel.WatchedVariables().ids())
    live_channel.publish(chosen)
    return len(chosen)


def publish_many(*, organization: str, count: int, size: int) -> list[str]:
    """Messages of about `size` bytes on the stream alone; their ids."""
    from notifications.publisher import Entry, append

    sent = [new_message(organization, payload={"text": "x" * size}) for _ in range(count)]
    append(map(Entry, sent))
    return [str(message.id) for message in sent]


def new_message(organization: str = "", **fields: Any) -> Any:
    """A Message, for the stream or for `publish`."""
    from notifications.messages import Message

    found: dict[str, Any] = {
        "id": uuid4(),
        "effect_key": uuid4().hex,
        "organization_uuid": organization or str(UUID(int=1)),
        "event": "alert",
        "priority": 5,
        "payload": {"text": "ph is 9"},
        "timestamp": "2026-01-02T03:04:05+00:00",
        "device_uuid": fields.pop("device", None),
    }
    return Message(**{**found, **fields})


def deliveries(*, message: str) -> dict[str, list[Any]]:
    from notifications.models import Delivery

    rows = Delivery.objects.filter(notification__uuid=message)
    return {row.protocol: [row.state, row.attempts, row.last_error] for row in rows}


def deliveries_of_device(*, device: str) -> dict[str, dict[str, str]]:
    """Per protocol, the id of each message about the device and what became of it."""
    from notifications.models import Delivery

    found: dict[str, dict[str, str]] = {}
    rows = Delivery.objects.filter(notification__device__uuid=device).order_by("notification_id")
    for protocol, uuid, state in rows.values_list("protocol", "notification__uuid", "state"):
        found.setdefault(protocol, {})[str(uuid)] = state
    return found


def settle_deliveries(*, seconds: float) -> int:
    """What the scheduler does for lost deliveries so many seconds from now; how many it published again."""
    from datetime import timedelta

    from django.utils import timezone

    from notifications import upkeep

    return upkeep.publish_lost(timezone.now() + timedelta(seconds=seconds))


def wanted(*, device: str) -> Any:
    """The value that the state `power` of the device should have."""
    from devices.models import DeviceState

    return DeviceState.objects.get(device__uuid=device, name="power").value


def revoke(*, token: str) -> int:
    from devices import tokens
    from devices.models import DeviceToken

    return DeviceToken.objects.filter(prefix=tokens.prefix_of(token)).revoke()


def deactivate(*, user: int) -> int:
    from django.contrib.auth import get_user_model

    return get_user_model().objects.filter(pk=user).update(is_active=False)


def leave(*, user: int, organization: str) -> int:
    from devices.models import Membership

    return Membership.objects.filter(user_id=user, organization__uuid=organization).delete()[0]


def add_membership(*, user: int, organization: str) -> None:
    from devices.models import Membership, Organization

    Membership.objects.create(user_id=user, organization=Organization.objects.get(uuid=organization))


def add_person(*, organization: str, role: str) -> dict[str, Any]:
    """Another member of the organization: `user` and `access_token`."""
    from django.contrib.auth import get_user_model

    user = get_user_model().objects.create_user(f"person-{uuid4().hex[:12]}")
    add_membership(user=user.pk, organization=organization)
    set_role(user=user.pk, organization=organization, role=role)
    return {"user": user.pk, "access_token": access_token(user=user.pk)}


def add_devices(*, organization: str, count: int) -> None:
    """Devices with one state each."""
    from devices.models import Device, DeviceState, Organization

    owner = Organization.objects.get(uuid=organization)
    added = Device.objects.bulk_create(Device(organization=owner, name=f"lamp {number}") for number in range(count))
    DeviceState.objects.bulk_create(DeviceState(device=device, name="power") for device in added)


def set_role(*, user: int, organization: str, role: str) -> int:
    from devices.models import Membership

    return Membership.objects.filter(user_id=user, organization__uuid=organization).update(role=role)


def set_state(*, device: str, value: Any) -> int:
    from django.utils import timezone

    from devices.models import DeviceState

    return DeviceState.objects.filter(device__uuid=device, name="power").update(value=value, changed_at=timezone.now())


def switch(*, device: str, count: int) -> list[str]:
    """So many commands, as a rule makes them: one transaction each; their ids."""
    from django.db import transaction
    from django.utils import timezone

    from devices.models import DeviceState
    from rules import events
    from rules.effects import states

    state = DeviceState.objects.get(device__uuid=device, name="power")
    ids = []
    for _ in range(count):
        request = states.StateChangeRequest(
            effect_key=uuid4().hex,
            state_id=state.pk,
            value=uuid4().hex,
            source="rule",
            actor="test",
            timestamp_us=events.microseconds(timezone.now()),
        )
        with transaction.atomic():
            changes = states.apply([request]).changes
        states.publish(changes)
        ids += [str(change.row.uuid) for change in changes]
    return ids


def command_states(*, device: str) -> dict[str, int]:
    from collections import Counter

    from devices.models import StateChange

    return Counter(StateChange.objects.filter(state__device__uuid=device).values_list("command_state", flat=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
