"""Workers that listen to the journal: who hears what, and what needs a ticket all the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from aemos.lib import keys, redis
from rules import events
from rules.events import Event, EventType
from rules.journal import listening, recovery, slots, tickets, writing
from rules.journal.lease import Lease
from rules.journal.listening import Listener
from rules.journal.slots import Slot
from tests.waiting import until

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
LANES = ("critical", "normal", "low")


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener("a", LANES)
    yield made
    made.leave()


def append(kind: str = EventType.TELEMETRY_DATA, *, partition: int = 0) -> tuple[Slot, list[Slot]]:
    """An event into this partition; gives its slot, and those that need a ticket now."""
    originator = next(uuid for uuid in iter(lambda: str(uuid4()), "") if slots.partition_of(uuid) == partition)
    event = Event(
        id=str(uuid4()),
        type=kind,
        priority=events.PRIORITIES[kind],
        source_type="sensor",
        originator_uuid=originator,
        organization_id=1,
        values={"ph": 6.0},
        timestamp_us=1,
        received_us=1,
        protocol="http",
    )
    batches = slots.by_slot([event])
    return next(iter(batches)), writing.append(batches)


def soon() -> float:
    return time.monotonic() + 0.3


def in_a_moment(what: Any) -> threading.Timer:
    timer = threading.Timer(0.1, what)
    timer.start()
    return timer


def test_what_arrives_while_somebody_listens_is_heard_at_once_and_needs_no_ticket(listener: Listener) -> None:
    appended: list[Any] = []
    in_a_moment(lambda: appended.append(append())).join(0)
    began = time.monotonic()

    heard = listener.next(until=began + 10)

    assert time.monotonic() - began < 5
    until(lambda: appended)  # it may be heard before the thread has its answer
    assert appended == [(heard, [])]


def test_without_a_listener_an_append_needs_a_ticket_and_so_does_a_lane_nobody_listens_to() -> None:
    slot, needing = append()
    assert needing == [slot]
    only_critical = Listener("a", ["critical"])
    assert only_critical.next(until=soon()) is None

    slot, needing = append(partition=1)
    assert needing == [slot]
    slot, needing = append(EventType.CRITICAL_ALARM)
    assert needing == []
    assert only_critical.next(until=soon()) == slot


def test_who_leaves_hands_over_what_has_no_ticket(listener: Listener) -> None:
    assert listener.next(until=soon()) is None
    slot, needing = append()
    assert needing == []

    assert listener.leave() == [slot]
    assert append(partition=1)[1] != [], "from then on appends queue tickets again"


def test_a_listener_that_died_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "LISTENER_MS", 1_000)
    assert Listener("killed", LANES).next(until=soon()) is None
    assert append()[1] == []
    time.sleep(1.0)

    assert len(append(partition=1)[1]) == 1
    assert recovery.reissue_lost_tickets() == 2, (
        "what came without a ticket is found, and so is a ticket that nobody queued"
    )


def test_the_scheduler_leaves_new_events_to_those_who_listen_and_sees_to_retries(listener: Listener) -> None:
    assert listener.next(until=soon()) is None
    slot, _ = append()
    assert recovery.reissue_lost_tickets() == 0
    redis.client().zadd(keys.delayed(slot.lane, slot.partition), {b"retry": 1})

    assert recovery.reissue_lost_tickets() == 1
    assert tickets.queue_of(slot.lane).count == 1


def test_critical_events_come_first_and_then_what_is_late_for_its_lane(listener: Listener) -> None:
    assert listener.next(until=soon()) is None
    low = append(EventType.BATCH_OPERATION)[0]
    time.sleep(0.05)
    normal = append()[0]
    time.sleep(0.05)
    critical = append(EventType.CRITICAL_ALARM)[0]
    order = []
    for _ in range(3):
        slot = listener.next(until=soon())
        assert slot is not None
        order.append(slot)
        redis.client().delete(keys.events(slot.lane, slot.partition))
        listener.drained(slot, events=1)

    assert order[0] == critical
    assert set(order[1:]) == {normal, low}


def test_slots_that_a_worker_or_a_ticket_attends_to_are_left_alone(listener: Listener) -> None:
    ticketed, needing = append()
    assert needing == [ticketed]
    leased = append(EventType.CRITICAL_ALARM)[0]
    redis.client().delete(keys.ticket(leased.lane, leased.partition))
    lease = Lease(leased, "another")
    assert lease.acquire()

    assert listener.next(until=soon()) is None
    lease.release(with_ticket=False)
    assert listener.next(until=soon()) == leased


def test_a_slot_that_gave_few_events_rests_and_one_that_gave_a_single_event_does_not(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listener.next(until=soon()) is None
    slot = append()[0]
    listener.drained(slot, events=10)
    assert listener.next(until=time.monotonic() + 5) == slot, "the rest is over some time"
    monkeypatch.setattr(listening, "REST_SECONDS", 60.0)
    listener.drained(slot, events=10)
    assert listener.next(until=soon()) is None
    listener.drained(slot, events=1)
    assert listener.next(until=soon()) == slot
