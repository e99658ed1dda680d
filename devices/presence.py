"""Which devices are connected: update Device rows in bulk from what devices, or the broker for them, report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from uuid import UUID

from django.db.models import Q
from django.utils import timezone

from aemos.lib.batched import batched
from devices.models import Device

STATEMENT_ROWS = 500


def record(said: Mapping[UUID, bool]) -> list[Device]:
    """Device uuid -> whether it is connected, noted in the current transaction; gives the devices for which that is new.

    The rows are locked, so that of two gateways that hear the same, one finds it new. What is no device is passed over.
    """
    now = timezone.now()
    rows = Device.objects.select_for_update(of=("self",)).filter(uuid__in=list(said)).order_by("pk")
    found = list(rows.select_related("organization"))
    changed = [row for row in found if row.connected is not said[row.uuid]]
    for row in changed:
        row.connected, row.connection_changed_at = said[row.uuid], now
    Device.objects.bulk_update(changed, ["connected", "connection_changed_at"])
    return changed


def note_seen(uuids: Collection[UUID], *, at: datetime) -> None:
    """The devices spoke. A last will is not speaking: the broker says it for a device that is gone."""
    for batch in batched(list(uuids), STATEMENT_ROWS):
        rows = Device.objects.filter(uuid__in=batch)
        rows.filter(Q(last_seen_at=None) | Q(last_seen_at__lt=at)).update(last_seen_at=at)
