"""The way in, the same for HTTP, MQTT and CoAP: put a request's events into the journal, or refuse them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
from django.conf import settings
from gevent.event import AsyncResult
from redis.exceptions import RedisError

from aemos.lib import metrics, tracing
from aemos.lib.per_process import per_process
from aemos.lib.tracing import OpenSpan
from aemos.lib.turns import Turns
from devices.catalogue import Credential, Originator
from devices.exceptions import BadPayload, Forbidden, Overloaded, Refusal, Unauthorized
from devices.quality import data_problems
from devices.quality.data_problems import Kind
from rules import events, traces
from rules.admission import control, rejections
from rules.admission.circuit import Verdict
from rules.events import Event, Problem
from rules.journal.group_commit import GroupCommit

# So much is decoded in a fraction of a millisecond.
SHORT_BYTES = 2_000


class Result(NamedTuple):
    """The decision about one event of a batch, and the reason in one word."""

    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """How a request ended that was not refused as a whole: counts of events.

    `results` holds one decision per event; it is empty when all were accepted. `problems` says what could not be used at all, and
    counts nowhere else.
    """

    accepted: int
    rejected: int = 0
    results: tuple[Result, ...] = ()
    problems: tuple[Problem, ...] = ()

    def summary(self) -> dict[str, Any]:
        """What every protocol answers, JSON-ready."""
        found: dict[str, Any] = {"accepted": self.accepted, "rejected": self.rejected}
        return found | {"problems": msgspec.to_builtins(self.problems)} if self.problems else found

    def positions(self) -> list[int]:
        """Of the results, in the request."""
        left_out = {problem.index for problem in self.problems if problem.left_out == "event"}
        return [index for index in range(len(self.results) + len(left_out)) if index not in left_out]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a transport received. `credential` None: nobody was recognized; `uuid`: the originator that path or topic names."""

    payload: bytes
    credential: Credential | None
    protocol: str
    uuid: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Which events of a request may join the queue: a refusal for each priority that may not, a verdict where one was reached."""

    events: Sequence[Event]
    accepted: Sequence[Event]
    verdicts: Mapping[int, Verdict]
    refusals: Mapping[int, Overloaded]
    problems: Sequence[Problem] = ()


def submit(
    payload: bytes,
    *,
    credential: Credential | None,
    protocol: str,
    uuid: str | None = None,
    hold: bool = False,
    after: Pending | None = None,
    turns: Turns | None = None,
    trace: str = "",
) -> Pending:
    """Takes in one request; `wait` on the result before acknowledging anything.

    1. `read`: the sender is authorized, the payload becomes events.
    2. `decide`: admission gives a verdict for each priority among them.
    3. `record`: refused events are counted and recorded; when all are refused, it ends here.
    4. `commit`: accepted events join the next group that is written to the journal.
    5. `Pending.wait` returns the receipt once the journal has them.

    Raises devices.exceptions.Refusal, counted and recorded; then nothing of the request was accepted. With `hold` an
    Overloaded is neither counted nor recorded: the caller keeps the request and submits it again. `after` is the request of
    the same sender before this one, which was not waited for: this one fails where that one does, and cannot overtake it.
    `turns`: where many requests come at once, decoding waits for its turn. `trace` is the sender's W3C traceparent, if any.
    """
    began_ns = tracing.now_ns() if tracing.is_on() else 0
    request = Request(payload=payload, credential=credential, protocol=protocol, uuid=uuid)
    with turns.turn(short=len(payload) < SHORT_BYTES) if turns else nullcontext():
        batch, problems = read(request)
    span = None
    if began_ns:
        batch, span = traces.begin_receiving(batch, parent=trace, start_ns=began_ns)
    decision = decide(batch, problems)
    try:
        record(decision, hold=hold)
    except Overloaded as refusal:
        if span:
            span.end(error=refusal.detail)
        raise
    return commit(decision, hold=hold, after=after, span=span)


def now() -> datetime:
    """Django's looks a setting up each time, which takes as long as to decode a reading."""
    return datetime.now(UTC)


def read(request: Request) -> tuple[list[Event], list[Problem]]:
    """The events of an authorized sender, and what could not be used beside them, which is noted with what was sent.

    Raises Refusal, which is counted and recorded, too.
    """
    problems: list[Problem] = []
    try:
        sender = _authorized(request.credential, request.uuid)
        found = events.decode(
            request.payload,
            sender.originator,
            highest_priority=sender.highest_priority,
            now=now(),
            protocol=request.protocol,
            maximum_age_us=settings.MAX_EVENT_AGE_DAYS * events.DAY_US,
            problems=problems,
        )
    except Refusal as refusal:
        if isinstance(refusal, BadPayload) and request.credential:
            _note_problems(request.credential, request.payload, problems or [_as_problem(refusal)])
        rejections.record(
            refusal,
            request.payload,
            credential=request.credential,
            protocol=request.protocol,
            uuid=request.uuid,
        )
        raise
    if problems:
        _note_problems(sender, request.payload, problems)
    return found, problems


def _note_problems(sender: Credential, payload: bytes, problems: Sequence[Problem]) -> None:
    """Where people find what is bad of a sensor's data, counted by kind."""
    originator, shared = sender.originator, data_problems.shared()
    text = payload[: data_problems.MAXIMUM_PAYLOAD].decode("utf-8", "backslashreplace")
    for problem in problems:
        kind, name = _kind_of(problem, originator)
        key = data_problems.Key(originator.source_type, originator.uuid, name, kind)
        shared.note(key, originator.organization_id, detail=problem.detail, payload=text)
    shared.flush_soon()


def _kind_of(problem: Problem, originator: Originator) -> tuple[Kind, str]:
    """With the variable or state that is meant; what is none of them is not named, or a sender could make up rows."""
    place, _, name = problem.field.partition(".")
    if place == "timestamp":
        return (Kind.CLOCK_NOT_SET if events.CLOCK_NOT_SET in problem.detail else Kind.CLOCK), ""
    if place != "values" or not name:
        return Kind.EVENT, ""
    return (Kind.VALUE, name) if name in originator.fields else (Kind.UNKNOWN, "")


def _as_problem(refusal: BadPayload) -> Problem:
    return Problem(refusal.index, refusal.field, refusal.detail, "event")


def decide(batch: Sequence[Event], problems: Sequence[Problem] = ()) -> Decision:
    """One verdict per priority, so that events of one priority are accepted or refused together. Records nothing."""
    admission = control.shared()
    priorities = {event.priority for event in batch}
    try:
        verdicts = {priority: admission.verdict(priority, batch[0].organization_id) for priority in priorities}
    except Overloaded as unknown:
        refusals: dict[int, Overloaded] = dict.fromkeys(priorities, unknown)
        return Decision(events=batch, accepted=(), verdicts={}, refusals=refusals, problems=problems)
    refusals = {
        priority: admission.refusal(verdict, priority) for priority, verdict in verdicts.items() if not verdict.accept
    }
    accepted = [event for event in batch if event.priority not in refusals]
    return Decision(events=batch, accepted=accepted, verdicts=verdicts, refusals=refusals, problems=problems)


def record(decision: Decision, *, hold: bool) -> None:
    """Counts and records what was refused. Raises the most urgent refusal when nothing was accepted."""
    # A request that is accepted in part is answered, so what was refused of it does not come again.
    hold = hold and not decision.accepted
    for priority, refusal in decision.refusals.items():
        _refuse([event for event in decision.events if event.priority == priority], refusal, hold=hold)
    if not decision.accepted:
        raise decision.refusals[min(decision.refusals)]


def commit(decision: Decision, *, hold: bool, after: Pending | None = None, span: OpenSpan | None = None) -> Pending:
    """Sends the accepted events on their way into the journal."""
    # A sender may send its newest reading first: rules see them as they happened.
    accepted = sorted(decision.accepted, key=attrgetter("timestamp_us"))
    result = shared_commit().put(accepted, after=after.result if after else None)
    control.shared().admitted(len(decision.accepted), until=result)
    return Pending(result, decision.accepted, receipt=_receipt(decision), hold=hold, span=span)


class Pending:
    """Events on their way into the journal."""

    def __init__(
        self,
        result: AsyncResult[None],
        accepted: Sequence[Event],
        *,
        receipt: Receipt,
        hold: bool,
        span: OpenSpan | None = None,
    ) -> None:
        self.result = result
        self._accepted = accepted
        self._receipt = receipt
        self._hold = hold
        self._span = span

    def wait(self) -> Receipt:
        """Returns once the journal has the events. Raises Overloaded, as `submit` does, when they may not be there."""
        try:
            self.result.get()
        except RedisError as error:
            refusal = control.unavailable(error)
            if self._span:
                self._span.end(error=refusal.detail)
            _refuse(self._accepted, refusal, hold=self._hold)
            raise refusal from error
        if self._span:
            self._span.end()
        metrics.INGESTED.labels(self._accepted[0].protocol, "accepted").inc(self._receipt.accepted)
        return self._receipt


@per_process
def shared_commit() -> GroupCommit:
    """The group commit of this process."""
    return GroupCommit()


def _authorized(credential: Credential | None, uuid: str | None) -> Credential:
    if credential is None:
        raise Unauthorized("The token is missing, unknown, revoked or expired.")
    if uuid is not None and uuid.lower() != credential.originator.uuid:
        raise Forbidden("The token belongs to another sensor or device than the one addressed.")
    return credential


def _refuse(refused: Sequence[Event], refusal: Overloaded, *, hold: bool) -> None:
    if not hold:
        rejections.record_events(refused, refusal)
        refusal.recorded = True


def _receipt(decision: Decision) -> Receipt:
    accepted = len(decision.accepted)
    problems = tuple(decision.problems)
    if not decision.refusals:
        return Receipt(accepted=accepted, problems=problems)
    by_priority = {priority: Result(verdict.accept, verdict.reason) for priority, verdict in decision.verdicts.items()}
    results = tuple(by_priority[event.priority] for event in decision.events)
    return Receipt(accepted=accepted, rejected=len(results) - accepted, results=results, problems=problems)
