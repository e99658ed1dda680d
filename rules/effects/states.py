"""Change device states: what rules and people command, and what devices report.

A change, its StateChange and its Notification are written in one transaction, and the effect key makes each happen once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import msgspec
from django.contrib.auth.models import AbstractBaseUser
from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils import timezone
from redis.exceptions import RedisError

from aemos.lib import bulk, metrics, redis, tracing
from devices import commands, latest
from devices.catalogue import Field
from devices.interlocks.judge import NO_VALUES, Values, Vetoed
from devices.latest import Latest
from devices.models import DeviceState, StateChange
from notifications import messages, outbox
from notifications.messages import Message
from notifications.models import Notification
from notifications.state_messages import message_of
from rules import events
from rules.effects import interlocks
from rules.effects.interlocks import Interlocks

log = logging.getLogger(__name__)
# Lines about changes that are made at once; all of them are in the list of changes.
LOGGED_TOGETHER = 20


class StateChangeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to change one state. `always`: also when the value is the same; `newer_only`: not when the state is newer.

    `cooldown_us`: not when somebody has commanded the same so short a while ago. `override`: the reason for which a person does
    it against a veto. `vetoed`: it is not to be done, only to be counted as a veto.
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
    cooldown_us: int = 0
    override: str = ""
    vetoed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change that was made, and the message that reports it."""

    row: commands.NewChange
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class VetoedRequest:
    """A request that an interlock did not let happen. `alarm`: people are to be alarmed."""

    request: StateChangeRequest
    state: DeviceState
    veto: Vetoed
    alarm: bool


@dataclass(frozen=True, slots=True)
class Made:
    """What became of requests. `changes`: those that changed something. `suppressed`: how many came within their cooldown.
    `reporting`: states whose device reported, by id. `fulfilled`: commands that devices have carried out by now.
    """

    changes: list[Change] = field(default_factory=list)
    vetoed: list[VetoedRequest] = field(default_factory=list)
    reporting: dict[int, DeviceState] = field(default_factory=dict)
    fulfilled: list[UUID] = field(default_factory=list)
    suppressed: list[StateChangeRequest] = field(default_factory=list)


def apply(
    requests: Sequence[StateChangeRequest], values: Values = NO_VALUES, *, also_lock: Collection[int] = ()
) -> Made:
    """Makes the changes in the current transaction, in order, but for those that an interlock vetoes. See `publish`.

    `values`: the newest of what interlocks require (`interlocks.required_by`); what is not among them is not known, and then
    the state must not go on. `also_lock`: ids of states that the same transaction may change later. They are locked at once,
    in the one order.
    """
    if not requests:
        return Made()
    states, rivals = lock({request.state_id for request in requests}.union(also_lock))
    gate = Interlocks(states, rivals, values)
    made = _decide(requests, states, gate, done=_effect_keys_done(requests))
    _write(made)
    gate.save()
    return made


class SettledStates:
    """Which requests of a batch's rules ask for what is so already, as most do: those are not made at all.

    The states are read at the first question and without a lock, so that a batch that changes nothing locks and writes no row:
    its requests then count as made at that moment, before whatever another transaction is about to change.
    """

    def __init__(self, ids: Collection[int]) -> None:
        """`ids`: the states that may be asked for."""
        self._ids = ids
        self._values: dict[int, Any] | None = None
        self._open: set[int] = set()

    def has(self, state_id: int | None, value: Any, *, always: bool) -> bool:
        """Whether nothing is to be done for the value to be set, which is `always` done. After a request that is to be made,
        those of the same state after it are to be made, too, in their order. A state that does not exist, None, has no value.
        """
        if state_id is None:
            return False
        if self._values is None:
            self._values = DeviceState.objects.newest_values(self._ids)
        if always or state_id in self._open or self._values.get(state_id, _NOTHING) != value:
            self._open.add(state_id)
            return False
        return True

    def forget(self) -> None:
        """To be called when the requests so far were made."""
        self._values, self._open = None, set()


_NOTHING = object()
"""Equals no value: not that of a state that was deleted."""


def _decide(
    requests: Sequence[StateChangeRequest], states: Mapping[int, DeviceState], gate: Interlocks, *, done: set[str]
) -> Made:
    """Sets the values of the rows without writing them; of requests with one effect key the first counts, of `done` ones none."""
    made = Made()
    for request in requests:
        state = states.get(request.state_id)
        if state is None or request.effect_key in done:
            continue
        previous, is_wanted = state.newest, _is_wanted(request, state)
        if request.source == StateChange.Source.DEVICE:
            made.reporting[state.pk] = state
            made.fulfilled.extend(_apply_report(request, state))
            if not state.is_momentary:
                gate.note_change(state, state.newest[0])
        elif is_wanted and not _may(request, state, gate, made):
            continue
        if is_wanted:
            done.add(request.effect_key)
            made.changes.append(_change(request, state, previous, now=gate.now))
            if request.source != StateChange.Source.DEVICE:
                gate.note_change(state, request.value)
    return made


def _may(request: StateChangeRequest, state: DeviceState, gate: Interlocks, made: Made) -> bool:
    """Whether a command that would change something is neither within its cooldown nor vetoed. What keeps a state safe always
    may."""
    if request.source == StateChange.Source.INTERLOCK:
        return True
    if request.cooldown_us and state.rests_until(request.value, cooldown_us=request.cooldown_us, now=gate.now):
        made.suppressed.append(request)
        return False
    vetoed = gate.veto(state, request.value)
    if vetoed is None:
        return not request.vetoed
    gate.note_veto(
        state, vetoed, request.value, source=request.source, actor=request.actor, overridden=request.override
    )
    if request.override:
        return True
    made.vetoed.append(VetoedRequest(request=request, state=state, veto=vetoed, alarm=gate.alarms_for(state)))
    return False


def _write(made: Made) -> None:
    changes = made.changes
    rows = [[getattr(change.row, name) for name in _COLUMNS] for change in changes]
    bulk.insert("devices_statechange", _COLUMNS, rows)
    changed = made.reporting | {change.row.state.pk: change.row.state for change in changes}
    columns = {"id": "bigint"} | DeviceState.VALUE_FIELDS
    bulk.update("devices_devicestate", columns, [[getattr(row, name) for name in columns] for row in changed.values()])
    commands.note_applied(made.fulfilled)
    outbox.write([(c.message, c.row.state.device.organization_id, c.row.state.device_id) for c in changes])


_COLUMNS = {
    "uuid": "uuid",
    "effect_key": "text",
    "state_id": "bigint",
    "value": "jsonb",
    "previous": "jsonb",
    "source": "text",
    "actor": "text",
    "timestamp": "timestamptz",
    "command_state": "text",
    "deadline": "timestamptz",
    "command_error": "text",
}


def publish(changes: Sequence[Change]) -> None:
    """After the commit: refreshes what rules see, then publishes the messages. What fails here, or is cut off, `sweep` does
    again; it finds the changes by messages that are not published, so these come last.
    """
    for source, number in Counter(change.row.source for change in changes).items():
        metrics.STATE_CHANGES.labels(source).inc(number)
    for row, message in ((change.row, change.message) for change in changes[:LOGGED_TOGETHER]):
        fields = {"device": message.device_uuid, "message_id": str(row.uuid), **tracing.log_fields(message.trace)}
        log.info(
            "state changed: %s: %s -> %s by %s %s",
            row.state,
            row.previous,
            row.value,
            row.source,
            row.actor,
            extra=fields,
        )
    if len(changes) > LOGGED_TOGETHER:
        log.info("and %d more states changed in the same batch", len(changes) - LOGGED_TOGETHER)
    try:
        latest.remember(dict(latest_of(change.row.state) for change in changes))
    except RedisError as error:
        log.warning("%d changed states wait in the outbox: %s", len(changes), redis.explain(error))
        return
    outbox.publish([change.message for change in changes])


def sweep(now: datetime | None = None) -> int:
    """Publishes what a crash or an absent Redis left in the outbox, changes of states and all else; returns how many.

    Called by the scheduler. Raises RedisError or django.db.Error; what was not published then waits for the next time.
    """
    return outbox.sweep(now, first=_remember_unpublished)


def _remember_unpublished(rows: Sequence[Notification]) -> None:
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


class ChangeVetoed(Exception):
    """An interlock does not let a person do this; `veto` says why."""

    def __init__(self, state: DeviceState, veto: Vetoed) -> None:
        super().__init__(f"{state.name} must not be changed now: {veto.detail}")
        self.veto = veto


def change_by_person(state: DeviceState, value: Any, *, user: AbstractBaseUser, override: str = "") -> StateChange:
    """A person sets a state. It is sent even when the value is the same: somebody who presses a switch again wants that.

    `override` is the reason for which it is done against a veto; whether the person may is the caller's question. Raises
    ValidationError when the state does not allow the value, ChangeVetoed, and RedisError when what an interlock requires cannot
    be read.
    """
    problem = state.problem_with(value)
    if problem:
        raise ValidationError({"value": f"{state.name} {problem}"})
    request = StateChangeRequest(
        effect_key=f"person:{uuid4()}",
        state_id=state.pk,
        value=value,
        source=StateChange.Source.PERSON,
        actor=user.get_username(),
        timestamp_us=events.microseconds(timezone.now()),
        priority=1,
        always=True,
        override=override,
    )
    # Before the transaction: a lock must not wait for Redis.
    values = latest.recall(interlocks.required_by([state.pk]))
    with transaction.atomic():
        made = apply([request], values)
    if made.vetoed:
        raise ChangeVetoed(state, made.vetoed[0].veto)
    if not made.changes:
        raise ValidationError({"stateName": f"{state.name} was deleted"})
    publish(made.changes)
    return StateChange.objects.select_related("state__device__organization").get(uuid=made.changes[0].row.uuid)


def lock(ids: Collection[int]) -> tuple[dict[int, DeviceState], dict[int, set[int]]]:
    """Locks these states, and with them those that must not be on at the same time; gives the rows, and `rivals_of` the ids.

    In the order of their ids, so that two workers that want the same states never deadlock.
    """
    rivals = interlocks.rivals_of(ids)
    wanted = set(ids).union(*rivals.values())
    rows = DeviceState.objects.select_for_update(of=("self",)).filter(pk__in=wanted).order_by("pk")
    return {row.pk: row for row in rows.select_related("device__organization")}, rivals


def _effect_keys_done(requests: Sequence[StateChangeRequest]) -> set[str]:
    return bulk.present("devices_statechange", "effect_key", [request.effect_key for request in requests])


def _is_wanted(request: StateChangeRequest, state: DeviceState) -> bool:
    value, said_at = state.newest
    if request.newer_only and said_at and events.microseconds(said_at) > request.timestamp_us:
        return False
    return request.always or state.is_momentary or value != request.value


def _apply_report(request: StateChangeRequest, state: DeviceState) -> list[UUID]:
    """Notes what the device says; gives the command that it has fulfilled by now, when it had not said so before."""
    agreed = state.differs is False
    state.report(request.value, at=_not_ahead(request))
    return [state.command_uuid] if state.command_uuid and not agreed and state.differs is False else []


def _not_ahead(request: StateChangeRequest) -> datetime:
    """A sender's clock may be ahead by hours; a state "changed tomorrow" would turn down every report until then."""
    return min(events.moment(request.timestamp_us), timezone.now())


def _not_before(previous_at: datetime | None, at: datetime) -> datetime:
    """An event that comes late switches all the same; dated before the last word about the state, it would not count as the
    last one."""
    return max(previous_at, at) if previous_at else at


def _change(
    request: StateChangeRequest, state: DeviceState, previous: tuple[Any, datetime | None], *, now: datetime
) -> Change:
    previous_value, previous_at = previous
    row = commands.NewChange(
        uuid=uuid4(),
        effect_key=request.effect_key,
        state=state,
        value=request.value,
        previous=previous_value,
        source=request.source,
        actor=request.actor[:200],
        timestamp=events.moment(request.timestamp_us),
    )
    if request.source != StateChange.Source.DEVICE:
        state.set_desired(request.value, at=_not_before(previous_at, _not_ahead(request)), command_uuid=row.uuid)
        state.note_command(request.value, now=now)
        row.command_state, row.deadline = commands.State.QUEUED, commands.deadline()
    return Change(row=row, message=message_of(row, priority=request.priority))


def latest_of(state: DeviceState) -> tuple[latest.Key, Latest]:
    """What rules see of the state: the last word about it, with its time as the row has it."""
    value, said_at = state.newest
    key = ("device", str(state.device.uuid), state.name)
    return key, Latest(value, events.microseconds(said_at or events.EPOCH))
