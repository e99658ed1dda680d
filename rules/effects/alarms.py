"""Alarms: raise, clear, acknowledge and comment on them, in the caller's transaction.

Of one type at one originator at most one alarm is open, which the database enforces: an insert that meets another worker's
does nothing, and the request then raises that one again. Every message has the key of the effect that caused it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from uuid import uuid4

from django.conf import settings
from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from aemos.lib import metrics
from devices import catalogue
from devices.models import Device, Organization, Sensor
from devices.permissions import Access
from notifications import messages, outbox
from notifications.messages import Message
from rules import events
from rules.effects.alarm_lifecycle import (
    AlarmEvent,
    AlarmLifecycle,
    Change,
    Clear,
    FlappingPolicy,
    Key,
    Raise,
    alarm_event,
)
from rules.effects.cooldowns import CooldownGate, no_cooldown
from rules.models import Alarm, RuleChain, Severity

log = logging.getLogger(__name__)
SUSPENDED = "rule chain suspended"
SYSTEM = "aemos"
# How often another transaction may come before with the same alarm and be gone again; then something else is wrong.
ATTEMPTS = 5
# Rows that people or the scheduler change in one transaction.
CHUNK_ROWS = 500
_TOUCHED = ["last_raised_at", "last_event_at", "times_raised"]
_CHANGED = [
    *_TOUCHED, "severity", "state", "message", "raised_at", "is_flapping", "acknowledged_at", "acknowledged_by", "cleared_at",
    "cleared_by",
]  # fmt: skip
Requests = Mapping[Key, Sequence[Raise | Clear]]


def apply(requests: Sequence[Raise | Clear], permits: CooldownGate = no_cooldown) -> list[Message]:
    """Raises and clears alarms in the current transaction, each alarm's in order; gives what to `publish` after it."""
    waiting: defaultdict[Key, list[Raise | Clear]] = defaultdict(list)
    for request in requests:
        waiting[request.key].append(request)
    policy = _policy(permits)
    alarm_events: list[AlarmEvent] = []
    for _ in range(ATTEMPTS):
        if not waiting:
            return _write(alarm_events)
        events_of_alarms, lost = _apply(waiting, policy)
        alarm_events += events_of_alarms
        waiting = defaultdict(list, {key: waiting[key] for key in lost})
    raise RuntimeError(f"alarms cannot be stored: {', '.join(f'{key[3]!r} of {key[2]}' for key in waiting)}")


def publish(outgoing: Sequence[Message]) -> None:
    """After the commit. What fails here, the sweep publishes."""
    for message in outgoing:
        body = message.payload
        metrics.ALARM_CHANGES.labels(body["change"]).inc()
        log.info("alarm %s: %s at %s %s", body["change"], body["type"], body["sourceType"], body["originator"])
    outbox.publish(outgoing)


def acknowledge(alarms: QuerySet[Alarm], *, by: str) -> int:
    """Somebody knows of them. Gives how many nobody knew of before."""

    def change(row: Alarm, now: datetime) -> None:
        row.state, row.acknowledged_at, row.acknowledged_by = Alarm.State.ACKNOWLEDGED, now, by

    return _decide(alarms.filter(state=Alarm.State.ACTIVE), change, Change.ACKNOWLEDGED, by=by)


def clear(alarms: QuerySet[Alarm], *, by: str) -> int:
    """A person says that they are over. Gives how many were not. A rule that still finds one wrong raises it anew."""

    def change(row: Alarm, now: datetime) -> None:
        row.state, row.cleared_at, row.cleared_by = Alarm.State.CLEARED, now, by

    return _decide(_open(alarms), change, Change.CLEARED, by=by)


def changeable(alarms: QuerySet[Alarm], access: Access) -> QuerySet[Alarm]:
    """Those that the person may acknowledge and clear. Who is limited to areas: of what stands in them."""
    everywhere = access.limit(alarms, "organization", resource="alarms", verb="change")
    areas = access.limited_to("change", "alarms")
    return everywhere | standing_in(alarms, areas).filter(organization__in=access.areas) if areas else everywhere


def standing_in(alarms: QuerySet[Alarm], areas: Collection[int]) -> QuerySet[Alarm]:
    """Those of sensors and devices that stand in one of these areas, by id."""
    stands = {"sensor": Sensor.objects.filter(area__in=areas), "device": Device.objects.filter(area__in=areas)}
    here = Q()
    for source_type, rows in stands.items():
        here |= Q(source_type=source_type, originator_uuid__in=rows.values("uuid"))
    return alarms.filter(here)


def raise_for_chain(chain: RuleChain, message: str) -> Alarm | None:
    """Tells people that a chain does not run any more. In a transaction of its own, or as part of the caller's."""
    request = Raise(
        effect_key=f"chain:{uuid4()}",
        organization_id=chain.organization_id,
        source_type=events.CHAIN,
        originator_uuid=str(chain.uuid),
        type=SUSPENDED,
        timestamp_us=events.microseconds(timezone.now()),
        actor=SYSTEM,
        severity=Severity.CRITICAL,
        message=message[:500],
        chain_id=chain.pk,
    )
    with transaction.atomic():
        _publish_on_commit(apply([request]))
        return _open(_of_chain(chain)).first()


def clear_for_chain(chain: RuleChain, *, by: str) -> bool:
    """The chain runs again, because of this person or part of the system. False when there was no such alarm."""
    return clear(_of_chain(chain), by=by) > 0


def end_flapping() -> int:
    """Publishes alarms that were flapping and have been quiet since, as they are now. A periodic task; gives how many.

    Raises django.db.Error.
    """
    since = timezone.now() - _policy().window
    quiet = Q(state=Alarm.State.CLEARED, cleared_at__lte=since) | (
        ~Q(state=Alarm.State.CLEARED) & Q(raised_at__lte=since)
    )
    flapping = Alarm.objects.filter(is_flapping=True)
    if not flapping.exists():
        return 0
    with transaction.atomic():
        rows = list(_locked(flapping.filter(quiet))[:CHUNK_ROWS])
        for row in rows:
            row.is_flapping = False
        Alarm.objects.bulk_update(rows, ["is_flapping"])
        _publish_on_commit(_write([_calmed(row) for row in rows]))
    return len(rows)


def name_originators(alarms: Sequence[Alarm]) -> None:
    """Gives each the name of its sensor, device or chain, empty when that was deleted."""
    names = _names({(alarm.source_type, str(alarm.originator_uuid)) for alarm in alarms})
    for alarm in alarms:
        alarm.originator_name = names.get((alarm.source_type, str(alarm.originator_uuid)), "")


def _calmed(row: Alarm) -> AlarmEvent:
    change = Change.CLEARED if row.state == Alarm.State.CLEARED else Change.RAISED
    by = row.cleared_by or SYSTEM
    return alarm_event(change, row, effect_key=f"calm:{row.uuid}:{row.times_raised}", by=by, at=timezone.now())


def _policy(permits: CooldownGate = no_cooldown) -> FlappingPolicy:
    window = timedelta(seconds=settings.ALARM_FLAPPING_SECONDS)
    return FlappingPolicy(times=settings.ALARM_FLAPPING_TIMES, window=window, now=timezone.now(), permits=permits)


def _apply(requests: Requests, policy: FlappingPolicy) -> tuple[list[AlarmEvent], set[Key]]:
    """Writes what the requests come to; gives the events, and the alarms that another transaction has raised meanwhile.

    Of those nothing was written: with that transaction's row they come to something else.
    """
    rows = _rows_of(requests, policy)
    lifecycles = {key: AlarmLifecycle(rows[key], policy) for key in requests}
    for key, lifecycle in lifecycles.items():
        lifecycle.apply(requests[key])
    contested = {key: row for key, lifecycle in lifecycles.items() if (row := lifecycle.contested)}
    # In one order everywhere, so that two workers that insert the same alarms wait for one another in one direction.
    Alarm.objects.bulk_create([contested[key] for key in sorted(contested)], ignore_conflicts=True)
    lost = _lost(contested)
    kept = [lifecycle for key, lifecycle in lifecycles.items() if key not in lost]
    _save(kept, but={row.uuid for row in contested.values()})
    return [event for lifecycle in kept for event in lifecycle.alarm_events], lost


def _lost(contested: Mapping[Key, Alarm]) -> set[Key]:
    """Those that were not inserted, because an open one was there."""
    if not contested:
        return set()
    inserted = set(
        Alarm.objects.filter(uuid__in=[row.uuid for row in contested.values()]).values_list("uuid", flat=True)
    )
    return {key for key, row in contested.items() if row.uuid not in inserted}


def _save(lifecycles: Sequence[AlarmLifecycle], *, but: set[object]) -> None:
    """Changed rows before new ones: a new one may take the place of one that is cleared by that."""
    changed = {uuid: row for lifecycle in lifecycles for uuid, row in lifecycle.written.changed.items()}
    touched = {
        uuid: row for lifecycle in lifecycles for uuid, row in lifecycle.written.touched.items() if uuid not in changed
    }
    Alarm.objects.bulk_update(touched.values(), _TOUCHED)
    Alarm.objects.bulk_update(changed.values(), _CHANGED)
    Alarm.objects.bulk_create(row for lifecycle in lifecycles for row in lifecycle.written.new if row.uuid not in but)


def _rows_of(requests: Requests, policy: FlappingPolicy) -> defaultdict[Key, list[Alarm]]:
    """The open rows, and those cleared so lately that they matter, locked."""
    earliest = min(policy.moment(request) for group in requests.values() for request in group)
    matters = (
        ~Q(state=Alarm.State.CLEARED) | Q(cleared_at__gt=earliest - policy.window) | Q(last_event_at__gte=earliest)
    )
    organizations, _, originators, types = (set(parts) for parts in zip(*requests, strict=True))
    found = Alarm.objects.filter(
        matters, organization_id__in=organizations, originator_uuid__in=originators, type__in=types
    )
    rows: defaultdict[Key, list[Alarm]] = defaultdict(list)
    for row in _locked(found):
        rows[row.organization_id, row.source_type, str(row.originator_uuid), row.type].append(row)
    return rows


def _locked(rows: QuerySet[Alarm]) -> QuerySet[Alarm]:
    """In the order of their ids, so that two workers that want the same rows never deadlock."""
    return rows.select_for_update(of=("self",)).order_by("pk")


def _write(alarm_events: Sequence[AlarmEvent]) -> list[Message]:
    """Writes the events as messages into the outbox, without those that were notified of before."""
    if not alarm_events:
        return []
    sources = {(each.key[1], each.key[2]) for each in alarm_events}
    known, names = catalogue.shared().originators(sources), _names(sources)
    organizations = dict(
        Organization.objects.filter(pk__in={each.key[0] for each in alarm_events}).values_list("pk", "uuid")
    )
    outgoing: dict[str, tuple[Message, int, int | None]] = {}
    for each in alarm_events:
        organization_id, source_type, uuid, _ = each.key
        device = known.get((source_type, uuid)) if source_type == "device" else None
        message = Message(
            id=uuid4(),
            effect_key=each.effect_key,
            organization_uuid=str(organizations[organization_id]),
            device_uuid=device.uuid if device else None,
            event=messages.ALERT,
            priority=messages.PRIORITY_BY_SEVERITY[each.severity],
            timestamp=each.timestamp.isoformat(),
            payload={**each.payload, "originatorName": names.get((source_type, uuid), "")},
        )
        outgoing.setdefault(each.effect_key, (message, organization_id, device.id if device else None))
    return outbox.write(list(outgoing.values()))


def _names(sources: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    names = {key: found.name for key, found in catalogue.shared().originators(sources).items()}
    chains = [uuid for source_type, uuid in sources if source_type == events.CHAIN]
    if chains:
        rows = RuleChain.objects.filter(uuid__in=chains).values_list("uuid", "name")
        names |= {(events.CHAIN, str(uuid)): name for uuid, name in rows}
    return names


def _decide(rows: QuerySet[Alarm], change: Callable[[Alarm, datetime], None], kind: Change, *, by: str) -> int:
    """What a person decides about rows, as far as they are still there to be decided about; some at a time."""
    number = 0
    while decided := _decide_some(rows, change, kind, by=by):
        number += decided
    return number


@transaction.atomic
def _decide_some(rows: QuerySet[Alarm], change: Callable[[Alarm, datetime], None], kind: Change, *, by: str) -> int:
    now = timezone.now()
    locked = list(_locked(rows)[:CHUNK_ROWS])
    for row in locked:
        change(row, now)
    Alarm.objects.bulk_update(locked, _CHANGED)
    alarm_events = [alarm_event(kind, row, effect_key=f"person:{uuid4()}", by=by, at=now) for row in locked]
    _publish_on_commit(_write(alarm_events))
    return len(locked)


def _publish_on_commit(outgoing: Sequence[Message]) -> None:
    transaction.on_commit(partial(publish, outgoing))


def _open(rows: QuerySet[Alarm]) -> QuerySet[Alarm]:
    return rows.exclude(state=Alarm.State.CLEARED)


def _of_chain(chain: RuleChain) -> QuerySet[Alarm]:
    return Alarm.objects.filter(
        organization_id=chain.organization_id, source_type=events.CHAIN, originator_uuid=chain.uuid, type=SUSPENDED
    )
