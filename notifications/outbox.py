"""The outbox: write messages as rows in the caller's transaction, and publish them after its commit.

A crash between commit and publication leaves rows marked as unpublished; `sweep` publishes those. Publishing twice is
harmless, because clients know a message by its id; publishing late is not, because a device must not go back to a state
that was changed since. So the changes of one state are published in their order, and what is late and superseded is not sent
to the broker any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import Max, Q, QuerySet
from django.utils import timezone
from redis.exceptions import RedisError

from aemos.lib import bulk, redis
from devices import row_locks
from devices.models import Device, Organization, StateChange
from notifications import messages
from notifications.messages import Message, Protocol
from notifications.models import Delivery, Notification, Unpublished
from notifications.publisher import Entry, append, expiry, lifetime, state_of

log = logging.getLogger(__name__)
# Younger rows may still be published by the process that wrote them.
SWEEP_AGE = timedelta(seconds=2)
SWEEP_BATCH = 500
# Somebody who selects more is asked to do it in parts.
RESEND_MAXIMUM = 500
_ANSWERED = [StateChange.CommandState.ACKNOWLEDGED, StateChange.CommandState.APPLIED, StateChange.CommandState.FAILED]


def write(outgoing: Sequence[tuple[Message, int, int | None]]) -> list[Message]:
    """Writes (message, organization id, device id) rows in the current transaction; gives the messages that are new.

    Call `publish` with the result after the commit. Raises devices.row_locks.Deleted when an organization or device is gone.
    """
    if not outgoing:
        return []
    now = time.time()
    row_locks.hold(Organization, {organization for _, organization, _ in outgoing})
    row_locks.hold(Device, {device for _, _, device in outgoing if device is not None})
    unique: dict[str, tuple[Message, int, int | None]] = {}
    for entry in outgoing:
        unique.setdefault(entry[0].effect_key, entry)
    # Two workers may do the same effect at once. The database lets one of them in, and neither may fail over it.
    written = bulk.insert(
        "notifications_notification",
        _NOTIFICATION,
        [_row(*entry, now=now) for entry in unique.values()],
        conflict="DO NOTHING",
        returning=("effect_key", "id"),
    )
    ids = dict(written)
    fresh = [message for message, *_ in unique.values() if message.effect_key in ids]
    pending = [
        (ids[message.effect_key], protocol, Delivery.State.PENDING, 0, "", _moment(now))
        for message in fresh
        for protocol in message.protocols
    ]
    bulk.insert("notifications_delivery", _DELIVERY, pending)
    bulk.insert("notifications_unpublished", _UNPUBLISHED, [_mark(ids[m.effect_key], m, now=now) for m in fresh])
    return fresh


_NOTIFICATION = {
    "uuid": "uuid",
    "effect_key": "text",
    "organization_id": "bigint",
    "device_id": "bigint",
    "event": "text",
    "priority": "bigint",
    "payload": "jsonb",
    "timestamp": "timestamptz",
    "created_at": "timestamptz",
    "published_at": "timestamptz",
    "expires_at": "timestamptz",
}
_DELIVERY = {
    "notification_id": "bigint",
    "protocol": "text",
    "state": "text",
    "attempts": "bigint",
    "last_error": "text",
    "updated_at": "timestamptz",
}
_UNPUBLISHED = {
    "notification_id": "bigint",
    "uuid": "uuid",
    "changed_device": "uuid",
    "written_at": "timestamptz",
    "expires_at": "timestamptz",
}


def _row(message: Message, organization_id: int, device_id: int | None, *, now: float) -> tuple[Any, ...]:
    return (
        message.id,
        message.effect_key,
        organization_id,
        device_id,
        message.event,
        message.priority,
        message.payload,
        datetime.fromisoformat(message.timestamp),
        _moment(now),
        _moment(now),
        _moment(expiry(message, now)),
    )


def _mark(number: int, message: Message, *, now: float) -> tuple[Any, ...]:
    """A change never expires here: devices converge on their states, however late (messages.has_expired)."""
    device = message.changed_device and UUID(message.changed_device)
    return number, message.id, device, _moment(now), None if device else _moment(expiry(message, now))


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def publish(outgoing: Sequence[Message]) -> None:
    """Puts committed messages on the stream. When Redis is away they stay in the outbox, and the sweep publishes them.

    Two workers that change one state, one after the other, may come here in the other order. So the one that publishes a change
    first publishes earlier changes that are not published yet, and leaves out what another worker has published by then.
    """
    entries = [*_unpublished(outgoing), *(Entry(message) for message in outgoing if not message.changed_device)]
    if entries:
        _put(entries)


def _unpublished(outgoing: Sequence[Message]) -> list[Entry]:
    """The changes among the messages, and those of the same devices that others are about to publish, as they were made."""
    mine = {message.id: message for message in outgoing if message.changed_device}
    if not mine:
        return []
    devices = {message.changed_device for message in mine.values()}
    unpublished = Unpublished.objects.filter(changed_device__in=devices)
    since = timezone.now() - SWEEP_AGE
    # What does not fit waits for the sweep, and so does what comes after it.
    maximum = SWEEP_BATCH + len(mine)
    ids = _ids(unpublished.filter(written_at__gte=since), maximum)
    if late := mine.keys() - {uuid for _, uuid in ids}:  # written longer ago, in a transaction that took its time
        ids = _ids(unpublished.filter(Q(written_at__gte=since) | Q(uuid__in=late)), maximum)
    others = _messages([pk for pk, uuid in ids if uuid not in mine])
    known = [(pk, mine.get(uuid) or others.get(pk)) for pk, uuid in ids]
    return [Entry(message, number, unless_above=number - 1) for number, message in known if message]


def _ids(rows: QuerySet[Unpublished], maximum: int) -> list[tuple[int, UUID]]:
    return list(rows.order_by("pk").values_list("pk", "uuid")[:maximum])


def _messages(ids: Sequence[int]) -> dict[int, Message]:
    """By id, those that are still there."""
    if not ids:
        return {}
    rows = oldest(Notification.objects.filter(pk__in=ids), maximum=len(ids))
    pending = _pending_protocols(rows, tuple(Protocol))
    return {row.pk: message_of(row, pending.get(row.pk, ())) for row in rows}


def _put(entries: Sequence[Entry]) -> None:
    """Appends the entries and notes those as published. What is left out is noted by who appended it, or is the sweep's."""
    try:
        appended = append(entries)
    except RedisError as error:
        log.warning("%d notifications wait in the outbox: %s", len(entries), redis.explain(error))
        return
    _note_published([entry.message.id for entry, done in zip(entries, appended, strict=True) if done])


def _note_published(uuids: Sequence[UUID]) -> None:
    unpublished, now = Unpublished.objects.filter(uuid__in=uuids), timezone.now()
    deleted, _ = unpublished.filter(written_at__gte=now - SWEEP_AGE).delete()
    if deleted < len(uuids):  # some are late, or published again: a client that was away finds them by this time
        Notification.objects.filter(uuid__in=uuids).update(published_at=now)
        unpublished.delete()


def sweep(now: datetime | None = None, *, first: Callable[[Sequence[Notification]], None] = lambda _rows: None) -> int:
    """Publishes what a crash or an absent Redis left behind, oldest first; returns how many.

    `first` is given these rows before; when it raises, they stay.
    """
    now = now or timezone.now()
    due = Unpublished.objects.filter(Q(expires_at=None) | Q(expires_at__gt=now), written_at__lt=now - SWEEP_AGE)
    rows = oldest(
        Notification.objects.filter(pk__in=list(due.order_by("pk").values_list("pk", flat=True)[:SWEEP_BATCH]))
    )
    first(rows)
    note_answered(rows)
    return publish_late(rows)


def note_answered(rows: Sequence[Notification]) -> set[UUID]:
    """The uuids of commands that their device has answered, whose delivery is noted now, if it was not before.

    Whoever writes of the answer may write before whoever writes of the delivery, and a crash or a backup may come in between. The
    device has such a command, and a dose must not be sent to it again.
    """
    uuids = [row.uuid for row in rows if row.event == messages.DEVICE_STATE_CHANGE]
    found = StateChange.objects.filter(uuid__in=uuids, command_state__in=_ANSWERED).values_list("uuid", flat=True)
    answered = set(found) if uuids else set()
    if answered:
        Delivery.objects.filter(
            notification__in=[row for row in rows if row.uuid in answered],
            protocol=Protocol.MQTT,
            state=Delivery.State.PENDING,
        ).update(state=Delivery.State.ACKNOWLEDGED, updated_at=timezone.now())
    return answered


def oldest(rows: QuerySet[Notification], *, maximum: int = SWEEP_BATCH) -> list[Notification]:
    """As many as are published in one go."""
    return list(rows.select_related("organization", "device").order_by("id")[:maximum])


def publish_late(
    rows: Sequence[Notification], *, protocols: Collection[Protocol] = tuple(Protocol), again: bool = False
) -> int:
    """Publishes rows, oldest first, to those of the protocols whose delivery is pending; returns how many.

    `again`: the rows were published before, and a device may have obeyed some of them by now. Then only the newest change of
    each state goes to the device: an older one could take it back.
    """
    superseded = _superseded(rows, by_each_other=again)
    for_broker = Delivery.objects.filter(protocol=Protocol.MQTT, state=Delivery.State.PENDING)
    for_broker.filter(notification__in=superseded).update(
        state=Delivery.State.EXPIRED,
        last_error="superseded by a newer change of the same state",
        updated_at=timezone.now(),
    )
    pending = _pending_protocols(rows, protocols)
    late = [(row.pk, message_of(row, pending.get(row.pk, ()))) for row in rows]
    newest = {state_of(message): number for number, message in late}
    _put(
        [
            Entry(message, number, unless_above=newest[state_of(message)])
            if message.changed_device and Protocol.MQTT in message.protocols
            else Entry(message)
            for number, message in late
        ]
    )
    return len(rows)


def _superseded(rows: Sequence[Notification], *, by_each_other: bool) -> list[int]:
    """The ids of those state changes after which a newer one of the same state was made; one of the rows counts `by_each_other`.

    Also one that is not noted as published: it may be on the stream all the same. A report is no wish and supersedes nothing.
    """
    changes = [row for row in rows if row.event == messages.DEVICE_STATE_CHANGE and row.device_id]
    if not changes:
        return []
    newer = Notification.objects.filter(
        event=messages.DEVICE_STATE_CHANGE,
        device_id__in={row.device_id for row in changes},
        id__gt=min(row.pk for row in changes),
        payload__source__in=messages.COMMANDING_SOURCES,
    )
    if not by_each_other:
        newer = newer.exclude(id__in=[row.pk for row in changes])
    counted = newer.order_by().values_list("device_id", "payload__stateName").annotate(Max("id"))
    newest = {(device_id, name): newest for device_id, name, newest in counted}
    return [row.pk for row in changes if newest.get((row.device_id, row.payload.get("stateName")), 0) > row.pk]


def _pending_protocols(
    rows: Sequence[Notification], protocols: Collection[Protocol]
) -> dict[int, tuple[Protocol, ...]]:
    found: dict[int, tuple[Protocol, ...]] = {}
    deliveries = Delivery.objects.filter(
        notification__in=rows, protocol__in=protocols, state=Delivery.State.PENDING
    ).order_by("id")
    for notification_id, protocol in deliveries.values_list("notification_id", "protocol"):
        found[notification_id] = (*found.get(notification_id, ()), Protocol(protocol))
    return found


def send_again(rows: Sequence[Notification]) -> int:
    """Sends the rows again, as somebody asks, on every protocol they were for; returns how many. At most RESEND_MAXIMUM.

    A state change that a newer one has superseded goes to people only: the device would go back to it.
    """
    rows = sorted(rows, key=lambda row: row.pk)[:RESEND_MAXIMUM]
    now = time.time()
    with transaction.atomic():
        Delivery.objects.filter(notification__in=rows).update(
            state=Delivery.State.PENDING, attempts=0, last_error="", updated_at=timezone.now()
        )
        for row in rows:
            row.expires_at = datetime.fromtimestamp(lifetime(row.event) + now, UTC)
        Notification.objects.bulk_update(rows, ["expires_at"])
    return publish_late(rows, again=True)


def message_of(row: Notification, protocols: tuple[Protocol, ...]) -> Message:
    """The message that the row was written for; organization and device are best fetched with it."""
    return Message(
        id=UUID(str(row.uuid)),
        effect_key=row.effect_key,
        organization_uuid=str(row.organization.uuid),
        device_uuid=str(row.device.uuid) if row.device else None,
        event=row.event,
        priority=row.priority,
        payload=row.payload,
        timestamp=row.timestamp.isoformat(),
        protocols=protocols,
        expires_at=row.expires_at.timestamp() if row.expires_at else None,
    )
