"""Schedules: a chain runs at its times, each of them once, whoever dies meanwhile and whatever the clocks do."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.core.exceptions import ValidationError
from django.utils import timezone
from redis import Redis

from aemos.lib import keys, per_process, redis
from aemos.management.commands.runscheduler import PERIODIC_TASKS
from deploy.local import LocalSystem, local_system
from deploy.processes import Process, kill, spawn
from deploy.programs import REPOSITORY
from deploy.servers import free_port
from devices import catalogue, latest
from devices.models import DeviceState, StateChange
from rules import events, jobs
from rules.admission import control, replay
from rules.authoring import editing
from rules.engine.cron import Schedule
from rules.engine.exceptions import InvalidChain
from rules.journal import slots, writing
from rules.journal.ledger import Account, audit
from rules.models import DeadLetter, RejectedEvent, Replay, RuleChain
from rules.processing import index, schedules
from tests import builders
from tests.test_drain import make_due
from tests.waiting import until
from tests.worker import drain_all, ledger

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
SIX = datetime(2026, 5, 1, 6, tzinfo=UTC)
NEW_YORK, BERLIN = "America/New_York", "Europe/Berlin"


class Farm:
    """One pump that is switched on while the latest known pH is below 5.5."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization)
        self.pump = builders.device(self.organization, "Pump")
        self.power = DeviceState.objects.get(device=self.pump)
        key = ("sensor", str(self.sensor.uuid), "ph")
        latest.remember({key: latest.Latest(5.0, 1)})

    def chain(self, cron: str = "0 6 * * *", *, due: datetime | None = SIX, **fields: Any) -> RuleChain:
        told = {"execution_type": RuleChain.ExecutionType.SCHEDULE_ONLY, "cron": cron, **fields}
        row = builders.switching_chain(self.sensor, self.pump, **told)
        if due:
            RuleChain.objects.filter(pk=row.pk).update(next_run_at=due)
            row.refresh_from_db()
        return row

    def state(self) -> Any:
        self.power.refresh_from_db()
        return self.power.value

    def set_state(self, value: str) -> None:
        DeviceState.objects.filter(pk=self.power.pk).update(value=value)


@pytest.fixture
def farm() -> Farm:
    return Farm()


def fire(now: datetime) -> int:
    return schedules.shared().fire(now)


def local_times(cron: str, zone: str, start: str, number: int) -> list[str]:
    """The next times on the clock on the wall; `start` is on that clock, too."""
    schedule, moment = Schedule(cron, zone), datetime.fromisoformat(start).replace(tzinfo=ZoneInfo(zone))
    found = []
    for _ in range(number):
        following = schedule.next_after(moment)
        assert following is not None
        moment = following
        found.append(moment.astimezone(ZoneInfo(zone)).strftime("%m-%d %H:%M %z"))
    return found


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        # Clocks go from 2 to 3 in Berlin on 29 March and in New York on 8 March: a fixed time that is left out comes at 3.
        ("30 2 * * *", BERLIN, "2026-03-28T12:00", ["03-29 03:00 +0200", "03-30 02:30 +0200"]),
        ("30 2 * * *", NEW_YORK, "2026-03-07T12:00", ["03-08 03:00 -0400", "03-09 02:30 -0400"]),
        # Two times that are left out are one at 3, not two.
        ("0,30 2 * * *", BERLIN, "2026-03-28T12:00", ["03-29 03:00 +0200", "03-30 02:00 +0200"]),
        # What repeats all day goes by the time that passes: 20 minutes stay 20 minutes.
        ("*/20 * * * *", NEW_YORK, "2026-03-08T01:30", ["03-08 01:40 -0500", "03-08 03:00 -0400"]),
        # They go from 3 to 2 in Berlin on 25 October, from 2 to 1 in New York on 1 November: a fixed time comes once.
        ("30 2 * * *", BERLIN, "2026-10-24T12:00", ["10-25 02:30 +0200", "10-26 02:30 +0100"]),
        ("30 1 * * *", NEW_YORK, "2026-10-31T12:00", ["11-01 01:30 -0400", "11-02 01:30 -0500"]),
        ("0 * * * *", NEW_YORK, "2026-11-01T00:30", ["11-01 01:00 -0400", "11-01 01:00 -0500", "11-01 02:00 -0500"]),
        ("*/30 * * * *", BERLIN, "2026-10-25T01:50", ["10-25 02:00 +0200", "10-25 02:30 +0200", "10-25 02:00 +0100"]),
        ("0 6 * * *", BERLIN, "2026-10-24T12:00", ["10-25 06:00 +0100", "10-26 06:00 +0100"]),
    ],
)
def test_times_on_the_days_when_clocks_are_moved(cron: str, zone: str, start: str, expected: list[str]) -> None:
    assert local_times(cron, zone, start, len(expected)) == expected


def test_a_fixed_time_does_not_come_again_within_the_hour_that_is_there_twice() -> None:
    second_half_past_one = datetime(2026, 11, 1, 1, 10, fold=1, tzinfo=ZoneInfo(NEW_YORK))
    following = Schedule("30 1 * * *", NEW_YORK).next_after(second_half_past_one)

    assert following == datetime(2026, 11, 2, 6, 30, tzinfo=UTC)


@pytest.mark.parametrize("cron", ["* * * * *", "*/7 3-5 * * *", "0 6 * * 1", "30 2 29 2 *"])
@pytest.mark.parametrize("zone", [BERLIN, NEW_YORK, "UTC", "Asia/Kathmandu"])
def test_the_latest_time_is_the_last_of_those_that_follow_one_another(cron: str, zone: str) -> None:
    now = datetime(2026, 3, 30, 12, 34, 56, tzinfo=UTC)
    since = now - timedelta(days=3)
    moment, expected = since, since
    while (following := Schedule(cron, zone).next_after(moment)) and following <= now:
        moment = expected = following

    assert Schedule(cron, zone).latest_until(now, since=since) == expected


def test_the_latest_of_five_years_of_minutes_is_found_at_once() -> None:
    now = datetime(2026, 3, 30, 12, 34, 56, tzinfo=UTC)

    assert Schedule("* * * * *", BERLIN).latest_until(now, since=now - timedelta(days=1_826)) == now.replace(second=0)


@pytest.mark.parametrize(
    ("fields", "named", "text"),
    [
        ({"cron": "6 o'clock"}, "cron", "must have five fields"),
        ({"cron": ""}, "cron", "must have five fields"),
        ({"cron": "0 0 6 * * *"}, "cron", "must have five fields"),
        ({"cron": "61 6 * * *"}, "cron", "the field minute cannot be read"),
        ({"cron": "0 6 * * FUN"}, "cron", "the field day-of-week cannot be read"),
        ({"cron": "0 6 30 2 *"}, "cron", "the field day-of-month cannot be read"),
        ({"timezone": "Mars/Olympus"}, "timezone", "must be a time zone by its name"),
        ({"timezone": "../../etc/passwd"}, "timezone", "must be a time zone by its name"),
        ({"execution_type": "event-triggered"}, "cron", "is for scheduled chains"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused_on_its_field(
    farm: Farm, fields: dict[str, str], named: str, text: str
) -> None:
    told = {"execution_type": "hybrid", "cron": "0 6 * * *", **fields}
    with pytest.raises(ValidationError) as refused:
        RuleChain(organization=farm.organization, name="c", **told).clean()
    with pytest.raises(InvalidChain) as also:
        farm.chain(due=None, **told)

    assert [name for name, texts in refused.value.message_dict.items() if text in texts[0]] == [named]
    assert [problem.path for problem in also.value.problems if text in problem.message] == [named]


def test_saving_plans_the_next_run_and_only_of_a_chain_that_runs(farm: Farm) -> None:
    chain = farm.chain("0 6 * * *", timezone=BERLIN, due=None)
    planned = chain.next_run_at
    assert planned is not None
    assert planned > timezone.now()
    assert (planned.astimezone(ZoneInfo(BERLIN)).hour, planned.minute) == (6, 0)

    chain.enabled = False
    editing.save(chain)
    assert chain.next_run_at is None
    chain.enabled = True
    RuleChain.objects.filter(pk=chain.pk).update(suspended_at=timezone.now())
    editing.save(chain)
    assert chain.next_run_at is None
    editing.save(chain, lift=True)
    assert chain.next_run_at == planned
    RuleChain.objects.update(suspended_at=SIX, next_run_at=SIX)
    editing.switch(chain, enabled=True, by="a person")
    assert chain.next_run_at == planned, "what was missed while it was suspended is not made up for"
    chain.execution_type, chain.cron = RuleChain.ExecutionType.EVENT_TRIGGERED, ""
    editing.save(chain)
    assert chain.next_run_at is None


def test_renaming_a_chain_that_is_due_loses_neither_time_nor_statistics(farm: Farm) -> None:
    chain = farm.chain()
    RuleChain.objects.filter(pk=chain.pk).update(last_run_at=SIX - timedelta(days=1))
    chain.name = "Renamed"
    editing.save(chain)
    chain.refresh_from_db()

    assert (chain.next_run_at, chain.last_run_at) == (SIX, SIX - timedelta(days=1))
    chain.cron = "0 7 * * *"
    editing.save(chain)
    assert chain.next_run_at is not None
    assert chain.next_run_at > timezone.now()


def test_a_chain_that_is_due_runs_on_what_is_known_and_moves_on(farm: Farm) -> None:
    chain = farm.chain()
    assert fire(SIX - timedelta(seconds=1)) == 0
    assert fire(SIX) == 1
    chain.refresh_from_db()
    assert chain.next_run_at == SIX + timedelta(days=1)
    assert chain.last_run_at is None
    assert fire(SIX + timedelta(seconds=1)) == 0

    drain_all()
    chain.refresh_from_db()
    assert farm.state() == "on"
    assert StateChange.objects.get().timestamp == SIX
    assert chain.last_run_at == SIX
    assert ledger() == Account(accepted=1, processed=1)


def test_the_event_is_urgent_and_its_id_follows_from_chain_and_time(farm: Farm) -> None:
    chain = farm.chain()
    fire(SIX)
    slot = next(slot for slot in slots.slots() if audit(slot).waiting)

    assert (slot.lane, slot.partition) == ("critical", slots.partition_of(str(chain.uuid)))
    RuleChain.objects.update(next_run_at=SIX)
    fire(SIX + timedelta(seconds=5))
    entries = redis.client().xrange(keys.events(slot.lane, slot.partition))
    first, second = (events.decode_entry(fields[b"b"])[0] for _, fields in entries)
    assert first.id == second.id
    assert (first.type, first.priority, first.protocol) == ("scheduled", 1, "scheduler")
    assert (first.source_type, first.originator_uuid, first.values) == ("chain", str(chain.uuid), {})


def test_a_crash_between_journal_and_next_time_does_not_run_it_twice(farm: Farm, monkeypatch: Any) -> None:
    farm.chain()

    def crash(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(schedules, "_move", crash)
        with pytest.raises(KeyboardInterrupt):
            fire(SIX)
    drain_all()
    assert farm.state() == "on"
    farm.set_state("off")  # somebody switches it off; the second event must not switch it on again
    assert fire(SIX + timedelta(seconds=7)) == 1
    drain_all()

    assert farm.state() == "off"
    assert StateChange.objects.count() == 1
    assert ledger() == Account(accepted=2, processed=1, duplicate=1)


def test_two_schedulers_that_both_fire_make_one_run(farm: Farm) -> None:
    chain = farm.chain()
    one, other = schedules.Firing(), schedules.Firing()
    assert one.fire(SIX) == 1
    RuleChain.objects.filter(pk=chain.pk).update(next_run_at=SIX)
    assert other.fire(SIX) == 1
    drain_all()

    assert ledger() == Account(accepted=2, processed=1, duplicate=1)


def test_a_change_of_the_schedule_wins_over_the_scheduler_that_moves_on(farm: Farm, monkeypatch: Any) -> None:
    chain = farm.chain()
    append = writing.append

    def change_meanwhile(batches: Any) -> Any:
        RuleChain.objects.filter(pk=chain.pk).update(next_run_at=SIX + timedelta(hours=3))
        return append(batches)

    monkeypatch.setattr(writing, "append", change_meanwhile)
    fire(SIX)
    chain.refresh_from_db()

    assert chain.next_run_at == SIX + timedelta(hours=3)


@pytest.mark.parametrize(
    ("policy", "late", "runs"),
    [
        ("once", timedelta(days=3, hours=2), [SIX + timedelta(days=3)]),
        ("once", timedelta(seconds=30), [SIX]),
        ("skip", timedelta(seconds=60), [SIX]),
        ("skip", timedelta(seconds=61), []),
        ("skip", timedelta(days=3, seconds=5), [SIX + timedelta(days=3)]),
    ],
)
def test_times_that_were_missed_follow_the_policy(
    farm: Farm, policy: str, late: timedelta, runs: list[datetime]
) -> None:
    chain = farm.chain(missed_runs=policy)
    fire(SIX + late)
    drain_all()
    chain.refresh_from_db()

    assert [change.timestamp for change in StateChange.objects.all()] == runs
    assert chain.next_run_at == SIX + timedelta(days=late.days + 1)


def test_while_redis_is_away_a_chain_stays_due(farm: Farm, settings: Any) -> None:
    chain, port = farm.chain(), settings.REDIS_PORT
    settings.REDIS_PORT = free_port()
    per_process.forget_all()
    try:
        assert fire(SIX) == 0
    finally:
        settings.REDIS_PORT = port
        per_process.forget_all()
    chain.refresh_from_db()
    assert chain.next_run_at == SIX
    assert RejectedEvent.objects.count() == 0
    assert fire(SIX + timedelta(seconds=40)) == 1
    drain_all()

    assert farm.state() == "on"


@contextmanager
def full_queue() -> Iterator[None]:
    """More events wait than the critical lane's hard cap allows."""
    name = keys.ledger("low", 0)
    redis.client().hset(name, "depth", 100_000)
    per_process.forget_all()
    yield
    redis.client().delete(name)
    per_process.forget_all()


def test_a_full_queue_holds_a_run_back_and_gives_it_up_only_on_the_record(farm: Farm) -> None:
    chain = farm.chain(missed_runs="skip")
    with full_queue():
        assert fire(SIX) == fire(SIX + timedelta(seconds=59)) == 0
        chain.refresh_from_db()
        assert chain.next_run_at == SIX
        assert RejectedEvent.objects.count() == 0
        fire(SIX + timedelta(seconds=61))
    chain.refresh_from_db()

    rejected = RejectedEvent.objects.get()
    assert (rejected.reason, rejected.timestamp, rejected.source_type) == ("hard-limit", SIX, "chain")
    assert chain.next_run_at == SIX + timedelta(days=1)
    assert ledger() == Account()


def test_a_run_that_was_held_back_runs_when_there_is_room(farm: Farm) -> None:
    farm.chain()
    with full_queue():
        fire(SIX)
    assert fire(SIX + timedelta(seconds=5)) == 1
    assert RejectedEvent.objects.count() == 0


def test_chains_that_are_off_suspended_or_of_events_alone_are_not_fired(farm: Farm) -> None:
    for fields in ({"enabled": False}, {"suspended_at": SIX}):
        RuleChain.objects.filter(pk=farm.chain().pk).update(**fields)
    farm.chain(due=None, execution_type="event-triggered", cron="")

    assert fire(SIX + timedelta(days=1)) == 0


def test_a_schedule_only_chain_does_not_hear_events(farm: Farm) -> None:
    farm.chain()
    hybrid = farm.chain(execution_type="hybrid")
    index.shared().refresh(at_once=True)
    source = ("sensor", str(farm.sensor.uuid))
    heard = index.shared().triggered(source, ["ph"], organization_id=farm.organization.pk)

    assert [bound.uuid for bound in heard] == [str(hybrid.uuid)]


def test_a_chain_that_was_made_a_moment_ago_runs_although_the_index_is_older(farm: Farm) -> None:
    index.shared().refresh(at_once=True)
    farm.chain()
    fire(SIX)
    for slot in slots.slots():
        jobs.drain(slot.lane, slot.partition)

    assert farm.state() == "on"


def test_a_run_that_failed_is_tried_again_and_then_kept_for_people(farm: Farm) -> None:
    chain = farm.chain(max_retries=1)
    DeviceState.objects.filter(pk=farm.power.pk).delete()
    fire(SIX)
    drain_all()
    chain.refresh_from_db()
    assert chain.last_run_at is None, "it may be tried again"
    make_due()
    drain_all()

    letter = DeadLetter.objects.get()
    assert (letter.chain, letter.originator_uuid, letter.attempts) == (chain, chain.uuid, 2)
    assert ledger() == Account(accepted=1, dead=1)


def test_a_dead_run_is_replayed_although_the_schedule_has_moved_on(farm: Farm) -> None:
    chain = farm.chain(max_retries=0)
    DeviceState.objects.filter(pk=farm.power.pk).update(name="renamed")
    fire(SIX)
    drain_all()
    assert DeadLetter.objects.get().chain == chain
    RuleChain.objects.filter(pk=chain.pk).update(last_run_at=SIX + timedelta(days=1))
    DeviceState.objects.filter(pk=farm.power.pk).update(name="power")
    catalogue.mark_changed(farm.organization.pk)
    catalogue.shared().refresh(at_once=True)
    wanted = replay.ReplayRequest(
        kind=Replay.Kind.DEAD, criteria={}, organization=farm.organization, actor="ana", with_commands=True
    )
    uuid = str(replay.start(wanted).uuid)
    replay.step(uuid)
    drain_all()

    assert (farm.state(), ledger()) == ("on", Account(accepted=2, dead=1, processed=1))


def test_a_chain_deleted_after_its_time_came_leaves_the_queue_quietly(farm: Farm) -> None:
    chain = farm.chain()
    fire(SIX)
    editing.delete(chain)
    drain_all()

    assert ledger() == Account(accepted=1, processed=1)
    assert DeadLetter.objects.count() == 0


def test_one_query_when_nothing_is_due_and_few_when_many_are(
    farm: Farm, django_assert_num_queries: Callable[..., Any]
) -> None:
    for _ in range(20):
        farm.chain()
    control.shared().snapshot()
    with django_assert_num_queries(1):
        fire(SIX - timedelta(seconds=1))
    with django_assert_num_queries(2):
        assert fire(SIX) == 20


def test_the_scheduler_fires_what_is_due() -> None:
    assert schedules.fire_due in PERIODIC_TASKS


CHAINS = 60
SECONDS_BETWEEN = 0.1
MAKE_CHAINS = f"""
from devices import latest
from devices.models import Organization
from tests import builders
farm = Organization.objects.first()
sensor = builders.sensor(farm)
latest.remember({{("sensor", str(sensor.uuid), "ph"): latest.Latest(5.0, 1)}})
for _ in range({CHAINS}):
    builders.switching_chain(sensor, builders.device(farm), name=str(_), execution_type="schedule-only", cron="0 0 29 2 *")
"""


@pytest.mark.timeout(180)
def test_when_the_leading_scheduler_is_killed_no_time_is_missed_or_repeated(tmp_path: Path) -> None:
    with local_system(tmp_path, LOG_LEVEL="WARNING") as system:
        system.manage("shell", "--verbosity", "0", "-c", MAKE_CHAINS)
        system.start("scheduler", "worker")
        client = Redis(port=system.redis.port, password=system.redis.password)
        until(lambda: client.exists(keys.SCHEDULER_LEADER), seconds=30)
        standby = spawn(
            Process(
                name="standby", command=(sys.executable, "manage.py", "runscheduler"), environment=system.environment
            ),
            output=subprocess.DEVNULL,
            directory=REPOSITORY,
        )
        try:
            due = let_chains_come_due(system)
            until(lambda: len(rows(system, "next_run_at > '2027'")) > CHAINS // 4, seconds=30)
            system.kill("scheduler")
            until(lambda: len(rows(system, "last_run_at IS NOT NULL")) == CHAINS, seconds=60)
        finally:
            kill(standby)
            client.close()
        system.stop("worker")  # once it has finished what it had begun

        assert dict(rows(system, "last_run_at IS NOT NULL")) == due
        switched = query(system, "SELECT state_id, count(*) FROM devices_statechange GROUP BY state_id")
        assert [number for _, number in switched] == [1] * CHAINS
        ledger = json.loads(system.manage("ledger", "--json").stdout)
        assert ledger["closes"] is True, ledger
        assert ledger["lanes"]["total"]["processed"] == CHAINS, "a run that came twice has ended as a duplicate"


def let_chains_come_due(system: LocalSystem) -> dict[str, str]:
    """One after the other, from a second ahead on; gives the time of each, as SQLite has it."""
    start = timezone.now() + timedelta(seconds=1)
    due = {str(n): f"{start + timedelta(seconds=n * SECONDS_BETWEEN):%Y-%m-%d %H:%M:%S.%f}" for n in range(CHAINS)}
    with closing(sqlite3.connect(system.environment["DB_NAME"], timeout=20)) as database, database:
        database.executemany(
            "UPDATE rules_rulechain SET next_run_at = ? WHERE name = ?", [(time, name) for name, time in due.items()]
        )
    return due


def rows(system: LocalSystem, condition: str) -> list[Any]:
    return query(
        system,
        f"SELECT name, last_run_at FROM rules_rulechain WHERE execution_type = 'schedule-only' AND {condition}",
    )


def query(system: LocalSystem, statement: str) -> list[Any]:
    with closing(sqlite3.connect(system.environment["DB_NAME"], timeout=20)) as database:
        return database.execute(statement).fetchall()
