"""The way in, the same for HTTP, MQTT and CoAP: bytes of a known sender in, events in the journal or a refusal out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import NamedTuple

from gevent.event import AsyncResult
from redis.exceptions import RedisError

from aemos.lib import metrics
from devices.catalogue import Credential
from devices.exceptions import Forbidden, Overloaded, Refusal, Unauthorized
from rules import events
from rules.admission import control, rejections
from rules.admission.circuit import Verdict
from rules.events import Event
from rules.journal.group_commit import GroupCommit


class Result(NamedTuple):
    """The decision about one event of a batch, and the reason in one word."""

    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """How a request ended that was not refused as a whole: counts of events.

    `results` holds one decision per event; it is empty when all were accepted.
    """

    accepted: int
    rejected: int = 0
    results: tuple[Result, ...] = ()


def submit(
    payload: bytes, *, credential: Credential | None, protocol: str, uuid: str | None = None, hold: bool = False
) -> Pending:
    """Judges a request and sends its events on their way; `wait` on the result before acknowledging anything.

    `uuid` is the originator that the path or topic names. Raises devices.exceptions.Refusal, counted and recorded; then
    nothing of the request was accepted. With `hold` an Overloaded is neither: the caller keeps the request and tries again.
    """
    try:
        sender = _authorized(credential, uuid)
        batch = events.decode(
            payload,
            sender.originator,
            highest_priority=sender.highest_priority,
            now=datetime.now(UTC),
            protocol=protocol,
        )
    except Refusal as refusal:
        rejections.record(refusal, payload, credential=credential, protocol=protocol, uuid=uuid)
        raise
    verdicts = _verdicts(batch, hold=hold)
    accepted = [event for event in batch if verdicts[event.priority].accept]
    control.shared().admitted(len(accepted))
    receipt = _receipt(batch, verdicts, len(accepted))
    return Pending(shared_commit().put(accepted), accepted, receipt=receipt, hold=hold)


class Pending:
    """Events on their way into the journal."""

    def __init__(self, result: AsyncResult[None], accepted: Sequence[Event], *, receipt: Receipt, hold: bool) -> None:
        self._result = result
        self._accepted = accepted
        self._receipt = receipt
        self._hold = hold

    def wait(self) -> Receipt:
        """Returns once the journal has the events; raises Overloaded, as `submit` does, when it may not have them."""
        try:
            self._result.get()
        except RedisError as error:
            refusal = control.unavailable(error)
            _refuse(self._accepted, refusal, hold=self._hold)
            raise refusal from error
        metrics.INGESTED.labels(self._accepted[0].protocol, "accepted").inc(self._receipt.accepted)
        return self._receipt


@cache
def shared_commit() -> GroupCommit:
    """The group commit of this process."""
    return GroupCommit()


def _authorized(credential: Credential | None, uuid: str | None) -> Credential:
    if credential is None:
        raise Unauthorized("The token is missing, unknown, revoked or expired.")
    if uuid is not None and uuid.lower() != credential.originator.uuid:
        raise Forbidden("The token belongs to another sensor or device than the one addressed.")
    return credential


def _verdicts(batch: Sequence[Event], *, hold: bool) -> dict[int, Verdict]:
    """The decision about each priority of the batch. Raises Overloaded when none may go on."""
    admission = control.shared()
    priorities = {event.priority for event in batch}
    try:
        verdicts = {priority: admission.verdict(priority, batch[0].organization_id) for priority in priorities}
    except Overloaded as refusal:
        _refuse(batch, refusal, hold=hold)
        raise
    refusals = {
        priority: admission.refusal(verdict, priority) for priority, verdict in verdicts.items() if not verdict.accept
    }
    whole = len(refusals) == len(verdicts)
    for priority, told in refusals.items():
        _refuse([event for event in batch if event.priority == priority], told, hold=hold and whole)
    if whole:
        raise refusals[min(refusals)]
    return verdicts


def _refuse(refused: Sequence[Event], refusal: Overloaded, *, hold: bool) -> None:
    if not hold:
        rejections.record_events(refused, refusal)
        refusal.recorded = True


def _receipt(batch: Sequence[Event], verdicts: Mapping[int, Verdict], accepted: int) -> Receipt:
    if accepted == len(batch):
        return Receipt(accepted=accepted)
    decided = {priority: Result(verdict.accept, verdict.reason) for priority, verdict in verdicts.items()}
    results = tuple(decided[event.priority] for event in batch)
    return Receipt(accepted=accepted, rejected=len(batch) - accepted, results=results)
