"""The outbox: messages in, rows in the caller's transaction, then entries of the notification stream after its commit.

A crash between commit and publication leaves rows without `published_at`; `sweep` publishes those. Publishing twice is
harmless, because clients know a message by its id; publishing late is not, because a device must not go back to a state
that was changed since. So what is late and superseded is not told to the broker any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from django.conf import settings
from django.db import transaction
from django.db.models import Max, Q, QuerySet
from django.utils import timezone
from redis.exceptions import RedisError

from aemos.lib import keys, redis
from notifications import messages, topics
from notifications.messages import Message, Protocol
from notifications.models import Delivery, Notification

log = logging.getLogger(__name__)
# Younger rows may still be published by the process that wrote them.
SWEEP_AGE = timedelta(seconds=2)
SWEEP_BATCH = 500
# Somebody who selects more is asked to do it in parts.
RESEND_MAXIMUM = 500


def write(outgoing: Sequence[tuple[Message, int, int | None]]) -> list[Message]:
    """Writes (message, organization id, device id) rows in the current transaction; gives the messages that are new.

    Call `publish` with the result after the commit.
    """
    if not outgoing:
        return []
    # Two workers may do the same effect at once. The database lets one of them in, and neither may fail over it.
    Notification.objects.bulk_create([_row(*entry) for entry in outgoing], ignore_conflicts=True)
    ids = _ids_of([message.id for message, *_ in outgoing])
    fresh = [message for message, *_ in outgoing if message.id in ids]
    Delivery.objects.bulk_create(
        Delivery(notification_id=ids[message.id], protocol=protocol)
        for message in fresh
        for protocol in message.protocols
    )
    return fresh


def _ids_of(uuids: Sequence[UUID]) -> dict[UUID, int]:
    return dict(Notification.objects.filter(uuid__in=uuids).values_list("uuid", "pk"))


def _row(message: Message, organization_id: int, device_id: int | None) -> Notification:
    return Notification(
        uuid=message.id,
        effect_key=message.effect_key,
        organization_id=organization_id,
        device_id=device_id,
        event=message.event,
        priority=message.priority,
        payload=message.payload,
        timestamp=datetime.fromisoformat(message.timestamp),
        expires_at=datetime.fromtimestamp(_expiry(message, time.time()), UTC),
    )


def _expiry(message: Message, now: float) -> float:
    """When it comes too late, in epoch seconds: that of a new message is counted from now."""
    return message.expires_at if message.expires_at is not None else now + _lifetime(message.event)


def _lifetime(event: str) -> float:
    is_command = event == messages.DEVICE_STATE_CHANGE
    return settings.COMMAND_EXPIRY_SECONDS if is_command else settings.NOTIFICATION_EXPIRY_SECONDS


def publish(outgoing: Sequence[Message]) -> None:
    """Puts committed messages on the stream. When Redis is away they stay in the outbox, and the sweep publishes them."""
    if not outgoing:
        return
    try:
        append_to_stream(outgoing)
    except RedisError as error:
        log.warning("%d notifications wait in the outbox: %s", len(outgoing), redis.explain(error))
        return
    Notification.objects.filter(uuid__in=[message.id for message in outgoing]).update(published_at=timezone.now())


def append_to_stream(outgoing: Sequence[Message]) -> None:
    """Raises RedisError; then some of them may be on the stream."""
    with redis.client().pipeline(transaction=False) as pipeline:
        for message in outgoing:
            add_to(pipeline, message)
        pipeline.execute()


def add_to(pipeline: Any, message: Message) -> None:
    """Adds the message's XADD to a pipeline that the caller executes."""
    entry = {"m": messages.encode(msgspec.structs.replace(message, expires_at=_expiry(message, time.time())))}
    pipeline.xadd(keys.NOTIFICATIONS, entry, maxlen=settings.NOTIFICATION_STREAM_LENGTH, approximate=True)


def sweep(now: datetime | None = None, *, first: Callable[[Sequence[Notification]], None] = lambda _rows: None) -> int:
    """Publishes what a crash or an absent Redis left behind, oldest first; returns how many.

    `first` is given these rows before; when it raises, they stay.
    """
    now = now or timezone.now()
    due = Notification.objects.filter(published_at=None, created_at__lt=now - SWEEP_AGE)
    rows = oldest(unexpired(due, now=now))
    first(rows)
    return publish_late(rows)


def oldest(rows: QuerySet[Notification]) -> list[Notification]:
    """As many as are published in one go."""
    return list(rows.select_related("organization", "device").order_by("id")[:SWEEP_BATCH])


def unexpired(rows: QuerySet[Notification], *, now: datetime) -> QuerySet[Notification]:
    return rows.exclude(~Q(event=messages.DEVICE_STATE_CHANGE) & Q(expires_at__lte=now))


def publish_late(rows: Sequence[Notification], *, protocols: Collection[Protocol] = tuple(Protocol)) -> int:
    """Publishes rows, oldest first, to those of the protocols whose delivery is pending; returns how many."""
    superseded = _superseded(rows)
    for_broker = Delivery.objects.filter(protocol=Protocol.MQTT, state=Delivery.State.PENDING)
    for_broker.filter(notification__in=superseded).update(
        state=Delivery.State.EXPIRED,
        last_error="superseded by a newer change of the same state",
        updated_at=timezone.now(),
    )
    pending = _pending_protocols(rows, protocols)
    publish([message_of(row, pending.get(row.pk, ())) for row in rows])
    return len(rows)


def _superseded(rows: Sequence[Notification]) -> list[int]:
    """The ids of those state changes after which a newer one of the same state was made, and is not among them.

    Also one that is not noted as published: it may be on the stream all the same. A report is no wish and supersedes nothing.
    """
    changes = [row for row in rows if row.event == messages.DEVICE_STATE_CHANGE and row.device_id]
    if not changes:
        return []
    newer = Notification.objects.filter(
        event=messages.DEVICE_STATE_CHANGE,
        device_id__in={row.device_id for row in changes},
        id__gt=min(row.pk for row in changes),
        payload__source__in=topics.COMMANDING_SOURCES,
    ).exclude(id__in=[row.pk for row in changes])
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
    """Somebody wants the rows told again, now, on every protocol they were for; returns how many. At most RESEND_MAXIMUM.

    A state change that a newer one has superseded goes to people only: the device would go back to it.
    """
    rows = sorted(rows, key=lambda row: row.pk)[:RESEND_MAXIMUM]
    now = time.time()
    with transaction.atomic():
        Delivery.objects.filter(notification__in=rows).update(
            state=Delivery.State.PENDING, attempts=0, last_error="", updated_at=timezone.now()
        )
        for row in rows:
            row.expires_at = datetime.fromtimestamp(_lifetime(row.event) + now, UTC)
        Notification.objects.bulk_update(rows, ["expires_at"])
    return publish_late(rows)


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
