"""Schedules: put one event into the journal for each chain whose time has come, and for each run that a person asks for.

An event's id follows from chain and time, and the chain moves on to its next time only when the journal has the event. So a
crash in between, or a second scheduler, brings the same event again, which `already_ran` recognises.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4, uuid5

from django.db.models import Q
from django.utils import timezone
from redis.exceptions import RedisError

from aemos.lib.per_process import per_process
from devices.exceptions import Overloaded
from rules import events
from rules.admission import control, rejections
from rules.engine.exceptions import Problem
from rules.events import Event, EventType
from rules.models import RuleChain
from rules.processing import synthetic

log = logging.getLogger(__name__)
PROTOCOL = "scheduler"
# Chains that one tick of the scheduler fires at most; ticks follow one another by a second.
CHAINS_PER_TICK = 2_000
# A time that is late by more than this was missed: a scheduler that fails over is back in five seconds, a restart in a minute.
LATE = timedelta(seconds=60)
_SCHEDULE_FIELDS = ("enabled", "suspended_at", "execution_type", "cron", "timezone")


def plan(chain: RuleChain, stored: RuleChain | None, *, now: datetime | None = None) -> None:
    """Sets when the chain runs next, before it is saved. `stored` is what the database has, locked.

    A time that has come and was not fired yet stays when nothing about the schedule changes.
    """
    if stored is not None:
        chain.last_run_at, chain.next_run_at = stored.last_run_at, stored.next_run_at
    if is_unchanged(chain, stored) and chain.next_run_at is not None:
        return
    schedule = None if chain.stopped else chain.schedule
    moment = max(now or timezone.now(), chain.last_run_at or events.EPOCH)
    chain.next_run_at = schedule.next_after(moment) if schedule else None


def is_unchanged(chain: RuleChain, stored: RuleChain | None) -> bool:
    return stored is not None and all(getattr(chain, name) == getattr(stored, name) for name in _SCHEDULE_FIELDS)


def problems_of(chain: RuleChain) -> list[Problem]:
    """What is wrong with the chain's schedule, as the REST API and the admin say it on the fields."""
    return [Problem(name, getattr(chain, name), text) for name, text in chain.schedule_problems().items()]


def fire_due() -> int:
    """Puts an event into the journal for every chain whose time has come: called by the scheduler, every second.

    Gives their number. Raises RedisError or django.db.Error; what was not done then stays due.
    """
    return shared().fire(timezone.now())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """What becomes of a chain that is due: an event unless its time was missed, and the time that follows."""

    chain: RuleChain
    event: Event | None
    next_run_at: datetime | None


class Firing:
    """Fires what is due. One per scheduler; remembers which times the queue had no room for."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Event, Overloaded]] = {}

    def fire(self, now: datetime) -> int:
        due = RuleChain.objects.running().filter(next_run_at__lte=now)
        turns = [_turn(chain, now) for chain in due.order_by("next_run_at", "pk")[:CHAINS_PER_TICK]]
        if not turns:
            return 0
        fired = [turn.event for turn in turns if turn.event]
        refusal = synthetic.refusal() if fired else None
        if refusal is None:
            synthetic.append(fired)
        self._settle(turns, refusal)
        return 0 if refusal else len(fired)

    def _settle(self, turns: Sequence[_Turn], refusal: Overloaded | None) -> None:
        """Moves chains on, but not those whose event was refused: they stay due until there is room."""
        for turn in turns:
            held = self._held.pop(turn.chain.pk, None)
            if held and (turn.event is None or held[0].id != turn.event.id):
                log.warning("%s was not run at %s: %s", turn.chain, events.moment(held[0].timestamp_us), held[1].detail)
                rejections.record_events([held[0]], held[1])
            if refusal and turn.event:
                self._held[turn.chain.pk] = (turn.event, refusal)
        _move([turn for turn in turns if refusal is None or turn.event is None])
        rejections.shared().flush()  # nothing else in this process lets the recorder's greenlet run


@per_process
def shared() -> Firing:
    """The firing of this process."""
    return Firing()


def _turn(chain: RuleChain, now: datetime) -> _Turn:
    since = chain.next_run_at
    assert since is not None and chain.schedule is not None  # noqa: PT018, S101  the query and `plan`
    try:
        due = chain.schedule.latest_until(now, since=since)
        following = chain.schedule.next_after(now)
    except ValueError as error:
        # Saving refuses such a schedule; a time zone may have gone with an update of the machine.
        log.error("rule chain %s (%s) is not scheduled any more, save it again: %s", chain, chain.uuid, error)
        return _Turn(chain=chain, event=None, next_run_at=None)
    if due != since:
        log.warning("%s missed its times from %s on; the last of them was %s", chain, since, due)
    if chain.missed_runs == RuleChain.MissedRuns.SKIP and now - due > LATE:
        log.warning("%s leaves out %s, which was missed", chain, due)
        return _Turn(chain=chain, event=None, next_run_at=following)
    event = _event(chain, identifier=uuid5(chain.uuid, due.isoformat()), happened=due, protocol=PROTOCOL)
    return _Turn(chain=chain, event=event, next_run_at=following)


def _event(
    chain: RuleChain, *, identifier: UUID, happened: datetime, protocol: str, values: Mapping[str, Any] | None = None
) -> Event:
    return Event(
        id=str(identifier),
        type=EventType.SCHEDULED,
        priority=synthetic.PRIORITY,
        source_type=events.CHAIN,
        originator_uuid=str(chain.uuid),
        organization_id=chain.organization_id,
        values=dict(values or {}),
        timestamp_us=events.microseconds(happened),
        received_us=events.microseconds(timezone.now()),
        protocol=protocol,
    )


def _move(turns: Iterable[_Turn]) -> None:
    """On to the next time, unless the schedule was changed meanwhile. Most chains share their times: one UPDATE for all."""
    together: defaultdict[tuple[datetime | None, datetime | None], list[int]] = defaultdict(list)
    for turn in turns:
        together[turn.chain.next_run_at, turn.next_run_at].append(turn.chain.pk)
    for (old, new), ids in together.items():
        RuleChain.objects.filter(pk__in=ids, next_run_at=old).update(next_run_at=new)


def trigger(chain: RuleChain, *, protocol: str) -> Event:
    """Runs the chain now, for a person, with what is known of its sensors and devices. Gives the event, which is durable.

    Raises Overloaded, recorded, when the queue may not have it.
    """
    event = _event(chain, identifier=uuid4(), happened=timezone.now(), protocol=protocol)
    refusal = synthetic.refusal()
    if refusal is None:
        try:
            synthetic.append([event])
        except RedisError as error:
            refusal = control.unavailable(error)
    if refusal:
        rejections.record_events([event], refusal)
        refusal.recorded = True
        raise refusal
    return event


def already_ran(batch: Sequence[Event]) -> set[int]:
    """Positions of the scheduled events whose chain has run for that time or a later one; locks the chains' rows.

    One query, and none for a batch without scheduled events. Readings have a key of their own; a run has no other.
    """
    scheduled = {position: event for position, event in enumerate(batch) if event.protocol == PROTOCOL}
    if not scheduled:
        return set()
    rows = RuleChain.objects.filter(uuid__in={event.originator_uuid for event in scheduled.values()})
    locked = rows.select_for_update(no_key=True).order_by("pk")
    last = {str(uuid): moment for uuid, moment in locked.values_list("uuid", "last_run_at")}
    found = set()
    for position, event in scheduled.items():
        due, before = events.moment(event.timestamp_us), last.get(event.originator_uuid)
        if before is not None and due <= before:
            found.add(position)
        else:
            last[event.originator_uuid] = due
    return found


def note_runs(ran: Iterable[Event]) -> None:
    """Notes for `already_ran`, in the current transaction, the events that need no other attempt."""
    chains: defaultdict[int, list[str]] = defaultdict(list)
    for event in ran:
        if event.protocol == PROTOCOL:
            chains[event.timestamp_us].append(event.originator_uuid)
    for timestamp_us, uuids in chains.items():
        due = events.moment(timestamp_us)
        older = Q(last_run_at=None) | Q(last_run_at__lt=due)
        RuleChain.objects.filter(older, uuid__in=uuids).update(last_run_at=due)
