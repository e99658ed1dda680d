"""`manage.py circuit status|open|close|reset`: shows the queue's circuit, or sets it as a person may."""

from __future__ import annotations

import getpass
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error as DatabaseError

from devices.exceptions import Overloaded
from rules.admission import circuit_store, control
from rules.admission.circuit import Reason, State
from rules.admission.control import Snapshot
from rules.models import CircuitTransition

SHOWN_TRANSITIONS = 10


class Command(BaseCommand):
    help = (
        "Show the circuit of the queue, or set it. What is set is written to the transition log with your name; the depth of "
        "the queue then moves it on as ever."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "action",
            choices=["status", "open", "close", "reset"],
            help="status: show it; open: accept urgent events only; close or reset: accept again",
        )
        parser.add_argument("--actor", default=getpass.getuser(), help="name for the log (default: %(default)s)")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            depth = _depth()
            if options["action"] != "status":
                _set(options["action"], actor=options["actor"], depth=depth)
            self._show()
        except DatabaseError as error:
            raise CommandError(f"The database cannot be reached: {error}") from error

    def _show(self) -> None:
        stored = circuit_store.load()
        self.stdout.write(
            f"state       {stored.state} (version {stored.version}, since {stored.changed_at:%Y-%m-%d %H:%M:%S} UTC)"
        )
        try:
            for line in _load_lines(control.shared().snapshot()):
                self.stdout.write(line)
        except Overloaded as refusal:
            self.stdout.write(f"queue       unknown: {refusal.detail}")
        for row in CircuitTransition.objects.all()[:SHOWN_TRANSITIONS]:
            by = f" by {row.actor}" if row.actor else ""
            self.stdout.write(
                f"{row.at:%Y-%m-%d %H:%M:%S}  {row.from_state} -> {row.to_state}: {row.reason} at {row.queue_depth}{by}"
            )


def _load_lines(now: Snapshot) -> list[str]:
    limits = now.thresholds
    lanes = ", ".join(f"{lane} {depth}" for lane, depth in now.lanes.items())
    return [
        f"queue       {now.depth} events ({lanes})",
        f"thresholds  recovery {limits.recovery}, warning {limits.warning}, critical {limits.critical}, "
        f"hard {now.configured.hard}",
        f"enabled     {'yes' if now.enabled else 'no (ENABLE_BACKPRESSURE=false)'}",
    ]


def _set(action: str, *, actor: str, depth: int | None) -> None:
    if action == "open":
        circuit_store.force(State.OPEN, actor=actor, queue_depth=depth)
    elif action == "close":
        circuit_store.force(State.CLOSED, actor=actor, queue_depth=depth, reason=Reason.MANUAL)
    else:
        circuit_store.reset(actor, depth)


def _depth() -> int | None:
    try:
        return control.shared().snapshot().depth
    except Overloaded:
        return None
