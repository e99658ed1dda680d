"""The outbox: rows with the effect, publication after it, and what crashes, lost streams and time do to both."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.utils import timezone

from aemos.lib import keys, redis
from devices import latest
from devices.models import DeviceState, StateChange
from notifications import messages, outbox, upkeep
from notifications.messages import DEVICE_STATE_CHANGE, Message, Protocol
from notifications.models import Delivery, Notification, Unpublished
from notifications.publisher import Entry, append
from rules.effects import states
from tests import builders
from tests.gateway_process import REPOSITORY, GatewayProcess, memory, new_message, operator, running

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
State = Delivery.State
LATER = timedelta(hours=2)


class Outbox:
    """An organization with a device, and what is told about them."""

    def __init__(self) -> None:
        self.device = builders.device(builders.organization())
        self.owner = self.device.organization

    def message(self, **fields: Any) -> Message:
        found: Message = new_message(str(self.owner.uuid), **fields)
        return found

    def change(self, value: str, *, state: str = "power", source: str = "rule", **fields: Any) -> Message:
        payload = {"stateName": state, "value": value, "source": source}
        return self.message(event=DEVICE_STATE_CHANGE, device=str(self.device.uuid), payload=payload, **fields)

    def write(self, *outgoing: Message) -> list[Message]:
        return outbox.write([(each, self.owner.pk, self.device.pk if each.device_uuid else None) for each in outgoing])

    def publish(self, *outgoing: Message) -> None:
        outbox.publish(self.write(*outgoing))


@pytest.fixture
def box() -> Outbox:
    return Outbox()


def stream() -> list[Message]:
    return [messages.decode(fields[b"m"]) for _, fields in redis.client().xrange(keys.NOTIFICATIONS)]


def row_of(message: Message) -> Notification:
    return Notification.objects.get(uuid=message.id)


def states_of(message: Message) -> dict[str, str]:
    return dict(Delivery.objects.filter(notification__uuid=message.id).values_list("protocol", "state"))


def made(message: Message, state: str, *protocols: Protocol) -> None:
    Delivery.objects.filter(notification__uuid=message.id, protocol__in=protocols or tuple(Protocol)).update(
        state=state
    )


def published_ago(message: Message, seconds: float) -> None:
    Notification.objects.filter(uuid=message.id).update(published_at=timezone.now() - timedelta(seconds=seconds))


def mark_unpublished() -> None:
    """As if no worker had come to note that all changes are on the stream."""
    rows = Notification.objects.select_related("device")
    Unpublished.objects.bulk_create(
        Unpublished(notification=row, uuid=row.uuid, changed_device=row.device.uuid if row.device else None)
        for row in rows
    )


def test_an_effect_key_is_written_once_and_only_the_new_is_given_back(box: Outbox) -> None:
    first, second = box.message(effect_key="a"), box.message(effect_key="b")
    assert box.write(first) == [first]
    assert box.write(box.message(effect_key="a"), second, box.message(effect_key="b")) == [second]
    assert set(Notification.objects.values_list("uuid", flat=True)) == {first.id, second.id}
    assert Delivery.objects.count() == 6


def test_writing_takes_few_queries_however_many(box: Outbox, django_assert_max_num_queries: Any) -> None:
    with transaction.atomic(), django_assert_max_num_queries(5):
        box.write(*(box.message() for _ in range(50)))


@pytest.mark.skipif("connection.vendor != 'postgresql'", reason="SQLite lets one transaction write at a time")
def test_two_workers_with_the_same_effect_at_once_write_it_once_and_neither_fails(box: Outbox) -> None:
    begun, results = threading.Barrier(2), []

    def work() -> None:
        with closing(connection), transaction.atomic():
            mine = [box.message(effect_key=f"effect {number}") for number in range(50)]
            begun.wait(5)
            results.append(len(box.write(*mine)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == [0, 50]
    assert (Notification.objects.count(), Delivery.objects.count()) == (50, 150)


def test_commands_expire_sooner_than_what_people_are_told(box: Outbox, settings: Any) -> None:
    settings.COMMAND_EXPIRY_SECONDS, settings.NOTIFICATION_EXPIRY_SECONDS = 60, 600
    box.publish(box.change("on"), box.message())
    command, alert = stream()
    assert command.expires_at is not None
    assert alert.expires_at is not None
    assert alert.expires_at - command.expires_at == pytest.approx(540, abs=5)
    for message in (command, alert):
        expires_at = row_of(message).expires_at
        assert expires_at is not None
        assert expires_at.timestamp() == pytest.approx(message.expires_at, abs=5)


def test_the_sweep_publishes_in_order_what_was_left_and_nothing_twice(box: Outbox) -> None:
    left = [box.change("on"), box.change("off"), box.message()]
    box.write(*left)
    assert outbox.sweep() == 0, "younger rows may still be published by who wrote them"
    now = timezone.now() + timedelta(seconds=10)
    assert (outbox.sweep(now), outbox.sweep(now)) == (3, 0)
    assert [each.id for each in stream()] == [each.id for each in left]
    assert stream()[0].protocols == tuple(Protocol)


def test_what_is_published_late_or_again_is_dated_anew_and_what_is_published_at_once_is_not(box: Outbox) -> None:
    """A client that was away asks for what was published since then."""
    late, prompt = box.message(), box.message()
    box.write(late)
    box.publish(prompt)
    published = row_of(prompt).published_at
    Unpublished.objects.update(written_at=timezone.now() - timedelta(seconds=10))
    published_ago(late, 10)
    outbox.sweep()
    assert row_of(prompt).published_at == published
    assert row_of(late).published_at >= published
    outbox.send_again([row_of(prompt)])
    assert row_of(prompt).published_at > row_of(late).published_at


def test_the_sweep_does_not_send_a_device_back_to_a_state_that_was_changed_since(box: Outbox) -> None:
    late, other, newer = box.change("on"), box.change("low", state="speed"), box.change("off")
    box.write(late, other)
    Unpublished.objects.update(written_at=timezone.now() - timedelta(seconds=10))
    box.publish(newer)
    outbox.sweep(timezone.now() + timedelta(seconds=10))
    assert [(each.id, Protocol.MQTT in each.protocols) for each in stream()] == [
        (newer.id, True),
        (late.id, False),
        (other.id, True),
    ]
    assert states_of(late) == {"socketio": "pending", "mqtt": "expired", "coap": "pending"}
    assert "superseded" in Delivery.objects.get(notification__uuid=late.id, protocol="mqtt").last_error


def test_a_change_that_is_on_the_stream_but_not_noted_as_published_supersedes(box: Outbox) -> None:
    late, newer = box.change("on"), box.change("off")
    box.write(late)
    append(map(Entry, box.write(newer)))
    outbox.sweep()
    Unpublished.objects.filter(uuid=late.id).update(written_at=timezone.now() - timedelta(seconds=10))
    outbox.sweep()
    assert states_of(late)["mqtt"] == "expired"
    told = [each.payload["value"] for each in stream() if Protocol.MQTT in each.protocols]
    assert told == ["off"]


def test_a_worker_that_publishes_late_keeps_the_order_of_the_decisions(
    box: Outbox,
) -> None:
    slow, quick = box.write(box.change("on")), box.write(box.change("off"))
    outbox.publish(quick)
    outbox.publish(slow)
    assert [each.id for each in stream()] == [slow[0].id, quick[0].id]
    assert all(each.protocols == tuple(Protocol) for each in stream()), "the device hears both"
    assert outbox.sweep(timezone.now() + timedelta(seconds=10)) == 0


def test_a_change_that_another_worker_published_and_did_not_note_is_not_told_twice(box: Outbox) -> None:
    slow, quick = box.write(box.change("on")), box.write(box.change("off"))
    outbox.publish(quick)
    mark_unpublished()
    outbox.publish(slow)
    assert [each.id for each in stream()] == [slow[0].id, quick[0].id]


def test_what_is_published_late_skips_the_device_once_a_newer_change_is_out(
    box: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer one is made just after the sweep has looked for it."""
    late = box.write(box.change("on"))
    newer = box.change("off")
    look = outbox._superseded

    def look_and_lose_time(rows: Any, **options: Any) -> list[int]:
        found = look(rows, **options)
        monkeypatch.setattr(outbox, "_superseded", look)
        box.publish(newer)
        return found

    Unpublished.objects.update(written_at=timezone.now() - timedelta(seconds=10))
    monkeypatch.setattr(outbox, "_superseded", look_and_lose_time)
    outbox.sweep()
    outbox.sweep(timezone.now() + timedelta(seconds=10))
    assert [each.id for each in stream() if Protocol.MQTT in each.protocols][-1] == newer.id
    assert late[0].id in {each.id for each in stream()}
    assert not Unpublished.objects.exists()


@pytest.mark.skipif("connection.vendor != 'postgresql'", reason="SQLite lets one transaction write at a time")
def test_changes_by_many_at_once_are_on_the_stream_once_and_in_their_order(
    box: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember, chance = latest.remember, random.Random(31)

    def lose_time(*found: Any) -> None:
        """Between the commit and the publication."""
        time.sleep(chance.uniform(0, 0.02))
        remember(*found)

    monkeypatch.setattr(latest, "remember", lose_time)
    state = DeviceState.objects.get(device=box.device, name="power")
    user = User.objects.create(username="keeper")
    begun = threading.Barrier(4)

    def work(value: str) -> None:
        with closing(connection):
            begun.wait(5)
            for _ in range(25):
                states.change_by_person(state, value, user=user)

    threads = [threading.Thread(target=work, args=(value,)) for value in ("on", "off", "on", "off")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    decided = StateChange.objects.order_by("id").values_list("uuid", flat=True)
    assert len(decided) == 100
    outbox.sweep(timezone.now() + timedelta(seconds=10))
    assert [each.id for each in stream()] == list(decided)


def test_what_a_device_reports_does_not_supersede_what_was_wished(box: Outbox) -> None:
    wish, report = box.change("on"), box.change("off", source="device")
    box.write(wish)
    box.publish(report)
    outbox.sweep(timezone.now() + timedelta(seconds=10))
    assert states_of(wish)["mqtt"] == "pending"
    assert [each.protocols for each in stream() if each.id == wish.id] == [tuple(Protocol)]


def test_the_sweep_leaves_what_has_expired_but_tells_states(box: Outbox) -> None:
    alert, change = box.message(expires_at=1.0), box.change("on", expires_at=1.0)
    box.write(alert, change)
    assert outbox.sweep(timezone.now() + timedelta(seconds=10)) == 1
    assert [each.id for each in stream()] == [change.id]


def test_what_an_emptied_redis_held_is_published_again_to_the_broker_alone(box: Outbox) -> None:
    waiting, done = box.message(), box.message()
    box.publish(waiting, done)
    made(done, State.ACKNOWLEDGED, Protocol.MQTT)
    redis.client().flushdb()
    assert upkeep.publish_lost(timezone.now()) == 0, "a gateway may have it in hand"
    for message in (waiting, done):
        published_ago(message, 120)
    assert upkeep.publish_lost(timezone.now()) == 1
    (again,) = stream()
    assert (again.id, again.protocols) == (waiting.id, (Protocol.MQTT,))
    assert upkeep.publish_lost(timezone.now()) == 0


@pytest.mark.parametrize("answer", ["acknowledged", "applied", "failed"])
def test_a_command_that_its_device_has_answered_is_not_published_again(box: Outbox, answer: str) -> None:
    """A gateway that died, or a backup, may know of the answer and not of the delivery."""
    answered, waiting = box.change("on"), box.change("off")
    box.publish(answered, waiting)
    state = DeviceState.objects.get(device=box.device)
    StateChange.objects.create(
        uuid=answered.id, effect_key="answered", state=state, source="rule", actor="x", timestamp=timezone.now(),
        command_state=answer,
    )  # fmt: skip
    redis.client().flushdb()
    for message in (answered, waiting):
        published_ago(message, 120)
    assert upkeep.publish_lost(timezone.now()) == 1
    assert [each.id for each in stream()] == [waiting.id]
    assert states_of(answered)[Protocol.MQTT] == State.ACKNOWLEDGED


def test_what_redis_lost_in_mid_stream_is_published_again_once_gateways_idle(
    box: Outbox,
) -> None:
    lost, later = box.message(), box.message()
    box.publish(lost, later)
    entries = redis.client().xrange(keys.NOTIFICATIONS)
    redis.client().xdel(keys.NOTIFICATIONS, entries[0][0])
    made(later, State.ACKNOWLEDGED, Protocol.MQTT)
    redis.client().xgroup_create(keys.NOTIFICATIONS, keys.NOTIFICATIONS_MQTT_GROUP, id="0-0")
    soon = timezone.now() + timedelta(seconds=10)
    assert upkeep.publish_lost(soon) == 0, "a gateway is still to read what follows"
    taken = redis.client().xreadgroup(keys.NOTIFICATIONS_MQTT_GROUP, "gateway", {keys.NOTIFICATIONS: ">"})
    assert upkeep.publish_lost(soon) == 0, "nor has it finished"
    redis.client().xack(keys.NOTIFICATIONS, keys.NOTIFICATIONS_MQTT_GROUP, *(entry for entry, _ in taken[0][1]))
    assert upkeep.publish_lost(timezone.now()) == 0, "it may still be noting what the broker has"
    assert upkeep.publish_lost(soon) == 1
    assert [message.id for message in stream()] == [later.id, lost.id]


def test_what_redis_lost_at_its_end_is_published_again_although_the_group_is_further(box: Outbox) -> None:
    kept, lost = box.message(), box.message()
    box.publish(kept, lost)
    made(kept, State.ACKNOWLEDGED, Protocol.MQTT)
    (kept_id, kept_fields), (lost_id, _) = redis.client().xrange(keys.NOTIFICATIONS)
    redis.client().delete(keys.NOTIFICATIONS)
    redis.client().xadd(keys.NOTIFICATIONS, kept_fields, id=kept_id)
    redis.client().xgroup_create(keys.NOTIFICATIONS, keys.NOTIFICATIONS_MQTT_GROUP, id=lost_id)
    assert upkeep.publish_lost(timezone.now()) == 0, "a gateway may still be noting what the broker has"
    assert upkeep.publish_lost(timezone.now() + timedelta(seconds=10)) == 1
    assert [message.id for message in stream()] == [kept.id, lost.id]


def test_what_is_still_in_the_stream_is_not_published_again(box: Outbox) -> None:
    message = box.message()
    box.publish(message)
    assert upkeep.publish_lost(timezone.now() + timedelta(seconds=30)) == 0
    published_ago(message, -1)  # a clock that is a little ahead of Redis
    assert upkeep.publish_lost(timezone.now() + timedelta(seconds=300)) == 0


def test_what_redis_forgot_at_its_end_is_published_again(box: Outbox) -> None:
    message = box.message()
    redis.client().xadd(keys.NOTIFICATIONS, {"m": b"old"}, id=f"{int(timezone.now().timestamp() - 3_600) * 1000}-0")
    box.write(message)
    Unpublished.objects.all().delete()
    published_ago(message, 120)
    assert upkeep.publish_lost(timezone.now()) == 1


def test_a_lost_command_that_was_superseded_is_not_sent_again(box: Outbox) -> None:
    old, new = box.change("on"), box.change("off")
    box.publish(old, new)
    made(new, State.ACKNOWLEDGED, Protocol.MQTT)
    redis.client().flushdb()
    published_ago(old, 120)
    published_ago(new, 120)
    upkeep.publish_lost(timezone.now())
    assert all(Protocol.MQTT not in each.protocols for each in stream())
    assert states_of(old)["mqtt"] == "expired"


def test_of_lost_commands_the_newest_alone_is_sent_again(box: Outbox) -> None:
    """The device may have obeyed all but the first: a gateway notes what it has delivered a moment later."""
    lost, obeyed, other = box.change("on"), box.change("off"), box.change("low", state="speed")
    box.publish(lost, obeyed, other)
    redis.client().flushdb()
    for each in (lost, obeyed, other):
        published_ago(each, 120)
    upkeep.publish_lost(timezone.now())
    assert [each.id for each in stream() if Protocol.MQTT in each.protocols] == [obeyed.id, other.id]
    assert states_of(lost)["mqtt"] == "expired"


def test_without_a_broker_nothing_is_published_for_it_again(box: Outbox, settings: Any) -> None:
    settings.MQTT_ENABLED = False
    box.publish(box.message())
    redis.client().flushdb()
    assert upkeep.publish_lost(timezone.now() + LATER) == 0


def test_deliveries_that_nobody_made_in_time_expire_and_others_stay(box: Outbox) -> None:
    late, fresh = box.message(expires_at=1.0), box.message()
    box.publish(late, fresh)
    made(late, State.SENT, Protocol.SOCKETIO)
    assert upkeep.expire(timezone.now()) == 2
    assert states_of(late) == {"socketio": "sent", "mqtt": "expired", "coap": "expired"}
    assert set(states_of(fresh).values()) == {"pending"}


def test_overdue_deliveries_are_looked_for_every_ten_seconds_by_one_scheduler(box: Outbox) -> None:
    box.publish(box.message(expires_at=1.0))
    assert upkeep.expire_and_republish() == 3
    box.publish(box.message(expires_at=1.0))
    assert upkeep.expire_and_republish() == 0
    assert 0 < redis.client().ttl(keys.UPKEEP_LOCK) <= 10


def test_sending_again_renews_the_deadline_and_is_told_as_the_same_message(box: Outbox) -> None:
    message = box.message(expires_at=1.0)
    box.publish(message)
    made(message, State.FAILED)
    assert outbox.send_again([row_of(message)]) == 1
    first, again = stream()
    assert (again.id, again.effect_key) == (first.id, first.effect_key)
    assert not messages.has_expired(again, timezone.now().timestamp())
    assert set(states_of(message).values()) == {"pending"}


def test_an_old_command_is_sent_again_to_people_but_not_to_the_device(box: Outbox) -> None:
    old, new = box.change("on"), box.change("off")
    box.publish(old, new)
    outbox.send_again([row_of(old)])
    assert stream()[-1].protocols == (Protocol.SOCKETIO, Protocol.COAP)


def test_history_is_kept_as_long_as_is_set_and_goes_with_its_deliveries(box: Outbox, settings: Any) -> None:
    settings.NOTIFICATION_RETENTION_DAYS = 7
    old, young = box.message(), box.message()
    box.publish(old, young)
    published_ago(old, 8 * 86_400)
    assert upkeep.delete_old() == 1
    assert [row.uuid for row in Notification.objects.all()] == [young.id]
    assert Delivery.objects.count() == 3
    published_ago(young, 8 * 86_400)
    assert upkeep.delete_old() == 0, "once an hour is enough"


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[GatewayProcess]:
    command = [sys.executable, str(REPOSITORY / "manage.py"), "runscheduler"]
    process = GatewayProcess(command, tmp_path / "scheduler")
    yield process
    process.kill()


def test_a_kill_between_commit_and_publication_delays_by_under_ten_seconds(
    tmp_path: Path, scheduler: GatewayProcess
) -> None:
    farm = operator().ask("seed")
    with running(tmp_path / "log", memory("mqtt"), memory("socketio")) as gateway:
        assert operator().ask("switch_and_die", device=farm["device"]) == -signal.SIGKILL
        # Its own message alone: the scheduler also publishes what the operator's earlier tests left lost.
        (message,) = operator().ask("deliveries_of_device", device=farm["device"])["mqtt"]
        gateway.wait_for(lambda: message in gateway.delivered("mqtt"), seconds=10)
        gateway.wait_for(lambda: message in gateway.delivered("socketio"))
    assert [gateway.delivered(protocol).count(message) for protocol in ("mqtt", "socketio")] == [1, 1]
    assert isinstance(scheduler.child, subprocess.Popen)
