"""Effects in the database: each happens once, actions with a cooldown rest, and what is told is told after the commit."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier, BrokenBarrierError
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import OperationalError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from aemos.lib import keys, metrics, redis
from devices import catalogue, latest
from devices.models import Device, DeviceState, Interlock, StateChange, Veto
from notifications import messages
from notifications.models import Notification, Unpublished
from rules import events
from rules.authoring import editing
from rules.effects import perform, states
from rules.effects.cooldowns import CLOCK_TOLERANCE, Cooldown, Cooldowns
from rules.events import Event, EventType
from rules.models import ActionCooldown, Alarm, RuleChain
from rules.processing import batch, index
from rules.processing.batch import BatchResult
from rules.processing.condition_memory import ConditionStateStore
from rules.processing.stages.collect import collect
from rules.processing.stages.decide import decide
from rules.processing.stages.store import store
from tests import builders

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis", "_old_times_count")]
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Farm:
    """One sensor with ph, one doser; chains run when ph is above 6.5."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization, "Reservoir A")
        self.doser = builders.device(self.organization, "Doser", states={"power": ["on", "off"], "speed": []})
        self.power = DeviceState.objects.get(device=self.doser, name="power")

    def chain(self, *actions: dict[str, Any], on_failure: str = "") -> RuleChain:
        """Above 6.5 does the actions one after the other; they are called a0, a1, and so on."""
        names = [f"a{number}" for number in range(len(actions))]
        nodes = [builders.node("high", builders.leaf(self.sensor, operator=">", value=6.5), next="a0")]
        for name, action, following in zip(names, actions, [*names[1:], ""], strict=True):
            nodes.append(builders.node(name, action, next=following, on_failure=on_failure))
            on_failure = ""
        return builders.chain(self.organization, nodes, "pH down")

    def event(self, ph: float = 6.9, *, after: float = 0.0, **fields: Any) -> Event:
        """A reading so many seconds after noon."""
        taken_us = events.microseconds(NOON + timedelta(seconds=after))
        known: dict[str, Any] = {
            "id": str(uuid4()), "type": EventType.TELEMETRY_DATA, "priority": 5, "source_type": "sensor",
            "originator_uuid": str(self.sensor.uuid), "organization_id": self.organization.pk, "values": {"ph": ph},
            "timestamp_us": taken_us, "received_us": taken_us, "protocol": "http",
        }  # fmt: skip
        return Event(**{**known, **fields})

    def send(self, *batch_of: Event) -> BatchResult:
        return process(batch_of)

    def switch(self, value: str) -> None:
        DeviceState.objects.filter(pk=self.power.pk).update(value=value)


def process(batch_of: Sequence[Event]) -> BatchResult:
    """What a worker does with a batch, without the journal."""
    index.shared().refresh(at_once=True)
    catalogue.shared().refresh(at_once=True)
    result = batch.process(batch_of, lambda failures: None, memory=ConditionStateStore())
    perform.publish(result.applied)
    return result


@pytest.fixture
def farm() -> Farm:
    return Farm()


def told() -> list[dict[str, Any]]:
    """What the gateway would read: event name, device, priority, protocols and payload."""
    entries = redis.client().xrange(keys.NOTIFICATIONS)
    found = [messages.decode(fields[b"m"]) for _, fields in entries]
    return [
        {"event": m.event, "device": m.device_uuid, "priority": m.priority, "protocols": m.protocols} | m.payload
        for m in found
    ]


def let_rest(**ago: float) -> None:
    """Lets every action with a cooldown have been done so long ago."""
    for row in ActionCooldown.objects.all():
        row.done_at = row.done_at and row.done_at - timedelta(**ago)
        row.save()
    for state in DeviceState.objects.all():
        earlier_us = int(timedelta(**ago).total_seconds() * 1_000_000)
        state.commanded = {value: at_us - earlier_us for value, at_us in state.commanded.items()}
        state.save()


NOTIFY = {"type": "notify", "title": "pH {ph}", "message": "pH is {ph} at {originator}", "severity": "warning"}
RAISE = {"type": "raise_alarm", "alarm": "pH too high", "severity": "critical", "message": "pH is {ph}"}


def test_one_event_does_everything_its_chain_asks_for_and_tells_of_it(farm: Farm) -> None:
    chain = farm.chain(builders.command(farm.doser), NOTIFY, RAISE)

    farm.send(farm.event())

    assert StateChange.objects.get().value == "on"
    alarm = Alarm.objects.get()
    assert (alarm.type, alarm.state, alarm.severity, alarm.message) == (
        "pH too high", "active", "critical", "pH is 6.9",
    )  # fmt: skip
    assert (alarm.source_type, alarm.originator_uuid, alarm.chain, alarm.node, alarm.raised_at) == (
        "sensor", farm.sensor.uuid, chain, "a2", NOON,
    )  # fmt: skip
    changed, note, alert = told()
    assert (changed["event"], changed["device"]) == ("device-state-change", str(farm.doser.uuid))
    assert note == {
        "event": "notification", "device": None, "priority": 4, "protocols": messages.ALL_PROTOCOLS, "title": "pH 6.9",
        "message": "pH is 6.9 at Reservoir A", "severity": "warning", "sourceType": "sensor",
        "originator": str(farm.sensor.uuid), "originatorName": "Reservoir A", "ruleChain": str(chain.uuid),
        "ruleChainName": "pH down", "node": "a1",
    }  # fmt: skip
    assert (alert["event"], alert["change"], alert["by"], alert["originatorName"], alert["priority"]) == (
        "alert", "raised", "pH down / a2", "Reservoir A", 1,
    )  # fmt: skip
    assert not Unpublished.objects.exists()


def test_the_same_event_twice_leaves_one_of_everything(farm: Farm) -> None:
    farm.chain({**builders.command(farm.doser), "force": True, "cooldown": "1s"}, NOTIFY, RAISE)
    event = farm.event()

    farm.send(event, event)
    farm.send(event)

    assert (StateChange.objects.count(), Alarm.objects.count(), Notification.objects.count()) == (1, 1, 3)
    assert (Alarm.objects.get().times_raised, len(told())) == (1, 3)


def test_the_same_wishes_twice_leave_one_of_everything(farm: Farm) -> None:
    farm.chain(
        {**builders.command(farm.doser), "force": True}, NOTIFY, RAISE, {"type": "clear_alarm", "alarm": "other"}
    )
    index.shared().refresh(at_once=True)
    event = farm.event()
    decided = decide(store(inputs := collect([event], ConditionStateStore())), inputs)

    for _ in range(2):
        with transaction.atomic():
            done = perform.apply(decided.effects)
        perform.publish(done)

    assert (done.changes, done.notes, done.alarms) == ([], [], [])
    assert (StateChange.objects.count(), Alarm.objects.count(), Notification.objects.count(), len(told())) == (
        1,
        1,
        3,
        3,
    )


def test_an_event_sent_again_with_its_id_but_another_time_has_no_second_effect(farm: Farm) -> None:
    farm.chain(
        {**builders.command(farm.doser), "force": True, "cooldown": "10m"}, {**NOTIFY, "cooldown": "10m"},
        {**RAISE, "cooldown": "10m"},
    )  # fmt: skip
    event = farm.event()
    farm.send(event)
    Alarm.objects.update(state=Alarm.State.CLEARED, cleared_at=NOON)
    let_rest(hours=1)

    farm.send(farm.event(after=1, id=event.id), farm.event(after=2, id=event.id))

    assert (StateChange.objects.count(), Alarm.objects.count(), len(told())) == (1, 1, 3)
    rests = ActionCooldown.objects.values_list("done_at", flat=True)
    assert all(done_at < timezone.now() - timedelta(minutes=59) for done_at in rests if done_at), (
        "nor begins a cooldown"
    )


def test_a_batch_that_is_rolled_back_leaves_neither_effects_nor_cooldowns(farm: Farm) -> None:
    farm.chain({**builders.command(farm.doser), "cooldown": "10m"}, {**NOTIFY, "cooldown": "10m"}, RAISE)
    index.shared().refresh(at_once=True)

    def crash(failures: object) -> None:
        raise RuntimeError("the worker dies before the commit")

    with pytest.raises(RuntimeError):
        batch.process([farm.event()], crash, memory=ConditionStateStore())

    assert [m.objects.count() for m in (StateChange, Alarm, Notification, ActionCooldown)] == [0, 0, 0, 0]
    farm.send(farm.event())
    assert [m.objects.count() for m in (StateChange, Alarm, Notification, ActionCooldown)] == [1, 1, 3, 1]


def test_a_state_that_has_the_value_already_is_left_alone_unless_it_is_forced(farm: Farm) -> None:
    farm.chain(builders.command(farm.doser), {**builders.command(farm.doser), "force": True})

    farm.send(farm.event(after=0), farm.event(after=1))

    actors = StateChange.objects.order_by("id").values_list("actor", "previous", "value")
    assert list(actors) == [("pH down / a0", None, "on"), ("pH down / a1", "on", "on"), ("pH down / a1", "on", "on")]


def test_a_value_that_is_no_longer_allowed_goes_to_the_failure_branch(farm: Farm) -> None:
    nodes = [
        builders.node("high", builders.leaf(farm.sensor, operator=">", value=6.5), next="dose"),
        builders.node("dose", builders.command(farm.doser), on_failure="tell"),
        builders.node("tell", {**NOTIFY, "message": "{error}"}),
    ]
    builders.chain(farm.organization, nodes)
    farm.power.allowed_values = ["off"]
    farm.power.save()

    assert farm.send(farm.event()).failures == []
    assert StateChange.objects.count() == 0
    (note,) = told()
    assert "Doser" in note["message"]
    assert "['off']" in note["message"]


def test_a_value_that_is_no_longer_allowed_fails_a_chain_without_a_branch_for_it(farm: Farm) -> None:
    farm.chain(builders.command(farm.doser), NOTIFY)
    farm.power.allowed_values = ["off"]
    farm.power.save()

    (failure,) = farm.send(farm.event()).failures

    assert failure.node == "a0"
    assert "['off']" in failure.error
    assert (StateChange.objects.count(), told()) == (0, [])


def test_an_audience_is_told_on_socketio_only_and_a_device_by_name(farm: Farm) -> None:
    farm.chain({**NOTIFY, "audience": ["admin"], "severity": "critical", "deviceUuid": str(farm.doser.uuid)})

    farm.send(farm.event())

    (note,) = told()
    assert (note["event"], note["priority"], note["roles"], note["protocols"]) == ("alert", 1, ["admin"], ("socketio",))
    assert note["device"] == str(farm.doser.uuid)
    assert Notification.objects.get().device == farm.doser


def test_a_notification_about_a_device_that_is_gone_fails_by_name(farm: Farm) -> None:
    farm.chain({**NOTIFY, "deviceUuid": str(farm.doser.uuid)})
    farm.doser.delete()

    (failure,) = farm.send(farm.event()).failures

    assert failure.node == "a0"
    assert str(farm.doser.uuid) in failure.error


def test_a_dose_is_commanded_again_after_the_device_has_reported_it(farm: Farm) -> None:
    DeviceState.objects.filter(pk=farm.power.pk).update(kind=DeviceState.Kind.MOMENTARY)
    farm.chain(builders.command(farm.doser))

    farm.send(farm.event(after=0))
    farm.send(report(farm, farm.doser, after=1))
    farm.send(farm.event(after=2))

    assert StateChange.objects.filter(source="rule").count() == 2


def test_a_chain_takes_another_way_when_an_interlock_vetoes(farm: Farm) -> None:
    DeviceState.objects.filter(pk=farm.power.pk).update(safe_value="off")
    Interlock.objects.create(state=farm.power, maximum_runs_per_day=1)
    tell = {"type": "notify", "title": "No", "message": "{error}"}
    nodes = [
        builders.node("high", builders.leaf(farm.sensor, operator=">", value=6.5), next="on", on_false="off"),
        builders.node("on", builders.command(farm.doser), on_failure="tell"),
        builders.node("tell", tell),
        builders.node("off", builders.command(farm.doser, "off")),
    ]
    builders.chain(farm.organization, nodes)

    farm.send(*(farm.event(ph, after=number) for number, ph in enumerate((6.9, 6.0, 6.9))))

    assert [change.value for change in StateChange.objects.order_by("id")] == ["on", "off"]
    assert [each["message"] for each in told() if "message" in each] == ["it ran 1 times in 24 hours, of 1"]
    assert Veto.objects.get().count == 1


def test_without_another_way_a_veto_is_counted_and_the_chain_goes_on(farm: Farm) -> None:
    DeviceState.objects.filter(pk=farm.power.pk).update(safe_value="off")
    Interlock.objects.create(state=farm.power, maximum_runs_per_day=0)
    farm.chain(builders.command(farm.doser), NOTIFY)

    result = farm.send(farm.event())

    assert (result.processed, result.failures, StateChange.objects.count()) == (1, [], 0)
    assert len(told()) == 1
    assert Veto.objects.get().actor == "pH down / a0"


def test_an_action_rests_after_it_was_done_and_what_is_left_out_is_counted(farm: Farm) -> None:
    farm.chain({**NOTIFY, "cooldown": "10m"})
    before = suppressed_in_total()

    farm.send(farm.event(after=0), farm.event(after=1))
    farm.send(farm.event(after=3_600))

    assert len(told()) == 1
    row = ActionCooldown.objects.get()
    assert (row.node, row.originator_uuid, row.suppressed) == ("a0", farm.sensor.uuid, 2)
    assert suppressed_in_total() - before == 2
    let_rest(minutes=10)
    farm.send(farm.event(after=3_601))
    row.refresh_from_db()
    assert (len(told()), row.suppressed) == (2, 0)


def suppressed_in_total() -> float:
    metrics.COUNTERS.flush()
    return float(redis.client().hget(keys.METRICS, "rule_actions_suppressed_total") or 0)


def test_readings_of_hours_that_arrive_at_once_start_a_pump_once(farm: Farm) -> None:
    farm.chain({**builders.command(farm.doser), "force": True, "cooldown": "10m"})

    farm.send(*(farm.event(after=600 * number) for number in range(12)))

    assert StateChange.objects.count() == 1


def test_a_command_that_changes_nothing_begins_no_cooldown(farm: Farm) -> None:
    farm.chain({**builders.command(farm.doser), "cooldown": "10m"})
    farm.switch("on")
    farm.send(farm.event(after=0))
    farm.switch("off")

    farm.send(farm.event(after=1))
    assert StateChange.objects.count() == 1, "the doser starts at once"
    farm.switch("off")
    farm.send(farm.event(after=2))
    assert StateChange.objects.count() == 1, "and then rests"


def test_every_sensor_has_its_own_cooldown(farm: Farm) -> None:
    other = builders.sensor(farm.organization)
    either = {"type": "OR", "expressions": [builders.leaf(s, operator=">", value=6.5) for s in (farm.sensor, other)]}
    nodes = [builders.node("high", either, next="tell"), builders.node("tell", {**NOTIFY, "cooldown": "10m"})]
    builders.chain(farm.organization, nodes)

    farm.send(farm.event(), farm.event(originator_uuid=str(other.uuid)), farm.event(after=1))

    assert {each["originator"] for each in told()} == {str(farm.sensor.uuid), str(other.uuid)}
    assert len(told()) == 2


def test_a_shorter_cooldown_counts_from_when_the_action_was_last_done(farm: Farm) -> None:
    chain = farm.chain({**NOTIFY, "cooldown": "1d"})
    farm.send(farm.event(after=0))
    let_rest(minutes=30)
    editing.save(chain, [
        builders.node("high", builders.leaf(farm.sensor, operator=">", value=6.5), next="a0"),
        builders.node("a0", {**NOTIFY, "cooldown": "10m"}),
    ])  # fmt: skip

    farm.send(farm.event(after=1))

    assert len(told()) == 2


def test_alarms_rest_only_for_what_would_be_told(farm: Farm) -> None:
    farm.chain({**RAISE, "cooldown": "10m"})
    farm.send(farm.event(after=0), farm.event(after=1))
    assert (Alarm.objects.get().times_raised, ActionCooldown.objects.get().suppressed) == (2, 0)
    Alarm.objects.update(state=Alarm.State.CLEARED, cleared_at=NOON + timedelta(seconds=2))

    farm.send(farm.event(after=3))
    assert Alarm.objects.count() == 1
    let_rest(minutes=10)
    farm.send(farm.event(after=4))
    assert [row.state for row in Alarm.objects.all()] == ["active", "cleared"]


def test_a_batch_without_cooldowns_asks_for_none(farm: Farm) -> None:
    farm.chain(builders.command(farm.doser))
    with CaptureQueriesContext(
        connection,
    ) as without:
        farm.send(farm.event())
    assert [query for query in without.captured_queries if "cooldown" in query["sql"]] == []


def test_a_batch_with_cooldowns_reads_and_writes_them_once(farm: Farm) -> None:
    farm.chain({**NOTIFY, "cooldown": "1s"}, {**RAISE, "cooldown": "1s"})
    farm.send(farm.event())
    let_rest(minutes=1)
    with CaptureQueriesContext(connection) as again:
        farm.send(*(farm.event(after=number) for number in range(1, 50)))
    asked = [query["sql"].split()[0] for query in again.captured_queries if "rules_actioncooldown" in query["sql"]]
    assert asked == ["SELECT", "UPDATE"]


def rest_of(chain: RuleChain, seconds: int = 600) -> Cooldown:
    return Cooldown(chain.pk, "a0", str(UUID(int=7)), seconds * 1_000_000)


@pytest.mark.parametrize(
    ("elapsed", "permitted"),
    [
        (timedelta(0), False),
        (timedelta(seconds=600) - timedelta(microseconds=1), False),
        (timedelta(seconds=600), True),
        (-CLOCK_TOLERANCE, False),
        (-CLOCK_TOLERANCE - timedelta(microseconds=1), True),
    ],
)
def test_a_cooldown_ends_to_the_microsecond_and_does_not_believe_a_time_to_come(
    farm: Farm, elapsed: timedelta, permitted: bool
) -> None:
    rest = rest_of(farm.chain(NOTIFY))
    with transaction.atomic():
        first = Cooldowns([rest], now=NOON)
        assert first.permits(rest, "one")
        assert first.permits(rest, "one"), "the same effect may ask again"
        assert not first.permits(rest, "two")
        first.save()
    with transaction.atomic():
        assert Cooldowns([rest], now=NOON + elapsed).permits(rest, "three") is permitted


def test_of_workers_that_want_the_same_action_at_once_one_does_it(farm: Farm) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("the test database of SQLite is in memory, where threads do not wait for one another")
    rest, start = rest_of(farm.chain(NOTIFY)), Barrier(4)

    def work(number: int) -> bool:
        try:
            with transaction.atomic():
                start.wait(timeout=30)
                cooldowns = Cooldowns([rest])
                granted = cooldowns.permits(rest, f"effect {number}")
                cooldowns.save()
                return granted
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) == 1
    assert ActionCooldown.objects.get().suppressed == 3


def process_at_once(first: Event, second: Event) -> list[Exception | None]:
    """What two workers raise that are at these events at the same time."""

    def work(event: Event) -> Exception | None:
        try:
            batch.process([event], lambda failures: None, memory=ConditionStateStore())
        except OperationalError as error:
            return error
        finally:
            connection.close()
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, (first, second)))


def report(farm: Farm, device: Device, **fields: Any) -> Event:
    of_device = {"source_type": "device", "originator_uuid": str(device.uuid), "type": EventType.DEVICE_STATE_CHANGE}
    return farm.event(**({"values": {"power": "on"}} | of_device | fields))


def test_devices_that_switch_one_another_do_not_wait_for_one_another_in_a_circle(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite lets one transaction write at a time")
    other = builders.device(farm.organization)
    for one, target in ((farm.doser, other), (other, farm.doser)):
        switch = builders.node("off", builders.command(target, "off"))
        builders.chain(
            farm.organization, [builders.node("on", builders.leaf(one, "power", "==", "on"), next="off"), switch]
        )
    index.shared().refresh(at_once=True)
    both, real = Barrier(2), perform.apply

    def together(effects: Any, values: Any) -> Any:
        with contextlib.suppress(BrokenBarrierError):  # one is held back by the other's lock, as it should be
            both.wait(1)
        return real(effects, values)

    monkeypatch.setattr(perform, "apply", together)

    assert process_at_once(report(farm, farm.doser), report(farm, other)) == [None, None]


def test_a_report_and_a_timer_of_a_device_do_not_wait_for_one_another_in_a_circle(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite lets one transaction write at a time")
    off = builders.node("off", {**builders.command(farm.doser, "off"), "cooldown": "1m", "force": True})
    leaf = builders.leaf(farm.doser, "power", "!=", "dimmed")
    chain = builders.chain(farm.organization, [builders.node("on", leaf, next="off"), off])
    index.shared().refresh(at_once=True)
    latest.remember({("device", str(farm.doser.uuid), "power"): latest.Latest("on", 1)})
    both, real, apply = Barrier(2), perform.apply, states.apply
    timer = report(farm, farm.doser, values={}, protocol=events.TIMER, chains=(str(chain.uuid),))

    def meet() -> None:
        with contextlib.suppress(BrokenBarrierError):
            both.wait(1)

    def of_report(effects: Any, values: Any) -> Any:
        if effects and not effects[0].effect_key.startswith(str(timer.id)):
            meet()  # its state is locked
        return real(effects, values)

    def of_timer(requests: Any, *args: Any, **more: Any) -> Any:
        if requests and requests[0].effect_key.startswith(str(timer.id)):
            meet()  # before it locks a state
        return apply(requests, *args, **more)

    monkeypatch.setattr(perform, "apply", of_report)
    monkeypatch.setattr(states, "apply", of_timer)

    assert process_at_once(report(farm, farm.doser), timer) == [None, None]
