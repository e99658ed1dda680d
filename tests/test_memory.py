"""What conditions over time remember, in Redis and the database for real: crashes, lost memory, edits and two lanes at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from aemos.lib import redis
from devices.latest import Key, Latest
from devices.models import DeviceState, Reading, StateChange
from rules import events, jobs
from rules.authoring import editing
from rules.effects import perform
from rules.engine.bound import DeployedChain
from rules.engine.values import Sample, TemporalCondition
from rules.events import Event, EventType
from rules.journal import ledger, slots, writing
from rules.journal.lease import Lease
from rules.journal.ledger import Account
from rules.journal.slots import Slot
from rules.models import DeadLetter, RuleChain
from rules.processing import batch, condition_memory, index, schedules
from rules.processing.condition_memory import ConditionStateStore
from rules.processing.stages.decide import Decided
from tests import builders

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Farm:
    """A sensor whose pump is on above 6.5 until the value is below 6.2."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization)
        self.pump = builders.device(self.organization)
        band = {**builders.leaf(self.sensor, operator=">", value=6.5), "off": 6.2}
        nodes = [
            builders.node("band", band, next="on", on_false="off"),
            builders.node("on", builders.command(self.pump, "on")),
            builders.node("off", builders.command(self.pump, "off")),
        ]
        self.chain = builders.chain(self.organization, nodes, "band")

    def event(self, second: int, value: float, kind: str = EventType.TELEMETRY_DATA) -> Event:
        return Event(
            id=str(uuid4()),
            type=kind,
            priority=events.PRIORITIES[kind],
            source_type="sensor",
            originator_uuid=str(self.sensor.uuid),
            organization_id=self.organization.pk,
            values={"ph": value},
            timestamp_us=events.microseconds(NOON + timedelta(seconds=second)),
            received_us=events.microseconds(NOON),
            protocol="http",
        )

    def append(self, *values: tuple[int, float], kind: str = EventType.TELEMETRY_DATA) -> Slot:
        made = [self.event(second, value, kind) for second, value in values]
        slot = Slot(made[0].lane, slots.partition_of(str(self.sensor.uuid)))
        writing.append({slot: made})
        return slot

    def changes(self) -> list[tuple[int, Any]]:
        rows = StateChange.objects.order_by("id").values_list("timestamp", "value")
        return [(int((at - NOON).total_seconds()), value) for at, value in rows]


@pytest.fixture
def farm() -> Farm:
    return Farm()


def drain(slot: Slot) -> None:
    index.shared().refresh(at_once=True)
    jobs.drain(slot.lane, slot.partition)


def index_of(farm: Farm) -> DeployedChain:
    index.shared().refresh(at_once=True)
    bound = index.shared().by_uuid(str(farm.chain.uuid))
    assert bound
    return bound


def forget_all() -> None:
    for key in redis.client().scan_iter("aemos:condition-state:*"):
        redis.client().delete(key)


def remembered() -> list[bytes]:
    return [redis.client().get(key) for key in redis.client().scan_iter("aemos:condition-state:*")]


def test_a_dead_band_goes_on_from_batch_to_batch(farm: Farm) -> None:
    for value in [(1, 6.6), (2, 6.3), (3, 6.1), (4, 6.3), (5, 6.51), (6, 6.2)]:
        drain(farm.append(value))

    assert farm.changes() == [(1, "on"), (3, "off"), (5, "on")]


def test_a_crash_after_the_commit_loses_nothing_of_what_was_observed(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> bool:
        raise KeyboardInterrupt

    slot = farm.append((1, 6.6))
    with monkeypatch.context() as patched:
        patched.setattr(Lease, "finish", crash)
        with pytest.raises(KeyboardInterrupt):
            drain(slot)
    assert farm.changes() == [(1, "on")]
    assert Reading.objects.count() == 1
    drain(slot)
    drain(farm.append((2, 6.3)))

    assert farm.changes() == [(1, "on")], "in between it stays on, although its first reading came twice"
    assert ledger.audit(slot) == Account(accepted=2, processed=1, duplicate=1)


def test_a_crash_with_a_doubled_reading_behind_new_ones_keeps_their_order(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    drain(farm.append((1, 6.6)))
    slot = farm.append((2, 6.3), (1, 6.6), (3, 6.1), (4, 6.3))
    with monkeypatch.context() as patched:
        patched.setattr(batch, "process", crash)
        with pytest.raises(KeyboardInterrupt):
            drain(slot)
    drain(slot)

    assert farm.changes() == [(1, "on"), (3, "off")]


def test_what_redis_lost_comes_back_from_the_stored_readings(farm: Farm) -> None:
    drain(farm.append((1, 6.6), (2, 6.4), (3, 6.3)))
    forget_all()
    drain(farm.append((4, 6.3)))
    assert farm.changes() == [(1, "on")]
    drain(farm.append((5, 6.1)))
    forget_all()
    drain(farm.append((6, 6.3)))

    assert farm.changes() == [(1, "on"), (5, "off")]


def test_a_new_chain_knows_what_its_sensor_said_before(farm: Farm) -> None:
    drain(farm.append((1, 6.0), (60, 6.6), (120, 6.7)))
    lamp = builders.device(farm.organization)
    long = {**builders.leaf(farm.sensor, operator=">", value=6.5), "for": "2m"}
    builders.chain(
        farm.organization, [builders.node("long", long, next="lamp"), builders.node("lamp", builders.command(lamp))]
    )
    drain(farm.append((179, 6.7), (180, 6.7)))

    assert DeviceState.objects.get(device=lamp).value == "on"
    assert StateChange.objects.get(state__device=lamp).timestamp == NOON + timedelta(seconds=180)


def test_an_edit_elsewhere_in_the_chain_forgets_nothing(farm: Farm) -> None:
    drain(farm.append((1, 6.6)))
    before = remembered()
    Reading.objects.all().delete()  # so that it cannot come back from there
    nodes = list(farm.chain.nodes.all())
    nodes[1].name = nodes[0].next = "start the pump"
    editing.save(farm.chain, nodes)
    drain(farm.append((2, 6.3)))

    assert len(before) == len(remembered()) == 1
    assert farm.changes() == [(1, "on")]


def test_what_a_chain_missed_while_it_was_switched_off_counts_when_it_is_on_again(farm: Farm) -> None:
    drain(farm.append((1, 6.6)))
    editing.switch(farm.chain, enabled=False, by="grower")
    drain(farm.append((2, 6.1)))
    editing.switch(farm.chain, enabled=True, by="grower")
    drain(farm.append((3, 6.3)))

    assert farm.changes() == [(1, "on"), (3, "off")]


def test_a_chain_that_only_the_clock_runs_judges_by_every_reading(farm: Farm) -> None:
    farm.chain.execution_type, farm.chain.cron = RuleChain.ExecutionType.SCHEDULE_ONLY, "0 6 * * *"
    editing.save(farm.chain)
    ago = int((datetime.now(UTC) - NOON).total_seconds())
    for second, value in [(-300, 6.6), (-200, 6.3), (-100, 6.1), (-50, 6.3)]:
        drain(farm.append((ago + second, value)))
        if second in (-200, -50):
            schedules.trigger(farm.chain, protocol="http")
            drain(Slot("critical", slots.partition_of(str(farm.chain.uuid))))

    assert [value for _, value in farm.changes()] == ["on", "off"]


def test_a_source_that_was_silent_for_long_is_looked_up_once(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []

    def stored(watch: TemporalCondition, **_: int) -> list[Sample]:
        looked_up.append(watch)
        return []

    monkeypatch.setattr(condition_memory, "stored", stored)
    (watch,) = index_of(farm).compiled.watches
    newest: dict[Key, Latest] = {watch.reference: Latest(6.6, 1)}
    for _ in range(3):
        ConditionStateStore().collect([watch], since_us=10**15, latest=newest)

    assert len(looked_up) == 1


def test_an_edit_of_the_condition_begins_anew_with_the_stored_readings(farm: Farm) -> None:
    drain(farm.append((1, 6.6)))
    nodes = list(farm.chain.nodes.all())
    nodes[0].config["value"] = 6.7
    editing.save(farm.chain, nodes)
    drain(farm.append((2, 6.3)))

    assert farm.changes() == [(1, "on"), (2, "off")]


def test_an_event_that_raises_has_not_been_observed_by_those_after_it(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batch.apply

    def apply(decided: Decided) -> Any:
        applied = real(decided)
        if any(event.values["ph"] == 6.66 for event in decided.completed):
            raise ValueError("this one cannot be stored")
        return applied

    monkeypatch.setattr(batch, "apply", apply)
    slot = farm.append((1, 6.3), (2, 6.66), (3, 6.3))
    drain(slot)

    assert farm.changes() == [(1, "off")]
    assert DeadLetter.objects.count() == 0
    assert ledger.audit(slot).waiting == 1


def test_when_the_urgent_lane_of_the_sensor_was_faster_both_are_remembered(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = perform.publish

    def tell(performed: Any) -> None:
        monkeypatch.setattr(perform, "publish", real)
        drain(farm.append((2, 6.1), kind=EventType.CRITICAL_ALARM))
        real(performed)

    monkeypatch.setattr(perform, "publish", tell)
    normal = farm.append((1, 6.6))
    drain(normal)
    drain(farm.append((3, 6.3)))

    assert ledger.audit(normal) == Account(accepted=2, processed=2)
    assert farm.changes() == [(1, "on"), (2, "off")]


def test_memory_is_kept_for_twice_what_it_looks_back_and_a_day_at_least(farm: Farm) -> None:
    drain(farm.append((1, 6.6)))
    (key,) = redis.client().scan_iter("aemos:condition-state:*")

    assert 86_400 < redis.client().ttl(key) <= 15 * 86_400


def test_a_chain_without_conditions_over_time_asks_redis_for_no_memory(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = builders.sensor(farm.organization)
    builders.switching_chain(other, farm.pump)
    asked: list[object] = []
    monkeypatch.setattr(ConditionStateStore, "collect", lambda *_, **__: asked.append(_))
    event = farm.event(1, 5.0)
    slot = Slot("normal", slots.partition_of(str(other.uuid)))
    writing.append({slot: [msgspec.structs.replace(event, originator_uuid=str(other.uuid))]})
    drain(slot)

    assert farm.changes() == [(1, "on")]
    assert asked == []
