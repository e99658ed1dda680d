"""Replays: kept events chosen by criteria in, the same events in the journal again out, in small steps at a capped rate.

Rejected events never got in; dead letters got in and failed. A step is an RQ job; the scheduler queues the next one of every
running replay. An event keeps its id and its time, so sending it twice does no more than sending it once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import msgspec
from django.db import InterfaceError, OperationalError, connection, transaction
from django.db.models import F, QuerySet
from django.utils import timezone
from redis.exceptions import RedisError

from aemos.lib import keys, redis
from devices import catalogue
from devices.catalogue import Originator
from devices.exceptions import Overloaded, Refusal
from devices.models import Organization
from rules import events
from rules.admission import control, filtersets
from rules.admission.circuit import State
from rules.admission.filtersets import Criteria
from rules.events import Event, Lane
from rules.journal import slots, tickets, writing
from rules.journal.slots import Slot
from rules.models import DeadLetter, RejectedEvent, Replay, Status

log = logging.getLogger(__name__)
STEP = "rules.admission.replay.step"
PROTOCOL = "replay"
STEP_TIMEOUT_SECONDS = 30
# Time of a worker that one step may take, and rows that are sent between two looks at the clock.
SLICE_SECONDS = 0.1
CHUNK_ROWS = 100
DEFAULT_RATE = 100
# A deadline for commands that has passed whatever the clock says: the event switches no device.
NO_COMMANDS_US = 1
# One that never passes: what is replayed to switch devices does so, however late it is.
ALL_COMMANDS_US = 2**62
MAXIMUM_RATE = 10_000
# How many rows are counted before a replay starts; beyond that the total is "at least".
COUNTED_ROWS = 1_000_000
# A step that was queued or begun and has not been heard of for so long is lost.
TICKET_MS = 30_000
LEASE_MS = 30_000
AWAY = (OperationalError, InterfaceError, RedisError)

Clock = Callable[[], float]

# What it does: adds events that are to run one chain only to those waiting for an attempt, each unless it is there already.
# KEYS: delayed, ledger, ticket, backlog. ARGV: due time in ms, lifetime of the ticket flag in ms, then pairs of organization
# id and event. Returns: 1 when the caller must queue a ticket, else 0.
_RETRY = """
for i = 3, #ARGV, 2 do
  if redis.call('ZADD', KEYS[1], 'NX', ARGV[1], ARGV[i + 1]) == 1 then
    redis.call('HINCRBY', KEYS[2], 'accepted', 1)
    redis.call('HINCRBY', KEYS[2], 'depth', 1)
    redis.call('HINCRBY', KEYS[4], ARGV[i], 1)
  end
end
return redis.call('SET', KEYS[3], '1', 'NX', 'PX', ARGV[2]) and 1 or 0
"""


class CannotReplay(ValueError):
    """The request cannot be met; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """What a person wants replayed. `organization` None is all of them; `rate` in events a second."""

    kind: str
    criteria: Criteria
    organization: Organization | None
    rate: int = DEFAULT_RATE
    with_commands: bool = False
    actor: str

    def rows(self) -> QuerySet[Any]:
        """What would be replayed now: nobody has decided about it, and it can be sent again."""
        rows = filtersets.rows_of(self.kind, self.criteria).filter(status=Status.OPEN)
        if self.kind == Replay.Kind.REJECTED:
            rows = rows.filter(event_id__isnull=False)
        return rows.filter(organization=self.organization) if self.organization else rows


def start(request: ReplayRequest) -> Replay:
    """Starts a replay of what the criteria choose at this moment. Raises CannotReplay."""
    if not 1 <= request.rate <= MAXIMUM_RATE:
        raise CannotReplay(f"The rate must be from 1 to {MAXIMUM_RATE} events a second.")
    rows = request.rows()
    newest = rows.order_by("-id").values_list("id", flat=True).first()
    if newest is None:
        raise CannotReplay("No kept event that could be replayed matches.")
    fixed = {**request.criteria, "id__lte": newest}
    if request.organization:
        fixed["organization_id"] = request.organization.pk
    replay = Replay.objects.create(
        kind=request.kind,
        organization=request.organization,
        criteria=fixed,
        rate=request.rate,
        with_commands=request.with_commands,
        total=count(rows),
        created_by=request.actor,
    )
    try:
        queue_step(replay)
    except RedisError as error:
        log.warning("the replay starts once Redis is back: %s", redis.explain(error))
    return replay


def count(rows: QuerySet[Any]) -> int:
    """At most COUNTED_ROWS: counting further takes longer than people wait."""
    return rows.order_by()[:COUNTED_ROWS].count()


def discard(rows: QuerySet[Any], *, actor: str) -> int:
    """Decides that nobody wants the rows; those that were decided about before stay as they are."""
    found: int = rows.filter(status=Status.OPEN).update(
        status=Status.DISCARDED, decided_at=timezone.now(), decided_by=actor
    )
    return found


def stop(replay: Replay, *, actor: str) -> bool:
    """False when it had ended before. What was sent stays sent."""
    ended = Replay.objects.filter(pk=replay.pk, state=Replay.State.RUNNING).update(
        state=Replay.State.STOPPED, ended_at=timezone.now(), note=f"Stopped by {actor}."
    )
    return bool(ended)


def queue_steps() -> int:
    """Queues the next step of every running replay, unless one is queued: called by the scheduler. Raises RedisError."""
    return sum(queue_step(replay) for replay in Replay.objects.filter(state=Replay.State.RUNNING))


def queue_step(replay: Replay) -> bool:
    """On the queue that is served last: live events go first."""
    uuid = str(replay.uuid)
    if not redis.client().set(keys.replay_ticket(uuid), "1", nx=True, px=TICKET_MS):
        return False
    queue = tickets.queue_of(Lane.LOW)
    queue.enqueue_call(STEP, args=(uuid,), timeout=STEP_TIMEOUT_SECONDS, result_ttl=0, failure_ttl=3600)
    return True


def step(uuid: str, clock: Clock = time.time) -> None:
    """Sends the next events of a replay, as far as its rate, the queue and a slice of the worker's time allow."""
    client = redis.client()
    client.delete(keys.replay_ticket(uuid))
    if not client.set(keys.replay_lease(uuid), "1", nx=True, px=LEASE_MS):
        return
    try:
        _step(uuid, clock)
    except AWAY as error:
        log.warning("replay %s waits: %s", uuid, redis.explain(error) if isinstance(error, RedisError) else error)
        connection.close()  # a broken connection must not be used again
    finally:
        client.delete(keys.replay_lease(uuid))


def _step(uuid: str, clock: Clock) -> None:
    replay = Replay.objects.filter(uuid=uuid, state=Replay.State.RUNNING).first()
    if replay is None:
        return
    deadline = time.monotonic() + SLICE_SECONDS
    while True:
        room, why = _room()
        if room <= 0:
            _tell(replay, f"It waits: {why}.")
            return
        due = min(_due(replay, clock()), room, CHUNK_ROWS)
        if due <= 0:
            return
        if not _send_next(replay, due, clock()):
            return
        if time.monotonic() > deadline:
            queue_step(replay)
            return


def _room() -> tuple[int, str]:
    """How many events the queue takes before live traffic would suffer, and why when it takes none."""
    try:
        now = control.shared().snapshot()
        verdict = control.shared().verdict(max(events.PRIORITIES.values()))
    except Overloaded as refusal:
        return 0, refusal.detail.rstrip(".")
    if now.circuit.state != State.CLOSED:
        return 0, f"the circuit is {now.circuit.state}"
    warning = now.thresholds.warning
    if not verdict.accept or now.depth >= warning:
        return 0, f"the queue holds {now.depth} events, a replay continues below {warning}"
    return warning - now.depth, ""


def _due(replay: Replay, now: float) -> int:
    """Events that the rate allows at this moment: what has come due since the last ones, of one second at most."""
    return int((now - _rate_cursor(replay, now)) * replay.rate + 1e-6)


def _rate_cursor(replay: Replay, now: float) -> float:
    stored = redis.client().get(keys.replay_pace(str(replay.uuid)))
    return max(float(stored or 0), now - 1.0)


def _advance_rate(replay: Replay, number: int, now: float) -> None:
    """Before the events are sent: a crash in between makes a replay slower, never faster than it may be."""
    until = _rate_cursor(replay, now) + number / replay.rate
    redis.client().set(keys.replay_pace(str(replay.uuid)), repr(until), ex=60)


@dataclass(slots=True)
class _Chunk:
    """What became of some rows: events to send by way, and why others cannot be sent, by row id."""

    whole: dict[Slot, Sequence[Event]] = field(default_factory=dict)
    limited: dict[Slot, Sequence[Event]] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

    def add(self, row_id: int, event: Event) -> None:
        slot = slots.slot_of(event)
        way = self.whole if event.chains is None else self.limited
        way[slot] = [*way.get(slot, ()), event]
        self.sent.append(row_id)


def _send_next(replay: Replay, number: int, now: float) -> bool:
    """Sends up to `number` rows and notes how far it got; False when the replay has ended."""
    began = timezone.now()
    rows = list(_rows(replay)[:number])
    if not rows:
        _end(replay)
        return False
    chunk = _read(replay, rows)
    _advance_rate(replay, len(rows), now)
    needing = {*writing.append(chunk.whole), *_append_limited(chunk.limited)}
    control.shared().admitted(len(chunk.sent))
    going_on = _note(replay, rows, chunk, began)
    for slot in needing:
        tickets.issue(slot)
    return going_on


def _rows(replay: Replay) -> QuerySet[Any]:
    rows = filtersets.rows_of(replay.kind, replay.criteria).filter(id__gt=replay.last_id, status=Status.OPEN)
    if replay.kind == Replay.Kind.REJECTED:
        return rows.filter(event_id__isnull=False).order_by("id")
    return rows.select_related("chain").order_by("id")


def _read(replay: Replay, rows: Sequence[Any]) -> _Chunk:
    read = _of_rejected if replay.kind == Replay.Kind.REJECTED else _of_dead
    known = catalogue.shared().originators({_source(row) for row in rows})
    chunk, now = _Chunk(), datetime.now(UTC)
    for row in rows:
        try:
            event = read(row, known, now)
        except (Refusal, CannotReplay, msgspec.ValidationError) as error:
            chunk.failed[row.pk] = str(error)
        else:
            chunk.add(row.pk, _for_replay(event, with_commands=replay.with_commands))
    return chunk


def _source(row: RejectedEvent | DeadLetter) -> tuple[str, str]:
    source_type = row.source_type if isinstance(row, RejectedEvent) else row.event.get("source_type", "")
    return source_type, str(row.originator_uuid or "")


def _of_rejected(row: RejectedEvent, known: Mapping[tuple[str, str], Originator], now: datetime) -> Event:
    """The event, judged anew: sensors and variables may have changed since it was refused."""
    originator = _originator(row, known)
    payload = row.payload.encode()
    (event,) = events.decode(payload, originator, highest_priority=1, now=now, protocol=row.protocol)
    return msgspec.structs.replace(event, priority=row.priority or event.priority)


def _of_dead(row: DeadLetter, known: Mapping[tuple[str, str], Originator], now: datetime) -> Event:
    """The event from its first attempt on, for the chain alone that failed: others have done their part already."""
    if "base64" in row.event:
        raise CannotReplay("It is a journal entry that cannot be read.")
    event = msgspec.convert(row.event, Event)
    if event.source_type == events.CHAIN:
        # As a run that a person asked for: the schedule, which has moved on, would take it for a time that is over.
        event = msgspec.structs.replace(event, protocol=PROTOCOL)
    else:
        originator = _originator(row, known)
    if event.type in events.CLAIMABLE:
        events.decode(events.as_sent(event), originator, highest_priority=1, now=now, protocol=event.protocol)
    chains = event.chains
    if row.chain:
        if row.chain.stopped:
            raise CannotReplay(f"The rule chain {row.chain} is {row.chain.stopped}.")
        chains = (str(row.chain.uuid),)
    elif not row.failure_key.endswith(":"):
        raise CannotReplay("The rule chain in which it failed was deleted.")
    return msgspec.structs.replace(event, attempt=0, chains=chains)


def _originator(row: RejectedEvent | DeadLetter, known: Mapping[tuple[str, str], Originator]) -> Originator:
    source = _source(row)
    if source not in known:
        raise CannotReplay(f"The {source[0] or 'sender'} {source[1]} was deleted.")
    return known[source]


def _for_replay(event: Event, *, with_commands: bool) -> Event:
    """A pump must not start for what a sensor saw before, however short a time ago, unless a person wants it to."""
    return msgspec.structs.replace(event, command_deadline_us=ALL_COMMANDS_US if with_commands else NO_COMMANDS_US)


def _append_limited(batches: Mapping[Slot, Sequence[Event]]) -> list[Slot]:
    """Makes events durable that are for one chain only; gives the slots that need a drain ticket. Raises RedisError."""
    needing = []
    for slot, batch in batches.items():
        names = [
            named(slot.lane, slot.partition)
            for named in (keys.delayed, keys.ledger, keys.ticket, keys.depth_by_organization)
        ]
        pairs: Iterable[Any] = chain.from_iterable(
            (event.organization_id, events.encode_retry(event)) for event in batch
        )
        args: list[Any] = [int(time.time() * 1000), writing.TICKET_MS, *pairs]
        client = redis.journal_client(slot.partition)
        if redis.script(_RETRY)(keys=names, args=args, client=client):
            needing.append(slot)
    return needing


def _note(replay: Replay, rows: Sequence[Any], chunk: _Chunk, began: datetime) -> bool:
    """Marks the rows and moves the replay on; False when another worker has moved it meanwhile or it was stopped."""
    last_id = rows[-1].pk
    note = f"Could not be replayed: {list(chunk.failed.values())[-1]}" if chunk.failed else ""
    if not note and not replay.note.startswith("It waits"):
        note = replay.note
    with transaction.atomic():
        _mark(replay, chunk, began)
        for row in rows:
            if row.pk in chunk.failed:
                _note_failure(row, chunk.failed[row.pk])
        moved = Replay.objects.filter(pk=replay.pk, last_id=replay.last_id)
        alive = moved.filter(state=Replay.State.RUNNING).update(note=note[:500])
        moved.update(last_id=last_id, replayed=F("replayed") + len(chunk.sent), failed=F("failed") + len(chunk.failed))
    replay.last_id, replay.note = last_id, note
    return bool(alive)


def _mark(replay: Replay, chunk: _Chunk, began: datetime) -> None:
    rows = filtersets.rows_of(replay.kind, {"pk__in": chunk.sent, "status": Status.OPEN})
    if replay.kind == Replay.Kind.DEAD:
        # One that failed again in the meantime is a new failure, for people to decide about.
        rows = rows.filter(created_at__lte=began)
    rows.update(status=Status.REPLAYED, decided_at=timezone.now(), decided_by=replay.created_by)


def _note_failure(row: RejectedEvent | DeadLetter, why: str) -> None:
    name = "detail" if isinstance(row, RejectedEvent) else "error"
    text = getattr(row, name).split(" (replay: ")[0]
    suffix = f" (replay: {why[:200]})"
    setattr(row, name, text[: 500 - len(suffix)] + suffix)
    row.save(update_fields=[name])


def _tell(replay: Replay, note: str) -> None:
    if replay.note != note:
        Replay.objects.filter(pk=replay.pk, state=Replay.State.RUNNING).update(note=note[:500])


def _end(replay: Replay) -> None:
    note = "" if replay.note.startswith("It waits") else replay.note
    # Rows that were decided about or deleted meanwhile are not waited for.
    Replay.objects.filter(pk=replay.pk, state=Replay.State.RUNNING).update(
        state=Replay.State.DONE, ended_at=timezone.now(), total=F("replayed") + F("failed"), note=note
    )
