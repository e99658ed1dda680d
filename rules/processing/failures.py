"""Dead letters: failures of a batch in; kept for people when no attempt is left, or sent round again later."""

from __future__ import annotations

import base64
import time
import traceback
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from aemos.lib.text import storable
from rules import events
from rules.engine.bound import DeployedChain
from rules.events import Event
from rules.journal.lease import Entry
from rules.models import DeadLetter, RuleChain

DEFAULT_RETRIES = 3
RETRY_SECONDS = (1, 5, 25)
MAXIMUM_TRACEBACK = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One event that could not be finished: by which chain and node, if any, and whether another attempt can help."""

    event: Event
    error: str
    chain: DeployedChain | RuleChain | None = None
    node: str = ""
    permanent: bool = False
    traceback: str = ""

    @classmethod
    def of(cls, event: Event, error: Exception) -> Failure:
        """The failure that an unforeseen exception is."""
        text = f"{type(error).__name__}: {error}"
        return cls(event=event, error=text, traceback="".join(traceback.format_exception(error)))


def is_final(failure: Failure) -> bool:
    """Whether no further attempt will be made. `attempt` counts the runs that failed before this one."""
    retries = failure.chain.max_retries if failure.chain else DEFAULT_RETRIES
    return failure.permanent or failure.event.attempt >= retries


def keep(failures: Sequence[Failure], *, lane: str) -> None:
    """Writes the final ones in the current transaction. One that is there already, from a run that was cut off or from
    before a replay, is kept for people again, as it failed now."""
    rows = {row.failure_key: row for failure in failures if is_final(failure) and (row := _row(failure, lane))}
    DeadLetter.objects.bulk_create(
        rows.values(),
        update_conflicts=True,
        unique_fields=["failure_key"],
        update_fields=["error", "node", "attempts", "traceback", "created_at", "status", "decided_at", "decided_by"],
    )


def keep_unreadable(entry: Entry, *, lane: str, error: str) -> None:
    DeadLetter.objects.get_or_create(
        failure_key=f"{lane}:{entry.id.decode()}",
        defaults={
            "event_id": uuid.uuid4(),
            "lane": lane,
            "event": {"base64": base64.b64encode(entry.data).decode(), "events": entry.count},
            "error": storable(error, 500),
            "attempts": 1,
        },
    )


def next_attempts(failures: Iterable[Failure]) -> list[tuple[int, bytes]]:
    """Due time in ms and event, for each event of which something is to be tried again: only the chains that failed."""
    again: dict[str, list[Failure]] = {}
    for failure in failures:
        if not is_final(failure):
            again.setdefault(failure.event.id, []).append(failure)
    return [(_due_ms(group[0].event), events.encode_retry(_next_attempt(group))) for group in again.values()]


def _next_attempt(group: Sequence[Failure]) -> Event:
    chains = tuple(str(failure.chain.uuid) for failure in group if failure.chain)
    # Without a chain the event as a whole failed, and all of it is still to do.
    whole = any(failure.chain is None for failure in group)
    event = group[0].event
    return msgspec.structs.replace(event, attempt=event.attempt + 1, chains=event.chains if whole else chains)


def _due_ms(event: Event) -> int:
    wait = RETRY_SECONDS[min(event.attempt, len(RETRY_SECONDS) - 1)]
    return int(time.time() * 1000) + wait * 1000


def _row(failure: Failure, lane: str) -> DeadLetter:
    event, chain = failure.event, failure.chain
    return DeadLetter(
        failure_key=f"{event.id}:{chain.uuid if chain else ''}",
        event_id=event.id,
        organization_id=event.organization_id,
        lane=lane,
        originator_uuid=uuid.UUID(event.originator_uuid),
        event=msgspec.to_builtins(event),
        error=storable(failure.error, 500),
        chain_id=chain.id if chain else None,
        node=failure.node,
        attempts=event.attempt + 1,
        traceback=storable(failure.traceback, MAXIMUM_TRACEBACK),
    )
