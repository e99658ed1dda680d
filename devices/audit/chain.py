"""Seal the entries of the audit log into a chain of hashes, and tell whether it was changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Exists, OuterRef, QuerySet
from django.utils import timezone

from aemos.lib import bulk
from devices.audit.models import AuditEntry, AuditHead
from devices.models import StateChange

# At once; what is left is sealed a second later.
AT_ONCE = 1_000
# A worker is stopped after a minute, and its transaction with it.
LONGEST_TRANSACTION = timedelta(minutes=5)
Record = Mapping[str, Any]


def seal() -> int:
    """Gives commands to devices their entries, then seals what is not sealed yet; how many. Called by the scheduler."""
    if not _has_news():
        return 0
    with transaction.atomic():
        AuditHead.objects.get_or_create(pk=1)
        head = AuditHead.objects.select_for_update().get(pk=1)
        _add_commands(head)
        entries = list(AuditEntry.objects.filter(position=None).order_by("id")[:AT_ONCE])
        for entry in entries:
            head.position += 1
            entry.position = head.position
            entry.hash = head.hash = digest(head.hash, as_record(entry))
        columns = {"id": "bigint", "position": "bigint", "hash": "text"}
        bulk.update("devices_auditentry", columns, [(each.pk, each.position, each.hash) for each in entries])
        head.save()
    return len(entries)


def _has_news() -> bool:
    """Whether there is anything to write: the scheduler asks each second, and a disk wears out by what is written."""
    head = AuditHead.objects.filter(pk=1).first() or AuditHead()
    newest = StateChange.objects.order_by("-pk").values_list("pk", flat=True).first() or 0
    to_look_again = newest > head.state_changes and timezone.now() - head.seen_at > LONGEST_TRANSACTION
    return to_look_again or AuditEntry.objects.filter(position=None).exists() or _commands(head).exists()


def _commands(head: AuditHead) -> QuerySet[StateChange]:
    """Those without an entry. Transactions end in another order than they begin, so that a lower id may come later: the newest
    are looked at again."""
    return (
        StateChange.objects.filter(pk__gt=head.state_changes)
        .exclude(source=StateChange.Source.DEVICE)
        .exclude(Exists(AuditEntry.objects.filter(uuid=OuterRef("uuid"))))
    )


def _add_commands(head: AuditHead) -> None:
    found = list(_commands(head).select_related("state__device__organization").order_by("pk")[:AT_ONCE])
    AuditEntry.objects.bulk_create([_of_command(row) for row in found], ignore_conflicts=True)
    now = timezone.now()
    if len(found) < AT_ONCE and now - head.seen_at > LONGEST_TRANSACTION:
        newest = StateChange.objects.order_by("-pk").values_list("pk", flat=True).first() or 0
        head.state_changes, head.newest_seen, head.seen_at = head.newest_seen, newest, now


def _of_command(row: StateChange) -> AuditEntry:
    device = row.state.device
    return AuditEntry(
        uuid=row.uuid,
        at=row.timestamp,
        kind=AuditEntry.Kind.COMMAND,
        organization=device.organization,
        organization_uuid=device.organization.uuid,
        actor=row.actor,
        action=f"set {row.state.name}",
        target=f"{device.name} {device.uuid}"[:500],
        detail={"source": row.source, "value": row.value, "previous": row.previous},
    )


def as_record(entry: AuditEntry) -> dict[str, Any]:
    """What is hashed and exported. JSON-ready."""
    return {
        "position": entry.position,
        "uuid": str(entry.uuid),
        "at": entry.at.astimezone(UTC).isoformat(),
        "kind": entry.kind,
        "organization": str(entry.organization_uuid) if entry.organization_uuid else None,
        "actor": entry.actor,
        "action": entry.action,
        "target": entry.target,
        "status": entry.status,
        "detail": entry.detail,
        "address": entry.address,
        "requestId": entry.request_id,
    }


def digest(before: str, record: Record) -> str:
    """The hash of an entry: of the hash before it and of its record, without hashes, as sorted JSON."""
    text = json.dumps(dict(record), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def exported(entries: Iterable[AuditEntry]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        yield {**as_record(entry), "hash": entry.hash}


def problems(records: Iterable[Record], *, before: str = "", position: int = 0) -> Iterator[str]:
    """What shows that somebody changed the chain, in sentences. `records` have a hash each and follow the entry at `position`."""
    for given in records:
        record = dict(given)
        said = record.pop("hash")
        if record["position"] != position + 1:
            yield f"entries are missing between {position} and {record['position']}"
        elif digest(before, record) != said:
            yield f"entry {record['position']} ({record['at']}, {record['actor']}: {record['action']}) was changed"
        position, before = record["position"], said


def verify(*, on_progress: Any = None) -> list[str]:
    """What is wrong with the stored chain; empty when nothing is."""
    with transaction.atomic():
        head = AuditHead.objects.filter(pk=1).first() or AuditHead()
        entries = (
            AuditEntry.objects.filter(position__lte=head.position).order_by("position").iterator(chunk_size=AT_ONCE)
        )
        last = AuditEntry(position=head.first_position, hash=head.first_hash)

        def followed() -> Iterator[dict[str, Any]]:
            nonlocal last
            for last in entries:
                if on_progress:
                    on_progress(last.position, head.position)
                yield from exported([last])

        found = list(problems(followed(), before=head.first_hash, position=head.first_position))
    if last.position != head.position:
        found.append(f"the end is missing: the last entry is {last.position}, and {head.position} were sealed")
    elif last.hash != head.hash:
        found.append("the last entry is not the one that was sealed last")
    return found


def delete_old() -> int:
    """Deletes sealed entries that are too old, and notes where the chain begins from then on."""
    if not settings.AUDIT_RETENTION_DAYS:
        return 0
    oldest_kept = timezone.now() - timedelta(days=settings.AUDIT_RETENTION_DAYS)
    oldest = AuditEntry.objects.exclude(position=None).order_by("position").first()
    if oldest is None or oldest.at >= oldest_kept:
        return 0
    with transaction.atomic():
        head = AuditHead.objects.select_for_update().filter(pk=1).first()
        if head is None:
            return 0
        rows = AuditEntry.objects.filter(position__gt=head.first_position).order_by("position")[:AT_ONCE]
        gone = []
        for entry in rows:
            if entry.at >= oldest_kept or entry.position == head.position:
                break
            gone.append(entry)
        if gone:
            head.first_position, head.first_hash = gone[-1].position or 0, gone[-1].hash
            head.save()
            AuditEntry.objects.filter(pk__in=[entry.pk for entry in gone]).delete()
    return len(gone)
