"""Device states: what rules, people and devices want a state to be in; the change, its record and its message out.

A change, its StateChange and its Notification are written in one transaction, and the effect key makes each happen once.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from django.contrib.auth.models import AbstractBaseUser
from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils import timezone
from redis.exceptions import RedisError

from aemos.lib import metrics, redis
from devices import commands, latest
from devices.catalogue import Field
from devices.latest import Latest
from devices.models import DeviceState, StateChange
from notifications import messages, outbox
from notifications.messages import Message
from notifications.models import Notification
from notifications.state_messages import message_of
from rules import events
from rules.effects.cooldowns import Permits, Rest, permits_all

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A wish to change one state. `always`: also when the value is the same; `newer_only`: not when the state is newer.

    `rest`: how long another wish of the same action is not granted after this one.
    """

    effect_key: str
    state_id: int
    value: Any
    source: str
    actor: str
    timestamp_us: int
    priority: int = 5
    always: bool = False
    newer_only: bool = False
    rest: Rest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change that was made, and the message that tells of it."""

    row: StateChange
    message: Message


def apply(
    requests: Sequence[Request], permits: Permits = permits_all, *, to_come: Collection[int] = ()
) -> list[Change]:
    """Makes the changes in the current transaction, in order; gives those that changed something. See `tell`.

    `to_come`: ids of states that the same transaction may change later. They are locked at once, in the one order.
    """
    if not requests:
        return []
    states = _locked({request.state_id for request in requests}.union(to_come))
    done = _effect_keys_done(requests)
    changes: list[Change] = []
    heard: dict[int, DeviceState] = {}
    obeyed: list[UUID] = []
    for request in requests:
        state = states.get(request.state_id)
        if state is None or request.effect_key in done:
            continue
        previous, is_wanted = state.newest, _is_wanted(request, state)
        if request.source == StateChange.Source.DEVICE:
            heard[state.pk] = state
            obeyed += _hear(request, state)
        if is_wanted and permits(request.rest, request.effect_key):
            done.add(request.effect_key)
            changes.append(_change(request, state, previous))
    StateChange.objects.bulk_create([change.row for change in changes])
    changed = heard | {change.row.state.pk: change.row.state for change in changes}
    DeviceState.objects.bulk_update(changed.values(), DeviceState.VALUE_FIELDS)
    commands.note_applied(obeyed)
    outbox.write([(c.message, c.row.state.device.organization_id, c.row.state.device_id) for c in changes])
    return changes


def tell(changes: Sequence[Change]) -> None:
    """After the commit: refreshes what rules see and publishes the messages. What fails here, or is cut off, `sweep` makes
    good; it knows by the messages, so these come last.
    """
    for change in changes:
        row = change.row
        metrics.STATE_CHANGES.labels(row.source).inc()
        if row.source == StateChange.Source.RULE:
            log.info("rule fired: %s", row.actor)
        log.info("state changed: %s: %s -> %s by %s", row.state, row.previous, row.value, row.source)
    try:
        latest.remember(dict(latest_of(change.row.state) for change in changes))
    except RedisError as error:
        log.warning("%d changed states wait in the outbox: %s", len(changes), redis.explain(error))
        return
    outbox.publish([change.message for change in changes])


def sweep(now: datetime | None = None) -> int:
    """Tells what a crash or an absent Redis left untold, of states and of all else in the outbox; returns how many.

    Called by the scheduler. Raises RedisError or django.db.Error; what was not told then waits for the next time.
    """
    return outbox.sweep(now, first=_remember_untold)


def _remember_untold(rows: Sequence[Notification]) -> None:
    """The message of a change bears its uuid."""
    uuids = [row.uuid for row in rows if row.event == messages.DEVICE_STATE_CHANGE]
    if uuids:
        changes = StateChange.objects.filter(uuid__in=uuids).select_related("state__device").order_by("id")
        latest.remember(dict(latest_of(change.state) for change in changes))


def recent(field: Field, *, since_us: int, maximum: int) -> list[tuple[int, Any]]:
    """(timestamp in us, value) of the state's newest changes from then on, at most so many, in ascending order."""
    rows = StateChange.objects.filter(state_id=field.id, timestamp__gte=events.moment(max(since_us, 0)))
    newest = rows.order_by("-timestamp", "-id").values_list("timestamp", "value")[:maximum]
    return [(events.microseconds(at), value) for at, value in reversed(newest)]


def change_by_person(state: DeviceState, value: Any, *, user: AbstractBaseUser) -> StateChange:
    """A person sets a state. It is told even when the value is the same: who presses a switch again wants it sent again.

    Raises ValidationError when the state does not allow the value.
    """
    problem = state.problem_with(value)
    if problem:
        raise ValidationError({"value": f"{state.name} {problem}"})
    request = Request(
        effect_key=f"person:{uuid4()}",
        state_id=state.pk,
        value=value,
        source=StateChange.Source.PERSON,
        actor=user.get_username(),
        timestamp_us=events.microseconds(timezone.now()),
        priority=1,
        always=True,
    )
    with transaction.atomic():
        changes = apply([request])
    if not changes:
        raise ValidationError({"stateName": f"{state.name} was deleted"})
    tell(changes)
    return changes[0].row


def _locked(ids: set[int]) -> dict[int, DeviceState]:
    """The rows in the order of their ids, so that two workers that want the same states never deadlock."""
    rows = DeviceState.objects.select_for_update(of=("self",)).filter(pk__in=ids).order_by("pk")
    return {row.pk: row for row in rows.select_related("device__organization")}


def _effect_keys_done(requests: Sequence[Request]) -> set[str]:
    wanted = [request.effect_key for request in requests]
    return set(StateChange.objects.filter(effect_key__in=wanted).values_list("effect_key", flat=True))


def _is_wanted(request: Request, state: DeviceState) -> bool:
    value, said_at = state.newest
    if request.newer_only and said_at and events.microseconds(said_at) > request.timestamp_us:
        return False
    return request.always or value != request.value


def _hear(request: Request, state: DeviceState) -> list[UUID]:
    """Notes what the device says; gives the command that it has obeyed by now, when it had not said so before."""
    agreed = state.differs is False
    state.report(request.value, at=_not_ahead(request))
    return [state.command_uuid] if state.command_uuid and not agreed and state.differs is False else []


def _not_ahead(request: Request) -> datetime:
    """A sender's clock may be ahead by hours; a state "changed tomorrow" would turn down every report until then."""
    return min(events.moment(request.timestamp_us), timezone.now())


def _not_before(previous_at: datetime | None, at: datetime) -> datetime:
    """An event that comes late switches all the same; dated before the last word about the state, it would not count as the
    last one."""
    return max(previous_at, at) if previous_at else at


def _change(request: Request, state: DeviceState, previous: tuple[Any, datetime | None]) -> Change:
    previous_value, previous_at = previous
    row = StateChange(
        effect_key=request.effect_key,
        state=state,
        value=request.value,
        previous=previous_value,
        source=request.source,
        actor=request.actor[:200],
        timestamp=events.moment(request.timestamp_us),
    )
    if request.source != StateChange.Source.DEVICE:
        state.wish(request.value, at=_not_before(previous_at, _not_ahead(request)), command_uuid=row.uuid)
        commands.queue(row)
    return Change(row=row, message=message_of(row, priority=request.priority))


def latest_of(state: DeviceState) -> tuple[latest.Key, Latest]:
    """What rules see of the state: the last word about it, with its time as the row has it."""
    value, said_at = state.newest
    key = ("device", str(state.device.uuid), state.name)
    return key, Latest(value, events.microseconds(said_at or events.EPOCH))
