"""The outbox: messages in, rows in the caller's transaction, then entries of the notification stream after its commit.

A crash between commit and publication leaves rows without `published_at`; `sweep` publishes those. Publishing twice is
harmless: clients know a message by its id.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db.models import Prefetch
from django.utils import timezone
from redis.exceptions import RedisError

from aemos.lib import keys, redis
from notifications import messages
from notifications.messages import Message, Protocol
from notifications.models import Delivery, Notification

log = logging.getLogger(__name__)
# Younger rows may still be published by the process that wrote them.
SWEEP_AGE = timedelta(seconds=2)
SWEEP_BATCH = 500


def write(outgoing: Sequence[tuple[Message, int, int | None]]) -> list[Message]:
    """Writes (message, organization id, device id) rows in the current transaction; gives the messages that are new.

    Call `publish` with the result after the commit.
    """
    if not outgoing:
        return []
    known = set(
        Notification.objects.filter(effect_key__in=[message.effect_key for message, *_ in outgoing]).values_list(
            "effect_key", flat=True
        )
    )
    fresh = [entry for entry in outgoing if entry[0].effect_key not in known]
    rows = Notification.objects.bulk_create([_row(*entry) for entry in fresh])
    Delivery.objects.bulk_create(
        Delivery(notification=row, protocol=protocol)
        for row, (message, *_) in zip(rows, fresh, strict=True)
        for protocol in message.protocols
    )
    return [message for message, *_ in fresh]


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
    )


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
    with redis.client().pipeline(transaction=False) as pipeline:
        for message in outgoing:
            add_to(pipeline, message)
        pipeline.execute()


def add_to(pipeline: Any, message: Message) -> None:
    """Adds the message's XADD to a pipeline that the caller executes."""
    entry = {"m": messages.encode(message)}
    pipeline.xadd(keys.NOTIFICATIONS, entry, maxlen=settings.NOTIFICATION_STREAM_LENGTH, approximate=True)


def sweep(now: datetime | None = None) -> int:
    """Publishes what a crash or an absent Redis left behind, oldest first; returns how many."""
    due = (now or timezone.now()) - SWEEP_AGE
    rows = (
        Notification.objects.filter(published_at=None, created_at__lt=due)
        .select_related("organization", "device")
        .prefetch_related(Prefetch("deliveries", Delivery.objects.only("protocol", "notification_id")))
        .order_by("id")[:SWEEP_BATCH]
    )
    left_behind = [message_of(row, tuple(Protocol(each.protocol) for each in row.deliveries.all())) for row in rows]
    publish(left_behind)
    return len(left_behind)


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
    )
