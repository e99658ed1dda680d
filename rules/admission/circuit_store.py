"""The circuit's state in the database: one row for all processes, changed by compare-and-set, every change written down."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from django.db import transaction
from django.utils import timezone

from rules.admission.circuit import Reason, State
from rules.models import CircuitState, CircuitTransition

_NO_HOLD = {"held_by": "", "held_until": None, "note": ""}
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A person keeps the circuit open: until a time, or with None until somebody closes it."""

    by: str
    until: datetime | None = None
    note: str = ""

    def __str__(self) -> str:
        until = f"until {self.until:%Y-%m-%d %H:%M} UTC" if self.until else "until somebody closes it"
        return f"{self.by} keeps the circuit open {until}" + (f": {self.note}" if self.note else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The row as it was read. Version 0 is a circuit that never moved."""

    state: State = State.CLOSED
    version: int = 0
    changed_at: datetime = _NEVER
    hold: Hold | None = None

    def held(self, now: datetime) -> Hold | None:
        """The hold of a person, as long as it lasts."""
        return self.hold if self.hold and (self.hold.until is None or now < self.hold.until) else None


def load() -> Stored:
    """One query. Raises django.db.Error."""
    row = CircuitState.objects.filter(pk=CircuitState.SOLE_ID).first()
    if row is None:
        return Stored()
    hold = Hold(by=row.held_by, until=row.held_until, note=row.note) if row.held_by else None
    return Stored(state=State(row.state), version=row.version, changed_at=row.changed_at, hold=hold)


def move(
    seen: Stored, to: State, reason: str, *, queue_depth: int | None, actor: str = "", hold: Hold | None = None
) -> bool:
    """Changes the state if it is still as it was seen; False when another process was first. Raises django.db.Error.

    A hold ends with every move that brings no new one.
    """
    kept = {"held_by": hold.by, "held_until": hold.until, "note": hold.note} if hold else _NO_HOLD
    now = timezone.now()
    with transaction.atomic():
        CircuitState.objects.get_or_create(pk=CircuitState.SOLE_ID)
        changed = CircuitState.objects.filter(pk=CircuitState.SOLE_ID, version=seen.version)
        if not changed.update(state=to, version=seen.version + 1, changed_at=now, **kept):
            return False
        CircuitTransition.objects.create(
            from_state=seen.state, to_state=to, reason=reason, queue_depth=queue_depth, actor=actor, at=now
        )
    return True


def force(
    to: State, *, actor: str, queue_depth: int | None, reason: str = Reason.MANUAL, hold: Hold | None = None
) -> None:
    """A person sets the state; written down also when it is the same. Automatic transitions continue from there, or after the
    hold."""
    while not move(load(), to, reason, queue_depth=queue_depth, actor=actor, hold=hold):
        pass  # somebody was faster: look again


def hold_open(hold: Hold, *, queue_depth: int | None) -> None:
    """A person opens the circuit, and it stays open."""
    force(State.OPEN, actor=hold.by, queue_depth=queue_depth, reason=Reason.HELD, hold=hold)


def reset(actor: str, queue_depth: int | None) -> None:
    """A person closes the circuit."""
    force(State.CLOSED, actor=actor, queue_depth=queue_depth, reason=Reason.RESET)
