"""Upkeep of notifications: publish again what the stream has lost, expire what is too late, delete what is too old."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django.db.models import Q, QuerySet
from django.utils import timezone
from redis.exceptions import ResponseError

from aemos.lib import keys, metrics, redis
from aemos.lib.retention import delete_in_chunks
from notifications import messages, outbox
from notifications.messages import Protocol
from notifications.models import Delivery, Notification

log = logging.getLogger(__name__)
EVERY_SECONDS = 10
CHUNK_ROWS = 1_000
CHUNKS_PER_TURN = 5
# Before, a gateway may still have the message; it also covers clocks that differ.
LOST_AGE = timedelta(seconds=60)
# By then a gateway has noted that the broker has the message.
NOTED_AGE = timedelta(seconds=5)


def expire_and_republish(now: datetime | None = None) -> int:
    """Looks at most every ten seconds; returns how many were published again or expired. Raises RedisError."""
    if not redis.client().set(keys.UPKEEP_LOCK, "1", nx=True, ex=EVERY_SECONDS):
        return 0
    now = now or timezone.now()
    return publish_lost(now) + expire(now)


def publish_lost(now: datetime) -> int:
    """Publishes again, for the broker alone, what it did not get and what is not in the stream any more.

    The stream is lost with an emptied Redis, in part with one that was killed, or cut off when a broker was away for very
    long. Where the gateways have delivered all that it holds, whatever still waits is lost.
    """
    if not settings.MQTT_ENABLED:
        return 0
    waiting = Delivery.objects.filter(protocol=Protocol.MQTT, state=Delivery.State.PENDING)
    lost = Notification.objects.published().filter(deliveries__in=waiting)
    if _is_delivered_whole():
        lost = lost.filter(published_at__lt=now - NOTED_AGE)
    else:
        begin, end = _span_of_stream()
        # Also what Redis forgot at the end, when it came back with less than it had.
        lost = lost.filter(published_at__lt=min(begin, now - LOST_AGE)) | lost.filter(
            published_at__gt=end + LOST_AGE, published_at__lt=now - LOST_AGE
        )
    rows = outbox.oldest(_unexpired(lost, now=now))
    answered = outbox.note_answered(rows)
    rows = [row for row in rows if row.uuid not in answered]
    if rows:
        log.warning("%d notifications are not in the stream any more and are published again", len(rows))
    return outbox.publish_late(rows, protocols=(Protocol.MQTT,), again=True)


def _unexpired(rows: QuerySet[Notification], *, now: datetime) -> QuerySet[Notification]:
    return rows.exclude(~Q(event=messages.DEVICE_STATE_CHANGE) & Q(expires_at__lte=now))


def _is_delivered_whole() -> bool:
    """Whether the gateways have handed all of the stream to the broker."""
    client = redis.client()
    try:
        stream: Any = client.xinfo_stream(keys.NOTIFICATIONS)
        groups: Any = client.xinfo_groups(keys.NOTIFICATIONS)
    except ResponseError as error:
        if "no such key" not in str(error):
            raise
        return False
    newest = _position(stream["last-generated-id"])
    # Further than the newest: Redis came back with what was read, and without what was written.
    return any(
        group["name"] == keys.NOTIFICATIONS_MQTT_GROUP.encode()
        and group["pending"] == 0
        and _position(group["last-delivered-id"]) >= newest
        for group in groups
    )


def _span_of_stream() -> tuple[datetime, datetime]:
    """When its oldest entry and the newest that it ever held were written; far in the future and the past without any."""
    try:
        information: Any = redis.client().xinfo_stream(keys.NOTIFICATIONS)
    except ResponseError as error:
        if "no such key" not in str(error):
            raise
        return datetime.max.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC) - LOST_AGE
    first = information["first-entry"]
    begin = _moment(first[0]) if first else datetime.max.replace(tzinfo=UTC)
    return begin, _moment(information["last-generated-id"])


def _moment(entry_id: bytes) -> datetime:
    return datetime.fromtimestamp(_position(entry_id)[0] / 1000, UTC)


def _position(entry_id: bytes) -> tuple[int, int]:
    """Milliseconds since 1970, and the number within them."""
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)


def expire(now: datetime) -> int:
    """Marks deliveries that are pending beyond their time, as with a protocol that no gateway serves; returns how many."""
    marked = 0
    for _ in range(CHUNKS_PER_TURN):
        overdue = Delivery.objects.filter(state=Delivery.State.PENDING, notification__expires_at__lte=now)
        found = dict(overdue.values_list("id", "protocol")[:CHUNK_ROWS])
        marked += Delivery.objects.filter(id__in=found, state=Delivery.State.PENDING).update(
            state=Delivery.State.EXPIRED, updated_at=now
        )
        for protocol in found.values():
            metrics.NOTIFICATIONS_SENT.labels(protocol, Delivery.State.EXPIRED.value).inc()
        if len(found) < CHUNK_ROWS:
            break
    if marked:
        log.warning("%d deliveries have expired before a gateway could make them", marked)
    return marked


def delete_old() -> int:
    """Deletes notifications that are too old with their deliveries, at most once an hour; returns how many. Raises RedisError."""
    oldest = timezone.now() - timedelta(days=settings.NOTIFICATION_RETENTION_DAYS)
    old = Notification.objects.filter(published_at__lt=oldest)
    return delete_in_chunks([old], done_key=keys.NOTIFICATION_RETENTION_LOCK)
