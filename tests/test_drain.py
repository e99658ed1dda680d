"""The straight path in one process: a request in, then journal, drain, readings, state changes and outbox."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from django.db import OperationalError
from django.test import Client
from redis import exceptions as redis_errors

from aemos.lib import keys, per_process, redis
from devices import catalogue, latest
from devices.models import DeviceState, Reading, StateChange, Variable
from notifications import live_channel, outbox
from notifications.models import Notification, Unpublished
from rules import jobs
from rules.authoring import editing
from rules.effects import states, suspension
from rules.effects.perform import Applied
from rules.events import Event
from rules.journal import lease, recovery, slots, tickets
from rules.journal.lease import Lease
from rules.journal.ledger import Account, audit
from rules.journal.slots import Slot
from rules.models import DeadLetter
from rules.processing import batch, failures, index, takeover
from rules.processing.stages import decide
from rules.processing.stages import store as stages_store
from rules.processing.stages.collect import Inputs
from rules.processing.stages.store import Stored
from tests import builders
from tests.worker import drain_all, ledger

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis", "_old_times_count")]


class Farm:
    """One sensor with ph and mode, one pump, one chain that switches the pump on above 6.5."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization, "Reservoir A", variables={"ph": "number", "mode": "string"})
        self.pump = builders.device(self.organization, "Pump")
        self.power = DeviceState.objects.get(device=self.pump)
        nodes = [
            builders.node("high", builders.leaf(self.sensor, operator=">", value=6.5), next="dose"),
            builders.node("dose", builders.command(self.pump)),
        ]
        self.chain = builders.chain(self.organization, nodes, "pH down")
        self.token = builders.token(self.sensor)

    def post(self, *values: Any, token: str = "", **fields: Any) -> Any:
        items = [{"values": value if isinstance(value, dict) else {"ph": value}, **fields} for value in values]
        return Client().post(
            "/api/v1/telemetry",
            json.dumps(items[0] if len(items) == 1 else {"events": items}),
            content_type="application/json",
            headers={"authorization": f"Bearer {token or self.token}"},
        )

    @property
    def slot(self) -> Slot:
        return Slot("normal", slots.partition_of(str(self.sensor.uuid)))

    def state(self) -> Any:
        self.power.refresh_from_db()
        return self.power.value


@pytest.fixture
def farm() -> Farm:
    return Farm()


def at(second: int) -> str:
    return datetime(2026, 5, 1, 12, 0, second, tzinfo=UTC).isoformat()


def make_due() -> None:
    """Lets every delayed event be due now instead of waiting for it."""
    for slot in slots.slots():
        name = keys.delayed(slot.lane, slot.partition)
        for member in redis.client().zrange(name, 0, -1):
            redis.client().zadd(name, {member: 0})


def test_reading_over_http_switches_the_pump_and_fills_the_outbox(farm: Farm) -> None:
    answer = farm.post(6.9, timestamp=at(1))

    assert (answer.status_code, answer.json()) == (202, {"accepted": 1, "rejected": 0})
    assert Reading.objects.count() == 0, "nothing is stored before a worker drains the journal"
    drain_all()
    assert farm.state() == "on"
    assert Reading.objects.get().number == 6.9
    assert Reading.objects.get().timestamp == datetime(2026, 5, 1, 12, 0, 1, tzinfo=UTC)
    change = StateChange.objects.get()
    assert (change.previous, change.value, change.source, change.actor) == (None, "on", "rule", "pH down / dose")
    notification = Notification.objects.get()
    assert not Unpublished.objects.exists()
    assert set(notification.deliveries.values_list("protocol", "state")) == {
        ("socketio", "pending"), ("mqtt", "pending"), ("coap", "pending"),
    }  # fmt: skip
    assert redis.client().xlen(keys.NOTIFICATIONS) == 1
    assert ledger() == Account(accepted=1, processed=1)


def test_an_accepted_event_is_in_the_journal_with_a_ticket_before_the_answer(farm: Farm) -> None:
    farm.post(6.0)

    assert audit(farm.slot) == Account(accepted=1, depth=1, waiting=1)
    assert tickets.queue_of("normal").count == 1


def test_entries_that_no_read_returns_are_taken_over(farm: Farm, caplog: pytest.LogCaptureFixture) -> None:
    """As when Redis comes back from a file that knows how far the group has read, and not what was pending."""
    farm.post(6.9, timestamp=at(1))
    drain_all()
    DeviceState.objects.update(value="off")
    for value, second in ((6.9, 1), (6.0, 2), (7.1, 3)):  # the first one is done already
        farm.post(value, timestamp=at(second))
    held = Lease(farm.slot, "before the end of Redis")
    assert held.acquire()
    stream = keys.events(farm.slot.lane, farm.slot.partition)
    assert redis.client().xack(stream, slots.GROUP, *(entry.id for entry in held.next(10))) == 3
    held.release()
    assert held.acquire()
    assert (held.next_pending(), held.next(10)) == (None, []), "no read returns them"
    held.release()

    drain_all()
    assert redis.client().xlen(stream) == 0
    assert ledger() == Account(accepted=4, processed=3, duplicate=1)
    assert Reading.objects.count() == 3
    assert (farm.state(), StateChange.objects.count()) == ("on", 2)
    assert "3 entries" in caplog.text


def test_only_entries_that_no_read_returns_are_stranded(farm: Farm) -> None:
    farm.post(6.0)
    held = Lease(farm.slot, "a")
    assert held.acquire()
    assert held.next_pending() is None
    assert held.claim_stranded(10) == 0, "it is new"
    (entry,) = held.next(10)
    assert held.claim_stranded(10) == 0, "it is in work"
    redis.client().xack(keys.events(farm.slot.lane, farm.slot.partition), slots.GROUP, entry.id)
    assert Lease(farm.slot, "b").claim_stranded(10) == 0, "another holds the slot"
    assert held.claim_stranded(10) == 1
    held.release()
    drain_all()
    assert ledger() == Account(accepted=1, processed=1)


def test_duplicate_readings_are_accepted_and_have_no_second_effect(farm: Farm) -> None:
    for _ in range(3):
        assert farm.post(6.9, timestamp=at(1)).status_code == 202
    drain_all()
    DeviceState.objects.update(value="off")
    farm.post(6.9, timestamp=at(1))
    drain_all()

    assert farm.state() == "off"
    assert StateChange.objects.count() == 1
    assert ledger() == Account(accepted=4, processed=1, duplicate=3)


def test_an_event_sent_twice_with_its_id_but_no_time_acts_once(farm: Farm) -> None:
    identifier = "5d2a5f1e-6c8b-4f6e-8d50-0a4a4c7d9b11"
    farm.post(6.9, eventId=identifier)
    drain_all()
    DeviceState.objects.update(value="off")
    farm.post(6.9, eventId=identifier)
    drain_all()

    assert farm.state() == "off"


def test_a_rule_sees_the_value_of_each_event_not_the_latest_row(farm: Farm) -> None:
    stop = [
        builders.node("low", builders.leaf(farm.sensor, operator="<", value=6.2), next="stop"),
        builders.node("stop", builders.command(farm.pump, "off")),
    ]
    builders.chain(farm.organization, stop)
    for second in range(20):
        farm.post(6.9 if second % 2 == 0 else 6.0, timestamp=at(second))
    drain_all()

    assert list(StateChange.objects.order_by("id").values_list("value", flat=True)) == ["on", "off"] * 10


def test_a_value_that_is_set_already_makes_no_new_change(farm: Farm) -> None:
    farm.post(6.9, 7.0, 7.1)
    drain_all()

    assert StateChange.objects.count() == 1


def test_a_crash_after_the_commit_leads_to_duplicates_and_no_second_effect(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm.post(6.9, timestamp=at(1))

    class Killed(BaseException):
        """Stands for SIGKILL: nothing catches it."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "finish", die)
        patch.setattr(Lease, "release", die)
        with pytest.raises(Killed):
            jobs.drain(farm.slot.lane, farm.slot.partition)
    assert audit(farm.slot).in_flight == 1
    DeviceState.objects.update(value="off")
    redis.client().delete(keys.lease(farm.slot.lane, farm.slot.partition))
    drain_all()

    assert farm.state() == "off"
    assert StateChange.objects.count() == 1
    assert ledger() == Account(accepted=1, duplicate=1)


def test_a_message_that_a_crash_left_in_the_outbox_is_published_by_the_sweep(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "publish", lambda changes: None)
    farm.post(6.9)
    drain_all()
    Unpublished.objects.update(written_at=datetime(2026, 1, 1, tzinfo=UTC))
    assert redis.client().xlen(keys.NOTIFICATIONS) == 0

    assert (outbox.sweep(), outbox.sweep()) == (1, 0)
    assert redis.client().xlen(keys.NOTIFICATIONS) == 1


def test_an_event_whose_chain_fails_keeps_its_reading_and_is_tried_again(farm: Farm) -> None:
    broken = [
        builders.node("high", builders.leaf(farm.sensor, operator=">", value=6.5), next="convert"),
        builders.node("convert", {"operation": "add", "key": "ec", "value": 1}, next="act"),
        builders.node("act", builders.command(farm.pump, "off")),
    ]
    chain = builders.chain(farm.organization, broken, "Broken")
    farm.post(6.9)
    drain_all()

    assert farm.state() == "on"
    assert Reading.objects.count() == 1
    assert ledger() == Account(accepted=1, depth=1, waiting=1)
    for _ in range(3):
        make_due()
        drain_all()
    letter = DeadLetter.objects.get()
    assert (letter.chain, letter.node, letter.attempts) == (chain, "convert", 4)
    assert "ec" in letter.error
    assert letter.event["values"] == {"ph": 6.9}
    assert ledger() == Account(accepted=1, dead=1)


@pytest.mark.parametrize("why", ["suspended", "switched off"])
def test_an_event_whose_chain_stopped_before_its_next_attempt_is_kept_and_says_so(farm: Farm, why: str) -> None:
    DeviceState.objects.update(name="renamed")
    farm.post(6.9)
    drain_all()
    assert ledger() == Account(accepted=1, depth=1, waiting=1)
    if why == "suspended":
        assert suspension.suspend(farm.chain.pk, "it failed")
    else:
        editing.switch(farm.chain, enabled=False, by="a test")
    make_due()
    drain_all()

    letter = DeadLetter.objects.get()
    assert (letter.chain, letter.error) == (farm.chain, f"pH down was not run: it is {why}")
    assert ledger() == Account(accepted=1, dead=1)


def test_a_retry_whose_chain_was_deleted_leaves_the_queue_and_is_looked_for_once(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    DeviceState.objects.update(name="renamed")
    farm.post(6.9, 7.0, 7.1)
    drain_all()
    editing.delete(farm.chain)
    make_due()
    index.shared().refresh(at_once=True)
    looked: list[bool] = []
    refresh = index.RuleIndex.refresh

    def counted(rules: index.RuleIndex, *, at_once: bool = False) -> None:
        looked.append(at_once)
        refresh(rules, at_once=at_once)

    monkeypatch.setattr(index.RuleIndex, "refresh", counted)
    jobs.drain(farm.slot.lane, farm.slot.partition)

    assert looked == [False, True]
    assert (ledger(), DeadLetter.objects.count()) == (Account(accepted=3, processed=3), 0)


def test_an_attempt_that_succeeds_later_counts_as_processed(farm: Farm) -> None:
    farm.post(6.9)
    states_before = dict(DeviceState.objects.values_list("pk", "name"))
    index.shared().refresh(at_once=True)
    DeviceState.objects.update(name="renamed")
    catalogue.mark_changed(farm.organization.pk)
    drain_all()
    assert ledger() == Account(accepted=1, depth=1, waiting=1)
    assert not redis.client().exists(keys.stalled(*vars_of(farm.slot))), (
        "an event that waits does not make its slot wait"
    )
    for pk, name in states_before.items():
        DeviceState.objects.filter(pk=pk).update(name=name)
    catalogue.mark_changed(farm.organization.pk)
    make_due()
    drain_all()

    assert farm.state() == "on"
    assert ledger() == Account(accepted=1, processed=1)


def fail_on(value: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets every batch raise that holds this value; gives the sizes of the batches that were tried."""
    sizes: list[int] = []
    real = batch.process

    def process(due: list[Event], *rest: Any, **options: Any) -> batch.BatchResult:
        sizes.append(len(due))
        if any(event.values.get("ph") == value for event in due):
            raise ValueError("this one cannot be processed")
        return real(due, *rest, **options)

    monkeypatch.setattr(batch, "process", process)
    return sizes


def test_one_event_that_raises_stops_neither_its_batch_nor_its_partition(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = fail_on(6.66, monkeypatch)
    farm.post(6.1, 6.66, 6.9)
    drain_all()

    assert sizes == [3, 1, 1, 1]
    assert farm.state() == "on"
    assert set(Reading.objects.values_list("number", flat=True)) == {6.1, 6.9}
    for _ in range(3):
        make_due()
        drain_all()
    letter = DeadLetter.objects.get()
    assert letter.attempts == 4
    assert "ValueError" in letter.error
    assert "Traceback" in letter.traceback
    assert ledger() == Account(accepted=3, processed=2, dead=1)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def drain_and_die(farm: Farm, monkeypatch: pytest.MonkeyPatch, **stages: Any) -> None:
    """Drains with these stages of a batch replaced by ones that die, and leaves behind what a killed worker leaves."""

    def not_done(*_: object, **__: object) -> None:
        """What a killed process does not get to do."""

    with monkeypatch.context() as patch:
        for name, stage in stages.items():
            patch.setattr(decide if name == "decide_event" else batch, name, stage)
        patch.setattr(Lease, "release", not_done)
        with pytest.raises(Killed):
            jobs.drain(farm.slot.lane, farm.slot.partition)
    redis.client().delete(keys.lease(*vars_of(farm.slot)))


def test_an_event_that_killed_three_workers_that_were_at_it_is_put_aside(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = decide.decide_event

    def decide_event(event: Event, *rest: Any) -> None:
        if event.values["ph"] == 6.66:
            raise Killed
        return real(event, *rest)

    farm.post(6.1, 6.66, 6.9)
    for _ in range(1 + takeover.DEATHS):  # the first of them did not note what it was at
        drain_and_die(farm, monkeypatch, decide_event=decide_event)
    monkeypatch.setattr(decide, "decide_event", decide_event)
    drain_all()

    assert "died 3 times" in DeadLetter.objects.get().error
    assert farm.state() == "on"
    # 6.1 was committed by a worker that then died on 6.66.
    assert ledger() == Account(accepted=3, processed=1, duplicate=1, dead=1)


def test_workers_that_are_killed_by_chance_cost_no_event(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    real = decide.decide_event

    def dies_at(value: float) -> Any:
        def decide_event(event: Event, *rest: Any) -> None:
            if event.values["ph"] == value:
                raise Killed
            return real(event, *rest)

        return decide_event

    farm.post(6.1, 6.66, 6.9)
    for value in (6.9, 6.66, 6.66, 6.9, 6.9):
        drain_and_die(farm, monkeypatch, decide_event=dies_at(value))
    drain_all()

    assert DeadLetter.objects.count() == 0
    assert set(Reading.objects.values_list("number", flat=True)) == {6.1, 6.66, 6.9}
    assert farm.state() == "on"


def test_effects_that_kill_are_laid_to_their_own_event(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    real = batch.apply

    def apply(decided: decide.Decided) -> Applied:
        if any(event.values["ph"] == 6.66 for event in decided.completed):
            raise Killed
        return real(decided)

    farm.post(6.1, 6.66, 6.9)
    for _ in range(takeover.TOGETHER_DELIVERIES + takeover.DEATHS):
        drain_and_die(farm, monkeypatch, apply=apply)
    monkeypatch.setattr(batch, "apply", apply)
    drain_all()

    assert DeadLetter.objects.get().event["values"] == {"ph": 6.66}
    assert farm.state() == "on"
    assert ledger() == Account(accepted=3, processed=1, duplicate=1, dead=1)


def test_redis_that_goes_away_under_a_take_over_costs_no_event(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "STALL_SECONDS", 0)
    farm.post(6.1, 6.66, 6.9)
    drain_and_die(farm, monkeypatch, decide_event=_die)

    def away(*_: object, **__: object) -> None:
        raise redis_errors.ConnectionError("Connection refused")

    for _ in range(2):
        with monkeypatch.context() as patch:
            # After the note, as `_begin` has it: what follows does not reach Redis, the removal of the note included.
            patch.setattr(Lease, "renew", away)
            patch.setattr(Lease, "clear_checkpoint", away)
            jobs.drain(farm.slot.lane, farm.slot.partition)
    drain_all()

    assert DeadLetter.objects.count() == 0
    assert farm.state() == "on"


def _die(*_: object) -> None:
    raise Killed


def test_an_event_that_kills_before_it_is_decided_is_found_one_by_one(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages_store.store

    def store(inputs: Inputs) -> Stored:
        if any(event.values["ph"] == 6.66 for event in inputs.batch):
            raise Killed
        return real(inputs)

    farm.post(6.1, 6.66, 6.9)
    for _ in range(takeover.TOGETHER_DELIVERIES + takeover.DEATHS):
        drain_and_die(farm, monkeypatch, store=store)
    monkeypatch.setattr(batch, "store", store)
    drain_all()

    assert DeadLetter.objects.get().event["values"] == {"ph": 6.66}
    assert farm.state() == "on"
    assert ledger() == Account(accepted=3, processed=1, duplicate=1, dead=1)


def vars_of(slot: Slot) -> tuple[str, int]:
    return slot.lane, slot.partition


def test_a_database_that_is_away_spends_no_attempt_and_loses_nothing(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "STALL_SECONDS", 0)

    def away(*_: object, **__: object) -> None:
        raise OperationalError("the database system is starting up")

    farm.post(6.9)
    for _ in range(6):
        with monkeypatch.context() as patch:
            patch.setattr(batch, "process", away)
            jobs.drain(farm.slot.lane, farm.slot.partition)
    assert b"the database is away" in redis.client().get(keys.stalled(*vars_of(farm.slot)))
    drain_all()

    assert farm.state() == "on"
    assert DeadLetter.objects.count() == 0
    assert ledger() == Account(accepted=1, processed=1)


def test_a_variable_deleted_after_acceptance_makes_a_dead_letter_that_says_so(farm: Farm) -> None:
    farm.post({"ph": 6.9, "mode": "eco"})
    Variable.objects.filter(name="mode").delete()
    catalogue.shared().refresh(at_once=True)
    drain_all()

    assert DeadLetter.objects.get().error.startswith("mode of Reservoir A was deleted")
    assert ledger() == Account(accepted=1, dead=1)


def test_an_unreadable_entry_is_kept_as_a_dead_letter_and_the_slot_goes_on(farm: Farm) -> None:
    lane, partition = vars_of(farm.slot)
    redis.client().xadd(keys.events(lane, partition), {"n": 3, "b": b"\xff\x00"})
    redis.client().hset(keys.ledger(lane, partition), mapping={"accepted": 3, "depth": 3})
    farm.post(6.9)
    drain_all()

    assert "unreadable journal entry" in DeadLetter.objects.get().error
    assert farm.state() == "on"
    assert ledger() == Account(accepted=4, processed=1, dead=3)


def test_a_worker_that_lost_its_lease_acknowledges_nothing(farm: Farm) -> None:
    farm.post(6.9)
    old, new = Lease(farm.slot, "old"), Lease(farm.slot, "new")
    assert old.acquire()
    entry = old.next(10)[0]
    assert not new.acquire()
    redis.client().delete(keys.lease(*vars_of(farm.slot)))
    assert new.acquire()

    assert not old.renew()
    assert not old.finish(lease.Finished(entry_ids=[entry.id], processed=1))
    assert audit(farm.slot) == Account(accepted=1, depth=1, in_flight=1)
    left = new.next_pending()
    assert left is not None
    assert left.id == entry.id


def test_the_lease_is_given_back_with_a_ticket_when_something_arrived_meanwhile(farm: Farm) -> None:
    farm.post(6.1)
    lease = Lease(farm.slot, "mine")
    assert lease.acquire()
    assert lease.release()
    drain_all()
    assert lease.acquire()
    assert not lease.release()


def test_the_scheduler_queues_a_lost_ticket_again_once(farm: Farm) -> None:
    farm.post(6.9)
    for name in ("critical", "normal", "low"):
        tickets.queue_of(name).empty()

    assert (recovery.reissue_lost_tickets(), recovery.reissue_lost_tickets()) == (1, 0)
    assert tickets.queue_of("normal").count == 1


def test_a_slot_that_is_late_gets_its_ticket_on_the_first_queue() -> None:
    slot, now = Slot("low", 0), 10_000_000

    assert tickets.queue_for(slot, oldest_ms=now - 59_000, now_ms=now) == "low"
    assert tickets.queue_for(slot, oldest_ms=now - 61_000, now_ms=now) == "critical"


def test_latest_values_go_forward_only(farm: Farm) -> None:
    farm.post(6.3, timestamp=at(9))
    farm.post(6.1, timestamp=at(5))
    drain_all()

    key = ("sensor", str(farm.sensor.uuid), "ph")
    assert latest.recall([key])[key].value == 6.3


def test_latest_values_that_redis_lost_come_back_from_the_database(farm: Farm) -> None:
    farm.post({"ph": 6.3, "mode": "eco"}, timestamp=at(5))
    farm.post({"ph": 6.1}, timestamp=at(9))
    drain_all()
    uuid, changed_at = str(farm.sensor.uuid), datetime(2026, 5, 1, 12, tzinfo=UTC)
    DeviceState.objects.update(value="off", changed_at=changed_at)
    wanted = [("sensor", uuid, "ph"), ("sensor", uuid, "mode"), ("device", str(farm.pump.uuid), "power")]
    redis.client().flushdb()
    found = latest.recall([*wanted, ("sensor", uuid, "never"), ("device", uuid, "ph")])

    assert [(found[key].value, found[key].timestamp_us % 60_000_000) for key in wanted] == [
        (6.1, 9_000_000), ("eco", 5_000_000), ("off", 0),
    ]  # fmt: skip
    assert len(found) == 3
    assert redis.client().hlen(keys.latest("sensor", uuid)) == 2, "from now on Redis has them again"


def test_what_a_device_repeats_it_has_had_since_its_last_change(farm: Farm) -> None:
    fan = builders.device(farm.organization, "Fan")
    long = {**builders.leaf(farm.pump, "power", "==", "on"), "for": "10s"}
    seen = builders.leaf(farm.pump, "level", "isNotNull")
    del seen["value"]
    DeviceState.objects.create(device=farm.pump, name="level", datatype="number")
    nodes = [
        builders.node("long", {"type": "AND", "expressions": [seen, long]}, next="fan"),
        builders.node("fan", builders.command(fan)),
    ]
    builders.chain(farm.organization, nodes)
    catalogue.shared().refresh(at_once=True)
    token = builders.token(farm.pump)
    for second, level in ((1, 10), (6, 11), (12, 12)):
        farm.post({"power": "on", "level": level}, token=token, timestamp=at(second))
        drain_all()

    assert StateChange.objects.get(state__device=fan).timestamp == datetime(2026, 5, 1, 12, 0, 12, tzinfo=UTC)


@pytest.mark.parametrize("second", [0, 3_600], ids=["late", "by a clock that is ahead"])
def test_rules_see_the_value_that_was_set_last_whatever_the_time_of_the_event(farm: Farm, second: int) -> None:
    taken = datetime.now(UTC) + timedelta(seconds=second)
    first, then = ("on", "off") if second else ("off", "on")
    if not second:
        states.change_by_person(farm.power, first, user=builders.user())
    farm.post(7.0, timestamp=taken.isoformat() if second else at(0))
    drain_all()
    if second:
        states.change_by_person(farm.power, then, user=builders.user())
    key = ("device", str(farm.pump.uuid), "power")

    assert farm.state() == then
    assert latest.recall([key])[key].value == then
    redis.client().flushdb()
    assert latest.recall([key])[key].value == then, "and what the database gives when Redis was emptied"


def test_an_event_sees_nothing_of_its_sensor_that_comes_after_it_in_the_batch(farm: Farm) -> None:
    words = {
        "type": "AND",
        "expressions": [builders.leaf(farm.sensor, "ph", ">", 6.0), builders.leaf(farm.sensor, "mode", "==", "auto")],
    }
    nodes = [builders.node("words", words, next="off"), builders.node("off", builders.command(farm.pump, "off"))]
    builders.chain(farm.organization, nodes)
    for second, values in enumerate([{"mode": "auto"}, {"ph": 6.2}, {"mode": "manual"}]):
        farm.post(values, timestamp=at(second))
    drain_all()

    assert [row.timestamp.second for row in StateChange.objects.all()] == [1]


def test_an_event_sees_what_the_one_before_it_in_the_batch_has_switched(farm: Farm) -> None:
    farm.chain.delete()
    states.change_by_person(farm.power, "off", user=builders.user())
    low = {
        "type": "AND",
        "expressions": [builders.leaf(farm.sensor, "ph", ">", 6.5), builders.leaf(farm.pump, "power", "==", "off")],
    }
    dose = {**builders.command(farm.pump, "on"), "force": True}
    builders.chain(farm.organization, [builders.node("low", low, next="dose"), builders.node("dose", dose)])
    farm.post(7.0, 7.1, 7.2)
    drain_all()

    assert [row.value for row in StateChange.objects.order_by("id")] == ["off", "on"]


def test_an_event_sees_what_the_device_reported_before_it_in_the_batch(farm: Farm) -> None:
    farm.chain.delete()
    DeviceState.objects.create(device=farm.pump, name="level", datatype="number")
    fan = builders.device(farm.organization, "Fan")
    both = {
        "type": "AND",
        "expressions": [builders.leaf(farm.pump, "level", ">", 1), builders.leaf(farm.pump, "power", "==", "on")],
    }
    builders.chain(
        farm.organization, [builders.node("both", both, next="fan"), builders.node("fan", builders.command(fan))]
    )
    catalogue.shared().refresh(at_once=True)
    token = builders.token(farm.pump)
    for second, values in enumerate([{"power": "on"}, {"level": 2}, {"power": "off"}]):
        farm.post(values, token=token, timestamp=at(second))
    drain_all()

    assert [row.timestamp.second for row in StateChange.objects.filter(state__device=fan)] == [1]


def test_a_chain_over_two_sensors_uses_the_latest_value_of_the_other(farm: Farm) -> None:
    other = builders.sensor(farm.organization)
    both = [builders.leaf(farm.sensor, operator=">", value=6.0), builders.leaf(other, operator=">", value=6.0)]
    nodes = [
        builders.node("both", {"type": "AND", "expressions": both}, next="off"),
        builders.node("off", builders.command(farm.pump, "off")),
    ]
    builders.chain(farm.organization, nodes)
    farm.post(6.4)
    drain_all()
    assert farm.state() is None
    farm.post(6.4, token=builders.token(other))
    drain_all()

    assert farm.state() == "off"


def test_a_device_reports_its_state_and_rules_hear_of_it_once(farm: Farm) -> None:
    fan = builders.device(farm.organization, "Fan", states={"speed": ["off", "high"]})
    nodes = [
        builders.node("pump runs", builders.leaf(farm.pump, "power", "==", "on"), next="fan"),
        builders.node("fan", builders.command(fan, "high", state="speed")),
    ]
    builders.chain(farm.organization, nodes)
    token = builders.token(farm.pump)
    for _ in range(2):
        assert farm.post({"power": "on"}, token=token, timestamp=at(3)).status_code == 202
    drain_all()

    power = DeviceState.objects.get(device=farm.pump)
    assert (power.value, power.reported_value) == (None, "on")
    changes = StateChange.objects.order_by("id").values_list("state__name", "value", "source")
    assert list(changes) == [("power", "on", "device"), ("speed", "high", "rule")]
    assert ledger() == Account(accepted=2, processed=1, duplicate=1)


def test_the_worker_runs_only_functions_that_are_listed_and_only_json() -> None:
    from rq.serializers import JSONSerializer

    from rules.journal.tickets import AllowedJob, ForbiddenJob

    job = AllowedJob.create("os.system", args=("true",), connection=redis.client(), serializer=JSONSerializer)
    with pytest.raises(ForbiddenJob, match=r"os\.system"):
        job.perform()
    tickets.issue(Slot("normal", 0))
    data = redis.client().hget(f"rq:job:{tickets.queue_of('normal').job_ids[0]}", "data")
    import zlib

    assert json.loads(zlib.decompress(data))[0] == "rules.jobs.drain"


def test_the_final_failure_depends_on_the_chains_own_retries() -> None:
    event = Event(
        id=str(UUID(int=1)), type="telemetry-data", priority=5, source_type="sensor", originator_uuid=str(UUID(int=2)),
        organization_id=1, values={}, timestamp_us=0, received_us=0, protocol="http", attempt=2,
    )  # fmt: skip
    failure = failures.Failure(event=event, error="x")

    assert not failures.is_final(failure)
    ((due_ms, _),) = failures.next_attempts([failure])
    assert due_ms > time.time() * 1000 + 20_000


def test_a_drain_tells_live_what_somebody_watches_and_only_what_is_new(farm: Farm) -> None:
    ph = Variable.objects.get(sensor=farm.sensor, name="ph")
    channel = redis.client().pubsub(ignore_subscribe_messages=True)
    channel.subscribe(keys.LIVE_READINGS)
    channel.get_message(timeout=1)
    per_process.forget_all()
    farm.post(6.1, timestamp=at(1))
    drain_all()
    live_channel.subscribe([ph.pk], now=time.time())
    per_process.forget_all()
    farm.post({"ph": 6.2, "mode": "auto"}, timestamp=at(2))
    farm.post(6.2, timestamp=at(2), eventId="8b4f1c1e-1111-4111-8111-111111111111")
    drain_all()
    told = []
    while message := channel.get_message(timeout=0.5):
        told += live_channel.decode(message["data"])
    channel.close()
    per_process.forget_all()
    assert [(variable, number) for variable, _, number, *_ in told] == [(ph.pk, 6.2)]
