"""Measures notifications: so many a second published for all three protocols, what their listeners receive and when.

A system of its own is started on free ports of this machine; publisher and listeners are processes of their own. Each
message is for Socket.IO, MQTT and CoAP at once. Nine of ten are alerts, one of ten switches a device, which is what CoAP
observers see: they get the newest state, not every change.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import percentiles
from benchmarks.listeners import PATIENCE_SECONDS, Child, Received, listening
from benchmarks.system import memory_mb, own_system, processor_seconds
from deploy.local import LocalSystem

SLICE_SECONDS = 1 / 30
SWITCH_EVERY = 10
SHOW_EVERY_SECONDS = 5.0
# So many messages wait when an urgent one comes; a multiple of SWITCH_EVERY.
BACKLOG = 10_000


class Tally(Received):
    """The numbers of the messages that one listener received, when each came, and how old it was then, in ms."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, float] = {}
        self.ages: list[float] = []
        self.newest = 0.0

    def add(self, body: Mapping[str, Any]) -> None:
        published = as_published(body)
        if published is None:
            return
        number, sent = published
        super().add(body)
        self.numbers.setdefault(number, time.time())
        self.ages.append((time.time() - sent) * 1000)
        self.newest = max(self.newest, sent)

    def answer(self, asked: Any) -> Any:
        if asked == "arrivals":
            return dict(self.numbers)
        return len(self.numbers), self.count, self.newest, self.ages if asked == "all" else []


def as_published(body: Mapping[str, Any]) -> tuple[int, float] | None:
    """The number and the time of a message of the publisher's; None of another, which says nothing of them."""
    if "states" in body:
        number, _, sent = str(body["states"]["power"]["value"]).partition(":")
        return (int(number), float(sent)) if sent else None
    return (body["data"]["number"], body["data"]["sent"]) if "number" in body["data"] else None


def publish(connection: Connection, environment: Mapping[str, str], plan: Mapping[str, Any]) -> None:
    """Publishes at the planned rate; gives how many, the last switch, and how many seconds it worked."""
    os.environ |= {**environment, "DJANGO_SETTINGS_MODULE": "aemos.settings"}
    import django

    django.setup()
    from devices.models import Device, DeviceState

    device = Device.objects.select_related("organization").get(uuid=plan["device"])
    state = DeviceState.objects.get(device=device, name="power")
    connection.send("ready")
    if connection.recv() == "urgent":
        connection.send(_publish_backlog(device, state))
        connection.recv()
    published, switched, worked = 0, (0, 0.0), 0.0
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < plan["seconds"]:
        due = int(min(elapsed + SLICE_SECONDS, plan["seconds"]) * plan["rate"]) - published
        at = time.perf_counter()
        batch, last = _batch(device, published, due)
        if last:
            switched = last
            DeviceState.objects.filter(pk=state.pk).update(value=f"{last[0]}:{last[1]}")
        _send(batch, device=device, with_database=plan["run"] == "database")
        published += due
        worked += time.perf_counter() - at
        time.sleep(max(0.0, SLICE_SECONDS - (time.perf_counter() - at)))
    connection.send((published, switched, worked, time.perf_counter() - began))


def _publish_backlog(device: Any, state: Any) -> tuple[int, float]:
    """At once BACKLOG alerts and behind them one urgent switch; the number and the time of the switch."""
    from msgspec.structs import replace

    from notifications.messages import ALERT
    from notifications.publisher import Entry, append

    batch, _ = _batch(device, 0, BACKLOG + 1)
    alerts = [replace(each, event=ALERT, device_uuid=None) for each in batch[:-1]]
    append(map(Entry, alerts))
    now = time.time()
    type(state).objects.filter(pk=state.pk).update(value=f"{BACKLOG}:{now}")
    urgent = replace(batch[-1], priority=1, payload={**batch[-1].payload, "sent": now})
    append([Entry(urgent)])
    return BACKLOG, now


def _batch(device: Any, first: int, count: int) -> tuple[list[Any], tuple[int, float] | None]:
    """Messages, and the number and time of the last one that switches the device."""
    from uuid import uuid4

    from notifications.messages import ALERT, DEVICE_STATE_CHANGE, Message

    found, switched = [], None
    for number in range(first, first + count):
        now, switches = time.time(), number % SWITCH_EVERY == 0
        switched = (number, now) if switches else switched
        message = Message(
            id=uuid4(),
            effect_key=f"bench:{uuid4().hex}",
            organization_uuid=str(device.organization.uuid),
            device_uuid=str(device.uuid) if switches else None,
            event=DEVICE_STATE_CHANGE if switches else ALERT,
            priority=5,
            timestamp=datetime.now(UTC).isoformat(),
            payload={
                "number": number,
                "sent": now,
                "source": "rule",  # what a rule switches goes to the device as a command, too
                "title": "pH is high",
                "message": "Reservoir A: pH 7.9 is above 6.5.",
            },
        )
        found.append(message)
    return found, switched


def _send(batch: list[Any], *, device: Any, with_database: bool) -> None:
    from django.db import transaction

    from notifications import outbox
    from notifications.publisher import Entry, append

    if not with_database:
        append(map(Entry, batch))
        return
    with transaction.atomic():
        rows = [(each, device.organization_id, device.pk if each.device_uuid else None) for each in batch]
        fresh = outbox.write(rows)
    outbox.publish(fresh)


RUNS = {
    "stream": "published to the stream alone",
    "database": "with outbox rows and delivery states in the database",
    "urgent": "one urgent message behind a backlog",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = "; ".join(f"{name} is {what}" for name, what in RUNS.items())
    parser.add_argument("--rate", type=int, default=3_000, help="messages a second (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=30, help="how long (default: %(default)s)")
    parser.add_argument("--only", choices=list(RUNS), help=f"instead of all: {kinds}")
    options = parser.parse_args()
    for name in [options.only] if options.only else RUNS:
        plan = {"rate": options.rate, "seconds": options.seconds, "run": name}
        with own_system() as system:
            run(system, plan)
    return 0


def run(system: LocalSystem, plan: dict[str, Any]) -> None:
    system.start("web", "gateway")
    pump = system.farm["devices"][0]
    with listening(system, Tally, pump=pump) as listeners:
        system.stop("web")
        plan = {**plan, "device": pump["uuid"]}
        with closing(Child("the publisher", publish, system.environment, plan)) as publisher:
            publisher.ready()
            if plan["run"] == "urgent":
                print_urgent(publisher, listeners)
                return
            print_run(system, publisher, listeners=listeners, plan=plan)
    if plan["run"] == "database":
        print_states(system)


def print_run(system: LocalSystem, publisher: Child, *, listeners: dict[str, Child], plan: dict[str, Any]) -> None:
    kind = RUNS[plan["run"]]
    print(f"{plan['rate']} messages/s for {plan['seconds']} s, each for all three protocols, {kind}", flush=True)
    used = processor_seconds(system.pid("gateway"))
    sent = watch(system, publisher, listeners, patience=plan["seconds"] + PATIENCE_SECONDS)
    wait_for_the_rest(listeners, sent)
    print(f"the gateway used {processor_seconds(system.pid('gateway')) - used:.1f} s of a processor")
    print_table(sent, {name: child.ask("all") for name, child in listeners.items()})


def print_urgent(publisher: Child, listeners: dict[str, Child]) -> None:
    """How long the urgent one took, and how long the backlog lasted, in ms."""
    number, sent = publisher.ask("urgent")
    deadline = time.monotonic() + PATIENCE_SECONDS
    print(f"one urgent message behind {BACKLOG} others", flush=True)
    for name, child in listeners.items():
        found: dict[int, float] = {}
        while number not in found and time.monotonic() < deadline:
            found = child.ask("arrivals")
            time.sleep(0.1)
        urgent = f"{(found[number] - sent) * 1000:.0f} ms" if number in found else "not received"
        print(f"{name:<10} urgent after {urgent}, {len(found)} messages received by then", flush=True)


Sent = tuple[int, tuple[int, float], float, float]


def watch(system: LocalSystem, publisher: Child, listeners: dict[str, Child], *, patience: float) -> Sent:
    """Prints how much memory the gateway has and how far the listeners are, until everything is published."""
    began = time.perf_counter()
    publisher.send("go")
    while publisher.is_silent(SHOW_EVERY_SECONDS) and time.perf_counter() - began < patience:
        received = ", ".join(f"{name} {child.ask('count')[1]}" for name, child in listeners.items())
        seconds = time.perf_counter() - began
        print(
            f"{seconds:6.1f} s  gateway {sum(memory_mb(system.pid('gateway'))):6.1f} MB  received: {received}",
            flush=True,
        )
    sent: Sent = publisher.answer()
    return sent


def wait_for_the_rest(listeners: dict[str, Child], sent: Sent) -> None:
    published, (_, switched_at), *_ = sent
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        counts = {name: child.ask("count") for name, child in listeners.items()}
        if counts["Socket.IO"][0] == counts["MQTT"][0] == published and counts["CoAP"][2] == switched_at:
            return
        time.sleep(0.2)


def print_table(sent: Sent, received: Mapping[str, Any]) -> None:
    published, (_, switched_at), worked, lasted = sent
    print(f"published {published} in {lasted:.1f} s; the publisher worked {100 * worked / lasted:.0f} % of the time")
    print(f"{'':<10}{'received':>10}{'lost':>8}{'twice':>8}{percentiles.HEADER}  ms")
    for name, (distinct, count, newest, ages) in received.items():
        lost = published - distinct if name != "CoAP" else ("-" if newest == switched_at else "STALE")
        twice = count - distinct if name != "CoAP" else "-"
        print(f"{name:<10}{count:>10}{lost:>8}{twice:>8}{percentiles.cells(ages)}", flush=True)


def print_states(system: LocalSystem) -> None:
    """How far the deliveries are, by the rows; all that are pending wait for the database."""
    code = (
        "from collections import Counter; from notifications.models import Delivery as D; "
        "print(sorted(Counter(D.objects.values_list('protocol', 'state')).items()))"
    )
    for _ in range(20):
        shown = system.manage("shell", "-v", "0", "-c", code).stdout.strip()
        if "pending" not in shown:
            break
        time.sleep(1)
    print(f"deliveries: {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
