"""What the database still knows of the past: organizations and a time in, published messages or device states out, in slices.

The notification stream is short and may be lost with Redis; the table keeps messages for NOTIFICATION_RETENTION_DAYS.
A message's stream position is its publication in milliseconds of Redis' clock, and its row holds the publisher's, written
a moment later. The two agree within CLOCKS_AGREE_SECONDS; whoever goes from one to the other steps back by so much.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django.db.models import Q
from django.utils import timezone

from devices.models import DeviceState
from notifications.messages import Message, Protocol
from notifications.models import Notification
from notifications.outbox import message_of

CLOCKS_AGREE_SECONDS = 10.0
SLICE = 100
STATES_SLICE = 500


@dataclass(slots=True, kw_only=True)
class Published:
    """Messages of a protocol in the order of their publication, from `since` up to `until` (None: to the newest)."""

    protocol: Protocol
    since: datetime
    until: datetime | None = None
    _last: tuple[datetime, int] | None = None

    def slice(self, organizations: Collection[str]) -> list[tuple[datetime, Message]]:
        """The next at most 100 messages of these organizations (uuids) with their publication; empty after the last."""
        after = Q(published_at__gte=self.since)
        if self._last is not None:
            moment, row_id = self._last
            after = Q(published_at__gt=moment) | Q(published_at=moment, id__gt=row_id)
        rows = (
            Notification.objects.published()
            .filter(after, organization__uuid__in=organizations, deliveries__protocol=self.protocol)
            .filter(Q() if self.until is None else Q(published_at__lte=self.until))
            .select_related("organization", "device")
            .order_by("published_at", "id")[:SLICE]
        )
        found = [(row.published_at, row.pk, message_of(row, (self.protocol,))) for row in rows]
        if found:
            self._last = found[-1][:2]
        return [(moment, message) for moment, _, message in found]


@dataclass(slots=True, kw_only=True)
class States:
    """The states of the devices of organizations, or of single devices, as they are now; uuids."""

    organizations: Collection[str]
    devices: Collection[str]
    _last: int = 0

    def slice(self) -> list[dict[str, Any]]:
        """The next at most 500 states, JSON-ready; empty after the last."""
        seen = Q(device__organization__uuid__in=self.organizations) | Q(device__uuid__in=self.devices)
        rows = DeviceState.objects.filter(seen, pk__gt=self._last).select_related("device__organization")
        found = list(rows.order_by("pk")[:STATES_SLICE])
        if found:
            self._last = found[-1].pk
        return [_state(row) for row in found]


def moment_of(position: str) -> datetime | None:
    """When the message at a stream position was published; None when that is in the future or no time at all."""
    seconds = int(position.partition("-")[0]) / 1000
    if seconds > timezone.now().timestamp() + CLOCKS_AGREE_SECONDS:
        return None
    return datetime.fromtimestamp(seconds, UTC)


def position_at(moment: datetime) -> str:
    """The stream position that all messages published before `moment` have passed, even if their clocks were late."""
    milliseconds = int((moment.timestamp() - CLOCKS_AGREE_SECONDS) * 1000)
    return f"{max(milliseconds, 0)}-0"


def is_kept(moment: datetime) -> bool:
    """Whether everything that was published from then on is still in the table."""
    kept = timedelta(days=settings.NOTIFICATION_RETENTION_DAYS) - timedelta(seconds=CLOCKS_AGREE_SECONDS)
    return moment >= timezone.now() - kept


def margin() -> timedelta:
    return timedelta(seconds=CLOCKS_AGREE_SECONDS)


def _state(row: DeviceState) -> dict[str, Any]:
    return {
        "organization": str(row.device.organization.uuid),
        "device": str(row.device.uuid),
        "deviceName": row.device.name,
        "stateName": row.name,
        "value": row.value,
        "changedAt": row.changed_at.isoformat() if row.changed_at else None,
    }
