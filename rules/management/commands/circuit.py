"""`manage.py circuit status|open|close|reset`: shows the queue's circuit, or sets it as a person may."""

from __future__ import annotations

import getpass
from datetime import datetime, timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error as DatabaseError
from django.utils import timezone

from devices.exceptions import Overloaded
from rules.admission import circuit_store, control
from rules.admission.circuit import Reason, State
from rules.admission.control import Snapshot
from rules.engine.durations import check_duration, microseconds_of
from rules.models import CircuitTransition

SHOWN_TRANSITIONS = 10


class Command(BaseCommand):
    help = (
        "Show the circuit of the queue, or set it. What is set is written to the transition log with your name. A circuit that "
        "you open stays open until you close it, or for the time that you give; once closed, the depth of the queue moves it on."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "action",
            choices=["status", "open", "close", "reset"],
            help="status: show it; open: accept urgent events only; close or reset: accept again",
        )
        parser.add_argument(
            "--for", metavar="TIME", help="open: for so long, such as 30m or 2h, and then by itself no more"
        )
        parser.add_argument("--note", default="", help="open: why; shown to those who are refused and in health")
        parser.add_argument("--actor", default=getpass.getuser(), help="name for the log (default: %(default)s)")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            depth = _depth()
            if options["action"] != "status":
                _set(options, depth=depth)
            self._show()
        except DatabaseError as error:
            raise CommandError(f"The database cannot be reached: {error}") from error

    def _show(self) -> None:
        stored = circuit_store.load()
        self.stdout.write(
            f"state       {stored.state} (version {stored.version}, since {stored.changed_at:%Y-%m-%d %H:%M:%S} UTC)"
        )
        if hold := stored.held(timezone.now()):
            self.stdout.write(f"held        {hold}")
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
    rate = "not known yet" if now.total_drain_rate is None else f"{now.total_drain_rate:.3g} events/s"
    lowered = f" (lowered from {now.configured.critical}: the workers are slow)" if now.limited_by_drain_rate else ""
    return [
        f"queue       {now.depth} events ({lanes}), drained at {rate}",
        f"thresholds  recovery {limits.recovery}, warning {limits.warning}, critical {limits.critical}, "
        f"hard {now.configured.hard}{lowered}",
        f"enabled     {'yes' if now.enabled else 'no (ENABLE_BACKPRESSURE=false)'}",
    ]


def _set(options: dict[str, Any], *, depth: int | None) -> None:
    action, actor, duration = options["action"], options["actor"], options["for"]
    if action != "open" and (duration or options["note"]):
        raise CommandError("--for and --note belong to open.")
    if action == "open":
        until = _end_of(duration) if duration else None
        circuit_store.hold_open(
            circuit_store.Hold(by=actor, until=until, note=options["note"][:200]), queue_depth=depth
        )
    elif action == "close":
        circuit_store.force(State.CLOSED, actor=actor, queue_depth=depth, reason=Reason.MANUAL)
    else:
        circuit_store.reset(actor, depth)


def _end_of(duration: str) -> datetime:
    if problem := check_duration(duration):
        raise CommandError(f"--for {problem}.")
    return timezone.now() + timedelta(microseconds=microseconds_of(duration))


def _depth() -> int | None:
    try:
        return control.shared().snapshot().depth
    except Overloaded:
        return None
