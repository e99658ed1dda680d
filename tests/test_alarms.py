"""Alarms in the database: one open for each, whoever raises it; told once; calmed down, decided about, deleted in time."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import count
from threading import Barrier, Event
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import IntegrityError, connection, transaction
from django.db.models import QuerySet
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from aemos.lib import keys, metrics, redis
from aemos.management.commands.runscheduler import PERIODIC_TASKS
from devices.models import Organization, Sensor
from notifications import messages, outbox
from notifications.models import Notification, Unpublished
from rules import events, retention
from rules.effects import alarms
from rules.effects.alarm_lifecycle import Clear, Raise
from rules.models import ActionCooldown, Alarm
from tests import builders

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
_numbers = count(1)


@pytest.fixture
def organization() -> Organization:
    return builders.organization()


@pytest.fixture
def sensor(organization: Organization) -> Sensor:
    return builders.sensor(organization, "Reservoir A")


def about(sensor: Sensor, ago: float, **fields: Any) -> dict[str, Any]:
    taken = timezone.now() - timedelta(seconds=ago)
    return {
        "effect_key": f"effect {next(_numbers)}", "organization_id": sensor.organization_id, "source_type": "sensor",
        "originator_uuid": str(sensor.uuid), "type": "high", "timestamp_us": events.microseconds(taken),
        "actor": "pH / alarm",
    } | fields  # fmt: skip


def up(sensor: Sensor, ago: float = 0.0, severity: str = "warning", **fields: Any) -> Raise:
    return Raise(**about(sensor, ago, **fields), severity=severity, message="pH is 6.9", node="alarm")


def down(sensor: Sensor, ago: float = 0.0) -> Clear:
    return Clear(**about(sensor, ago))


def apply(*requests: Raise | Clear) -> None:
    """What a worker does, from the transaction to the telling."""
    with transaction.atomic():
        outgoing = alarms.apply(requests)
    alarms.publish(outgoing)


def told() -> list[str]:
    entries = redis.client().xrange(keys.NOTIFICATIONS)
    return [messages.decode(fields[b"m"]).payload["change"] for _, fields in entries]


def states() -> list[str]:
    return [row.state for row in Alarm.objects.order_by("raised_at")]


def flap(sensor: Sensor, settings: Any, since: float = 100.0) -> Alarm:
    """Raises and clears it until it is flapping, and leaves it open."""
    for number in range(settings.ALARM_FLAPPING_TIMES):
        apply(up(sensor, since - 2 * number), down(sensor, since - 2 * number - 1))
    apply(up(sensor, since - 2 * settings.ALARM_FLAPPING_TIMES))
    return Alarm.objects.latest("id")


def test_many_alarms_of_one_batch_are_written_and_told_together(sensor: Sensor, organization: Organization) -> None:
    others = [builders.sensor(organization) for _ in range(20)]
    with CaptureQueriesContext(connection) as first:
        apply(*(up(each, ago) for each in [sensor, *others] for ago in (3, 2, 1)))
    with CaptureQueriesContext(connection) as again:
        apply(*(up(each) for each in [sensor, *others]))

    assert (len(told()), states(), Alarm.objects.first().times_raised) == (21, ["active"] * 21, 4)  # type: ignore[union-attr]
    touched = [
        [q["sql"].split()[0] for q in done.captured_queries if "rules_alarm" in q["sql"]] for done in (first, again)
    ]
    assert touched == [["SELECT", "INSERT", "SELECT"], ["SELECT", "UPDATE"]]


def test_changes_that_are_told_are_counted(sensor: Sensor) -> None:
    def counted(change: str) -> float:
        metrics.COUNTERS.flush()
        return float(redis.client().hget(keys.METRICS, f"alarm_changes_total|{change}") or 0)

    before = counted("raised"), counted("cleared")
    apply(up(sensor, 3), up(sensor, 2), down(sensor, 1))
    assert (counted("raised") - before[0], counted("cleared") - before[1]) == (1, 1)


def test_what_a_batch_does_to_one_alarm_is_done_in_order(sensor: Sensor) -> None:
    apply(up(sensor, 9))
    apply(down(sensor, 8), up(sensor, 7), up(sensor, 6, "critical"), down(sensor, 5), up(sensor, 4))

    assert states() == ["cleared", "cleared", "active"]
    assert told() == ["raised", "cleared", "raised", "severity-raised", "cleared", "raised"]


def test_a_request_that_comes_twice_changes_and_tells_nothing_more(sensor: Sensor) -> None:
    requests: list[Raise | Clear] = [up(sensor, 3), down(sensor, 2), up(sensor, 1, "critical")]
    apply(*requests)
    apply(*requests)

    assert states() == ["cleared", "active"]
    assert told() == ["raised", "cleared", "raised"]
    assert Notification.objects.count() == 3


def test_a_late_reading_does_not_raise_what_was_cleared_long_before_the_batch(sensor: Sensor) -> None:
    apply(up(sensor, 5_000), down(sensor, 4_000))
    apply(up(sensor, 4_500))
    assert states() == ["cleared"]


def test_a_reading_before_a_persons_decision_does_not_raise_with_a_clock_ahead(sensor: Sensor, settings: Any) -> None:
    settings.ALARM_FLAPPING_SECONDS = 1
    request = up(sensor, ago=-240)
    apply(request)
    alarms.clear(Alarm.objects.all(), by="olga")
    apply(request)
    assert states() == ["cleared"]


def test_alarms_of_other_types_sensors_and_organizations_are_others(sensor: Sensor) -> None:
    other = builders.sensor(builders.organization())
    apply(up(sensor, 2), up(sensor, 2, type="low"), up(other, 2), up(other, 2, type="low"))
    apply(down(sensor, 1))

    assert list(Alarm.objects.filter(state="cleared").values_list("type", "originator_uuid")) == [("high", sensor.uuid)]
    assert Alarm.objects.filter(state="active").count() == 3


def test_the_database_takes_no_second_open_alarm(sensor: Sensor) -> None:
    apply(up(sensor))
    twin = Alarm.objects.get()
    twin.pk, twin.uuid, twin._state.adding = None, uuid4(), True
    with pytest.raises(IntegrityError):
        twin.save()


def test_a_device_s_alarm_is_told_to_those_who_watch_the_device(organization: Organization) -> None:
    device = builders.device(organization, "Doser")
    apply(up(builders.sensor(organization), source_type="device", originator_uuid=str(device.uuid)))

    notification = Notification.objects.get()
    assert (notification.event, notification.device, notification.priority) == ("alert", device, 4)
    assert notification.payload["originatorName"] == "Doser"


def meanwhile(sensor: Sensor, first: Raise, second: Raise) -> None:
    """Two transactions raise at once: the second inserts before the first has committed."""
    inserted, going_on = Event(), Barrier(2)

    def one() -> None:
        try:
            with transaction.atomic():
                outgoing = alarms.apply([first])
                inserted.set()
                going_on.wait(timeout=30)
                # The other waits by now, or soon: either way it must come to the same.
                with connection.cursor() as cursor:
                    cursor.execute("SELECT pg_sleep(0.3)")
            alarms.publish(outgoing)
        finally:
            connection.close()

    def another() -> None:
        try:
            inserted.wait(timeout=30)
            going_on.wait(timeout=30)
            apply(second)
        finally:
            connection.close()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(one), pool.submit(another)]:
            future.result(timeout=60)


def test_two_transactions_that_raise_the_same_alarm_at_once_leave_one(sensor: Sensor) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("the test database of SQLite is in memory, where threads do not wait for one another")
    meanwhile(sensor, up(sensor, 2), up(sensor, 1))

    assert (Alarm.objects.get().times_raised, told()) == (2, ["raised"])


def test_who_comes_second_with_a_higher_severity_raises_that_of_the_first(sensor: Sensor) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("the test database of SQLite is in memory, where threads do not wait for one another")
    meanwhile(sensor, up(sensor, 2), up(sensor, 1, "critical"))

    assert (Alarm.objects.get().severity, told()) == ("critical", ["raised", "severity-raised"])


def test_an_insert_that_another_transaction_came_before_with_is_worked_off_anew(
    sensor: Sensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above on every database: the other's row appears between the reading and the insert."""
    real = alarms._rows_of

    def rows_of(requests: Any, terms: Any) -> Any:
        found = real(requests, terms)
        if not Alarm.objects.exists():
            monkeypatch.setattr(alarms, "_rows_of", real)
            apply(up(sensor, 5))
        return found

    monkeypatch.setattr(alarms, "_rows_of", rows_of)
    apply(up(sensor, 4), down(sensor, 3), up(sensor, 2))

    assert states() == ["cleared", "active"]
    assert told() == ["raised", "cleared", "raised"]


def test_an_alarm_that_can_never_be_stored_is_an_error_and_not_a_loop(
    sensor: Sensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(up(sensor))
    monkeypatch.setattr(alarms, "_rows_of", lambda *_: defaultdict(list))  # as if every time another one came before
    with pytest.raises(RuntimeError, match=f"alarms cannot be stored: 'high' of {sensor.uuid}"):
        apply(up(sensor), up(sensor, type="low"))
    assert (Alarm.objects.count(), told()) == (1, ["raised"])


def test_a_crash_between_commit_and_telling_is_made_good_by_the_sweep(sensor: Sensor) -> None:
    with transaction.atomic():
        alarms.apply([up(sensor)])
    Unpublished.objects.update(written_at=timezone.now() - timedelta(minutes=1))
    assert told() == []

    outbox.sweep()
    assert told() == ["raised"]


def test_a_flapping_alarm_is_told_once_and_again_when_it_has_calmed_down(sensor: Sensor, settings: Any) -> None:
    alarm = flap(sensor, settings)
    apply(down(sensor, 5), up(sensor, 4), down(sensor, 3), up(sensor, 2))
    assert (alarm.is_flapping, told()[-1], Alarm.objects.count()) == (
        True,
        "flapping",
        settings.ALARM_FLAPPING_TIMES + 1,
    )
    assert alarms.end_flapping() == 0, "it came a moment ago"

    Alarm.objects.filter(pk=alarm.pk).update(
        raised_at=timezone.now() - timedelta(seconds=settings.ALARM_FLAPPING_SECONDS)
    )
    before = len(told())
    assert (alarms.end_flapping(), alarms.end_flapping()) == (1, 0)
    alarm.refresh_from_db()
    assert (alarm.is_flapping, alarm.state, told()[before:]) == (False, "active", ["raised"])


def test_a_flapping_alarm_that_went_is_told_as_cleared_when_it_has_calmed_down(sensor: Sensor, settings: Any) -> None:
    alarm = flap(sensor, settings)
    apply(down(sensor, 5))
    before = len(told())
    long_ago = timezone.now() - timedelta(seconds=settings.ALARM_FLAPPING_SECONDS)
    Alarm.objects.filter(pk=alarm.pk).update(cleared_at=long_ago)

    assert alarms.end_flapping() == 1
    assert told()[before:] == ["cleared"]
    assert Notification.objects.latest("id").payload["by"] == "pH / alarm"


def test_calming_down_is_a_duty_of_the_scheduler_that_costs_one_query() -> None:
    assert alarms.end_flapping in PERIODIC_TASKS
    with CaptureQueriesContext(connection) as asked:
        alarms.end_flapping()
    assert len(asked) == 1


def mine(alarm: Alarm) -> QuerySet[Alarm]:
    return Alarm.objects.filter(pk=alarm.pk)


def test_a_person_acknowledges_once_and_clears_once(sensor: Sensor) -> None:
    apply(up(sensor))
    alarm = Alarm.objects.get()

    assert (alarms.acknowledge(mine(alarm), by="olga"), alarms.acknowledge(mine(alarm), by="ivan")) == (1, 0)
    alarm.refresh_from_db()
    assert (alarm.state, alarm.acknowledged_by) == ("acknowledged", "olga")
    assert (alarms.clear(mine(alarm), by="ivan"), alarms.clear(mine(alarm), by="olga")) == (1, 0)
    assert alarms.acknowledge(mine(alarm), by="olga") == 0
    alarm.refresh_from_db()
    assert (alarm.state, alarm.cleared_by, alarm.acknowledged_by) == ("cleared", "ivan", "olga")
    assert told() == ["raised", "acknowledged", "cleared"]


def test_any_number_of_alarms_is_decided_about_in_chunks(
    organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "CHUNK_ROWS", 2)
    apply(*(up(builders.sensor(organization)) for _ in range(5)))

    assert alarms.acknowledge(Alarm.objects.all(), by="olga") == 5
    assert states() == ["acknowledged"] * 5
    assert told() == ["raised"] * 5 + ["acknowledged"] * 5


def test_a_suspended_chain_has_an_alarm_until_it_runs_again(organization: Organization, sensor: Sensor) -> None:
    chain = builders.switching_chain(sensor, builders.device(organization), name="pH down")
    assert alarms.clear_for_chain(chain, by="olga") is False

    raised = alarms.raise_for_chain(chain, "It failed 10 times in a row: " + "x" * 600)
    again = alarms.raise_for_chain(chain, "It failed again.")

    assert raised is not None
    assert (raised.source_type, raised.originator_uuid, raised.severity, raised.chain) == (
        "chain", chain.uuid, "critical", chain,
    )  # fmt: skip
    assert (raised.type, len(raised.message)) == ("rule chain suspended", 500)
    assert again == raised
    assert Notification.objects.get().payload["originatorName"] == "pH down"
    assert alarms.clear_for_chain(chain, by="olga") is True
    assert alarms.clear_for_chain(chain, by="olga") is False
    assert told() == ["raised", "cleared"]


def test_an_alarm_of_a_transaction_that_is_rolled_back_is_never_told(sensor: Sensor) -> None:
    chain = builders.switching_chain(sensor, builders.device(sensor.organization))
    with transaction.atomic():
        alarms.raise_for_chain(chain, "x")
        transaction.set_rollback(True)
    assert (Alarm.objects.count(), Notification.objects.count(), told()) == (0, 0, [])


def test_names_of_originators_are_looked_up_together(sensor: Sensor) -> None:
    chain = builders.switching_chain(sensor, builders.device(sensor.organization), name="pH down")
    apply(up(sensor), up(sensor, source_type="chain", originator_uuid=str(chain.uuid)))
    apply(up(sensor, originator_uuid=str(UUID(int=7))))
    rows = list(Alarm.objects.order_by("id"))

    alarms.name_originators(rows)
    assert sorted(row.originator_name for row in rows) == ["", "Reservoir A", "pH down"]


def test_cleared_alarms_and_forgotten_cooldowns_are_deleted_in_time(sensor: Sensor, settings: Any) -> None:
    settings.ALARM_RETENTION_DAYS = 7

    def ago(days: float) -> datetime:
        return timezone.now() - timedelta(days=days)

    for kind in ("old", "young", "open"):
        apply(up(sensor, 3, type=kind))
    Alarm.objects.filter(type="old").update(state="cleared", cleared_at=ago(7.1))
    Alarm.objects.filter(type="young").update(state="cleared", cleared_at=ago(6.9))
    Alarm.objects.filter(type="open").update(raised_at=ago(900))
    chain = builders.switching_chain(sensor, builders.device(sensor.organization))
    for node, days in (("a", 366.1), ("b", 365.9)):
        ActionCooldown.objects.create(chain=chain, node=node, originator_uuid=sensor.uuid, done_at=ago(days))

    assert retention.delete_expired() == 2
    assert set(Alarm.objects.values_list("type", flat=True)) == {"young", "open"}
    assert list(ActionCooldown.objects.values_list("node", flat=True)) == ["b"]
