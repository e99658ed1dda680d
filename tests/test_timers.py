"""Timers: a sensor falls silent, or a device stands, and a chain runs although nothing is reported; once, and not too early."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests
from django.test import Client
from redis.exceptions import ConnectionError

from aemos.lib import keys, per_process, redis
from aemos.management.commands.runscheduler import PERIODIC_TASKS
from deploy.local import local_system
from devices import latest
from devices.models import DeviceState, Sensor, StateChange
from notifications.models import Unpublished
from rules import events
from rules.authoring import editing
from rules.effects import states
from rules.journal import ledger, slots, writing
from rules.journal.ledger import Account
from rules.models import Alarm, RuleChain
from rules.processing import index, schedules, timers
from tests import builders
from tests.worker import drain_all

in_process = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]


class Farm:
    """A sensor whose silence of 10 minutes switches a lamp on."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization)
        self.lamp = builders.device(self.organization)
        self.chain = self.silence_chain("10m")

    def silence_chain(self, duration: str, name: str = "") -> RuleChain:
        silent = self.leaf(duration)
        nodes = [builders.node("silent", silent, next="lamp"), builders.node("lamp", builders.command(self.lamp))]
        return builders.chain(self.organization, nodes, name)

    def leaf(self, duration: str) -> dict[str, Any]:
        leaf = {**builders.leaf(self.sensor, operator="olderThan"), "duration": duration}
        del leaf["value"]
        return leaf

    @property
    def partition(self) -> int:
        return slots.partition_of(str(self.sensor.uuid))

    def said(self, minutes_ago: float, value: float = 6.0) -> None:
        """As if a worker had processed a reading that old."""
        at_us = events.microseconds(datetime.now(UTC) - timedelta(minutes=minutes_ago))
        redis.client().delete(keys.latest("sensor", str(self.sensor.uuid)))
        latest.remember({("sensor", str(self.sensor.uuid), "ph"): latest.Latest(value, at_us)})

    def switched(self) -> int:
        return StateChange.objects.filter(state__device=self.lamp).count()


@pytest.fixture
def farm() -> Farm:
    return Farm()


def tick() -> int:
    """One second of the scheduler and of a worker; gives how many timers fired."""
    redis.client().delete(keys.TIMERS_SCAN_LOCK)
    index.shared().refresh(at_once=True)
    fired = timers.fire_due()
    drain_all()
    return fired


def due_in_seconds() -> list[float]:
    rows = redis.client().zrange(keys.TIMERS, 0, -1, withscores=True)
    return [score / 1_000 - time.time() for _, score in rows]


def let_time_pass(minutes: float) -> None:
    """Everything happened that much earlier."""
    for member, score in redis.client().zrange(keys.TIMERS, 0, -1, withscores=True):
        redis.client().zadd(keys.TIMERS, {member: score - minutes * 60_000})


pytestmark = pytest.mark.timeout(180)


class TestInProcess:
    pytestmark = in_process

    def test_a_silent_sensor_runs_its_chain_once_and_not_before_its_time(self, farm: Farm) -> None:
        farm.said(minutes_ago=4)
        assert tick() == 1, "a new chain is looked at once, to learn when it has to be looked at again"
        assert farm.switched() == 0
        (seconds,) = due_in_seconds()
        assert seconds == pytest.approx(6 * 60, abs=2)
        assert tick() == 0
        let_time_pass(6.1)
        farm.said(minutes_ago=10.2)
        assert tick() == 1
        assert farm.switched() == 1
        change = StateChange.objects.get()
        assert abs(change.timestamp - (datetime.now(UTC) - timedelta(seconds=6))) < timedelta(seconds=3)

        DeviceState.objects.update(value="off")
        assert [tick() for _ in range(3)] == [0, 0, 0]
        assert farm.switched() == 1

    def test_the_silence_of_a_second_sensor_is_one_alarm_that_the_next_reading_of_either_clears(
        self, farm: Farm
    ) -> None:
        other = builders.sensor(farm.organization, "Spare")
        high = builders.leaf(other, operator=">", value=6.5)
        nodes = [
            builders.node(
                "when", {"type": "AND", "expressions": [high, farm.leaf("10m")]}, next="raise", on_false="clear"
            ),
            builders.node("raise", {"type": "raise_alarm", "alarm": "nobody measures", "severity": "critical"}),
            builders.node("clear", {"type": "clear_alarm", "alarm": "nobody measures"}),
        ]
        builders.chain(farm.organization, nodes, "both")
        farm.said(minutes_ago=11)
        tick()
        self.post(other, 7.0)
        assert [alarm.originator_uuid for alarm in Alarm.objects.all()] == [other.uuid]
        self.post(farm.sensor, 6.0)
        assert Alarm.objects.get().state == Alarm.State.CLEARED
        farm.said(minutes_ago=11)
        let_time_pass(11)
        tick()
        self.post(other, 7.1)
        assert {(alarm.originator_uuid, alarm.type) for alarm in Alarm.objects.all()} == {
            (other.uuid, "nobody measures")
        }
        assert Alarm.objects.exclude(state=Alarm.State.CLEARED).count() == 1
        self.post(farm.sensor, 6.1)
        assert not Alarm.objects.exclude(state=Alarm.State.CLEARED).exists()

    def post(self, sensor: Sensor, ph: float) -> None:
        headers = {"authorization": f"Bearer {builders.token(sensor)}"}
        body = json.dumps({"values": {"ph": ph}})
        assert (
            Client().post("/api/v1/telemetry", body, content_type="application/json", headers=headers).status_code
            == 202
        )
        drain_all()

    def test_a_sensor_that_has_never_said_anything_is_silent(self, farm: Farm) -> None:
        assert tick() == 1
        assert farm.switched() == 1
        assert tick() == 0

    def test_a_chain_that_runs_by_the_clock_alone_is_run_by_no_timer(self, farm: Farm) -> None:
        tick()
        farm.chain.execution_type, farm.chain.cron = RuleChain.ExecutionType.SCHEDULE_ONLY, "0 6 * * *"
        editing.save(farm.chain)
        redis.client().delete(keys.TIMERS)
        assert tick() == 0
        farm.said(minutes_ago=4)
        schedules.trigger(farm.chain, protocol="http")
        drain_all()
        let_time_pass(10)
        assert tick() == 0
        assert farm.switched() == 1, "as long as events ran it"

    def test_a_timer_of_a_chain_that_now_runs_by_the_clock_alone_is_dropped(self, farm: Farm) -> None:
        farm.said(minutes_ago=4)
        tick()
        farm.chain.execution_type, farm.chain.cron = RuleChain.ExecutionType.SCHEDULE_ONLY, "0 6 * * *"
        editing.save(farm.chain)
        let_time_pass(10)
        farm.said(minutes_ago=20)
        assert tick() == 0
        assert farm.switched() == 0

    def test_timers_of_a_stuck_partition_do_not_keep_the_others_waiting(
        self, farm: Farm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(timers, "TIMERS_PER_TICK", 1)
        stuck = farm.partition
        monkeypatch.setattr(timers, "_oldest_ms", lambda partition: 0.0 if partition == stuck else float("inf"))
        farm.silence_chain("11m")
        index.shared().refresh(at_once=True)
        timers.look_for_new()
        let_time_pass(1)
        while farm.partition == stuck:
            farm.sensor = builders.sensor(farm.organization)
        farm.silence_chain("10m")

        assert tick() == 1
        assert farm.switched() == 1

    def test_a_reading_moves_the_timer_on(self, farm: Farm) -> None:
        tick()
        farm.said(minutes_ago=9)
        event = reading(farm)
        writing.append({slots.Slot("normal", slots.partition_of(str(farm.sensor.uuid))): [event]})
        drain_all()

        (seconds,) = due_in_seconds()
        assert seconds == pytest.approx(600, abs=3)

    def test_what_waits_in_the_queue_is_no_silence(self, farm: Farm) -> None:
        farm.said(minutes_ago=4)
        tick()
        slot = slots.Slot("normal", slots.partition_of(str(farm.sensor.uuid)))
        writing.append({slot: [reading(farm)]})
        farm.said(minutes_ago=10)
        member = redis.client().zrange(keys.TIMERS, 0, -1)[0]
        redis.client().zadd(keys.TIMERS, {member: (time.time() + 0.3) * 1_000})
        time.sleep(0.31)

        assert timers.fire_due() == 0, "the reading was accepted before the time came"
        drain_all()
        assert timers.fire_due() == 0
        assert farm.switched() == 0

    def test_a_crash_after_the_journal_has_the_event_brings_the_same_event_again(
        self, farm: Farm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = redis.client().zrange(keys.TIMERS, 0, -1)
        assert rows == []
        monkeypatch.setattr(timers, "_PARK", "error('the scheduler dies here')")
        with pytest.raises(Exception, match="dies here"):
            tick()
        monkeypatch.undo()
        assert timers.fire_due() == 1
        drain_all()

        assert farm.switched() == 1
        total = sum((ledger.audit(slot) for slot in slots.slots()), Account())
        assert (total.accepted, total.processed, total.closes) == (2, 2, True)

    def test_an_edit_elsewhere_leaves_the_timer_and_one_of_the_condition_resets_it(self, farm: Farm) -> None:
        farm.said(minutes_ago=4)
        tick()
        farm.chain.name = "renamed"
        editing.save(farm.chain)
        assert tick() == 0
        nodes = list(farm.chain.nodes.all())
        nodes[0].config = farm.leaf("5m")
        editing.save(farm.chain, nodes)
        assert tick() == 1
        assert sorted(due_in_seconds())[0] == pytest.approx(60, abs=2)
        let_time_pass(7)
        tick()

        assert redis.client().zcard(keys.TIMERS) == 1, "the timer of the old condition is gone"

    def test_a_chain_that_is_off_fires_nothing_and_on_again_looks_at_once(self, farm: Farm) -> None:
        farm.chain.enabled = False
        editing.save(farm.chain)
        assert tick() == 0
        farm.chain.enabled = True
        editing.save(farm.chain)
        assert tick() == 1
        farm.chain.enabled = False
        editing.save(farm.chain)
        let_time_pass(30)
        redis.client().zadd(keys.TIMERS, {redis.client().zrange(keys.TIMERS, 0, -1)[0]: 1})
        assert tick() == 0
        assert redis.client().zcard(keys.TIMERS) == 0

    def test_timers_come_back_when_redis_was_emptied(self, farm: Farm) -> None:
        farm.said(minutes_ago=4)
        tick()
        redis.client().flushdb()
        farm.said(minutes_ago=4)
        assert tick() == 1
        assert due_in_seconds()[0] == pytest.approx(6 * 60, abs=2)

    def test_while_the_queue_takes_nothing_timers_wait(self, farm: Farm) -> None:
        name = keys.ledger("low", 0)
        redis.client().hset(name, "depth", 100_000)
        per_process.forget_all()
        assert tick() == 0
        redis.client().delete(name)
        per_process.forget_all()

        assert tick() == 1

    def test_a_device_that_stands_long_enough_runs_its_chain_without_a_report(self, farm: Farm) -> None:
        pump = builders.device(farm.organization)
        stands = {**builders.leaf(pump, "power", "==", "on"), "for": "5m"}
        nodes = [
            builders.node("stands", stands, next="lamp"),
            builders.node("lamp", builders.command(farm.lamp, "off")),
        ]
        chain = builders.chain(farm.organization, nodes, "pump runs too long")
        farm.chain.enabled = False
        editing.save(farm.chain)
        at_us = events.microseconds(datetime.now(UTC) - timedelta(minutes=2))
        latest.remember({("device", str(pump.uuid), "power"): latest.Latest("on", at_us)})
        tick()
        assert farm.switched() == 0
        let_time_pass(3.01)
        at_us -= 181_000_000
        redis.client().delete(keys.latest("device", str(pump.uuid)))
        latest.remember({("device", str(pump.uuid), "power"): latest.Latest("on", at_us)})
        tick()

        assert farm.switched() == 1
        assert StateChange.objects.get(state__device=farm.lamp).actor == f"{chain.name} / lamp"

    @pytest.mark.parametrize("who", ["rule", "person"])
    def test_a_device_that_a_rule_or_a_person_switched_is_looked_at_without_a_report(
        self, farm: Farm, who: str
    ) -> None:
        """A pump that no sensor reports about any more is switched off all the same."""
        pump = builders.device(farm.organization)
        state = DeviceState.objects.get(device=pump)
        stands = {**builders.leaf(pump, "power", "valueOlderThan", "on"), "duration": "15m"}
        nodes = [builders.node("stands", stands, next="off"), builders.node("off", builders.command(pump, "off"))]
        builders.chain(farm.organization, nodes, "pump off in time")
        farm.chain.enabled = False
        editing.save(farm.chain)
        assert tick() == 1, "it is looked at once when it is new"
        if who == "rule":
            starting = builders.switching_chain(farm.sensor, pump)
            farm.said(minutes_ago=0, value=5)
            schedules.trigger(starting, protocol="http")
            drain_all()
        else:
            states.change_by_person(state, "on", user=builders.user())
        state.refresh_from_db()
        assert state.value == "on"
        assert tick() == 1
        assert due_in_seconds() == [pytest.approx(900, abs=30)]

    @pytest.mark.parametrize("how", ["crash", "Redis away"])
    def test_a_switch_that_was_not_published_is_seen_by_rules_after_the_sweep(
        self, farm: Farm, how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pump = builders.device(farm.organization)
        state = DeviceState.objects.get(device=pump)
        stands = {**builders.leaf(pump, "power", "valueOlderThan", "on"), "duration": "15m"}
        nodes = [builders.node("stands", stands, next="off"), builders.node("off", builders.command(pump, "off"))]
        builders.chain(farm.organization, nodes, "pump off in time")
        tick()
        key = ("device", str(pump.uuid), "power")
        latest.remember({key: latest.Latest("off", 1)})
        tick()
        redis.client().delete(keys.TIMERS)

        def away(*_: object, **__: object) -> None:
            raise ConnectionError("Redis is away")

        with monkeypatch.context() as patch:
            if how == "crash":
                patch.setattr(states, "publish", lambda changes: None)
            else:
                patch.setattr(latest, "remember", away)
            states.change_by_person(state, "on", user=builders.user())
        assert (latest.recall([key])[key].value, Unpublished.objects.count()) == ("off", 1)

        assert states.sweep(datetime.now(UTC) + timedelta(seconds=10)) == 1
        assert latest.recall([key])[key].value == "on"
        assert not Unpublished.objects.exists()
        timers.fire_due()
        drain_all()
        assert pytest.approx(900, abs=30) in due_in_seconds()

    def test_while_redis_is_away_the_sweep_leaves_changes_untold(
        self, farm: Farm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(*_: object, **__: object) -> None:
            raise ConnectionError("Redis is away")

        monkeypatch.setattr(latest, "remember", away)
        states.change_by_person(DeviceState.objects.get(device=farm.lamp), "on", user=builders.user())
        with pytest.raises(ConnectionError):
            states.sweep(datetime.now(UTC) + timedelta(seconds=10))
        assert Unpublished.objects.count() == 1

    def test_the_scheduler_fires_timers(self) -> None:
        assert timers.fire_due in PERIODIC_TASKS


def reading(farm: Farm) -> events.Event:
    now = events.microseconds(datetime.now(UTC))
    return events.Event(
        id=str(uuid4()),
        type=events.EventType.TELEMETRY_DATA,
        priority=5,
        source_type="sensor",
        originator_uuid=str(farm.sensor.uuid),
        organization_id=farm.organization.pk,
        values={"ph": 6.0},
        timestamp_us=now,
        received_us=now,
        protocol="http",
    )


MAKE_FARM = """
import json
from devices.models import Organization
from tests import builders
farm = Organization.objects.first()
sensor, lamp = builders.sensor(farm), builders.device(farm)
leaf = {**builders.leaf(sensor, operator="olderThan"), "duration": "3s"}
del leaf["value"]
nodes = [builders.node("silent", leaf, next="lamp", on_false="dark")]
nodes += [builders.node("lamp", builders.command(lamp)), builders.node("dark", builders.command(lamp, "off"))]
builders.chain(farm, nodes, "silence")
print(json.dumps({"token": builders.token(sensor), "lamp": str(lamp.uuid)}))
"""


def test_a_sensor_that_stops_sending_to_the_running_system_lights_the_lamp(tmp_path: Path) -> None:
    with local_system(tmp_path, LOG_LEVEL="WARNING") as system:
        made = json.loads(system.manage("shell", "--verbosity", "0", "-c", MAKE_FARM).stdout)
        system.start("web", "worker", "scheduler")
        session = requests.Session()
        login = session.post(f"{system.web}/api/v1/auth/login", json=system.farm["admin"], timeout=10).json()
        session.headers["Authorization"] = f"Bearer {login['access']}"

        def lamp() -> list[tuple[str, str]]:
            found = session.get(
                f"{system.web}/api/v1/state-changes", params={"device": made["lamp"]}, timeout=10
            ).json()
            return [(row["value"], row["source"]) for row in reversed(found["results"])]

        def until(value: str, count: int) -> None:
            deadline = time.monotonic() + 30
            while [row for row, _ in lamp()].count(value) < count:
                assert time.monotonic() < deadline, lamp()
                time.sleep(0.2)

        until("on", 1)
        headers = {"Authorization": f"Bearer {made['token']}"}
        requests.post(f"{system.web}/api/v1/telemetry", json={"values": {"ph": 6}}, headers=headers, timeout=10)
        until("off", 1)
        until("on", 2)
        time.sleep(3)

        assert lamp() == [("on", "rule"), ("off", "rule"), ("on", "rule")]
