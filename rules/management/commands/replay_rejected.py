"""`manage.py replay_rejected`: filters in, what they choose shown by reason, and its replay followed to the end."""

from __future__ import annotations

import getpass
import time
from datetime import timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error as DatabaseError
from django.db.models import Count
from django.utils import timezone

from aemos.lib.progress import ProgressBar
from devices.models import Organization
from rules.admission import filtersets, replay
from rules.admission.replay import CannotReplay, ReplayRequest
from rules.engine.durations import check_duration, microseconds_of
from rules.models import Replay

LOOK_SECONDS = 0.5
# A replay that has not moved for so long may have nobody who works on it.
IDLE_SECONDS = 15.0


class Command(BaseCommand):
    help = (
        "Send events that were refused under overload into the queue again, with their own id and time. Workers do it, at the "
        "given rate and only while the queue is calm; this command starts it and shows how far it is. Ctrl-C ends the display, "
        "not the replay."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--reason", help="for example queue-critical, circuit-open or enqueue-error")
        parser.add_argument("--from", help="not older than: 30m, 2h, 1d, or a time such as 2026-05-01T06:00Z")
        parser.add_argument("--to", help="not newer than, written in the same ways")
        parser.add_argument("--organization", metavar="UUID", help="of this organization only")
        parser.add_argument("--lane", help="critical, normal or low")
        parser.add_argument(
            "--rate", type=int, default=replay.DEFAULT_RATE, help="events a second at most (default: %(default)s)"
        )
        parser.add_argument(
            "--with-commands", action="store_true", help="let chains switch devices; without it none is switched"
        )
        parser.add_argument("--dry-run", action="store_true", help="only count")
        parser.add_argument(
            "--dead-letters", action="store_true", help="replay dead letters instead of rejected events"
        )
        parser.add_argument("--stop", metavar="UUID", help="stop this replay, and do nothing else")
        parser.add_argument("--actor", default=getpass.getuser(), help="name for the record (default: %(default)s)")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            if options["stop"]:
                self._stop(options["stop"], actor=options["actor"])
                return
            request = _replay_request(options)
            self._show(request)
            if not options["dry_run"]:
                self._replay(request)
        except (CannotReplay, ValidationError) as error:
            raise CommandError(_error_text(error)) from error
        except DatabaseError as error:
            raise CommandError(f"The database cannot be reached: {error}") from error

    def _stop(self, uuid: str, *, actor: str) -> None:
        found = Replay.objects.filter(uuid=uuid).first()
        if found is None:
            raise CommandError(f"There is no replay {uuid}.")
        if not replay.stop(found, actor=actor):
            raise CommandError(f"The replay is {found.state} already.")
        self.stdout.write(f"Stopped after {found.replayed:,} events.")

    def _show(self, request: ReplayRequest) -> None:
        name = "reason" if request.kind == Replay.Kind.REJECTED else "error"
        groups = request.rows().order_by().values_list(name).annotate(number=Count("pk")).order_by("-number")
        total = 0
        for what, number in groups:
            total += number
            self.stdout.write(f"{number:>12,}  {what}")
        self.stdout.write(f"{total:>12,}  in all")

    def _replay(self, request: ReplayRequest) -> None:
        started = replay.start(request)
        self.stdout.write(f"Replay {started.uuid} at {started.rate} events/s at most.")
        try:
            ended = self._follow(started)
        except KeyboardInterrupt:
            self.stdout.write(f"\nThe replay continues. To stop it: manage.py replay_rejected --stop {started.uuid}")
            return
        self.stdout.write(
            f"{ended.state}: {ended.replayed:,} replayed, {ended.failed:,} could not be. {ended.note}".strip()
        )

    def _follow(self, started: Replay) -> Replay:
        moved_at, shown, before = time.monotonic(), "", started
        with ProgressBar(self.stdout, draw_seconds=0) as bar:
            while True:
                now = Replay.objects.get(pk=started.pk)
                bar.draw(now.replayed + now.failed, of=now.total)
                if now.state != Replay.State.RUNNING:
                    return now
                if now.last_id != before.last_id:
                    moved_at = time.monotonic()
                idle = time.monotonic() - moved_at > IDLE_SECONDS
                note = now.note or ("Nothing moves: is a worker and the scheduler running?" if idle else "")
                if note and note != shown:
                    self.stdout.write(f"\n{note}" if self.stdout.isatty() else note)
                    shown = note
                before = now
                time.sleep(LOOK_SECONDS)


def _replay_request(options: dict[str, Any]) -> ReplayRequest:
    kind = Replay.Kind.DEAD if options["dead_letters"] else Replay.Kind.REJECTED
    if options["dead_letters"] and options["reason"]:
        raise CommandError("Dead letters have no --reason.")
    named = {name: options[name] for name in ("reason", "lane") if options[name]}
    named |= {name: _moment(options[name], name) for name in ("from", "to") if options[name]}
    return ReplayRequest(
        kind=kind,
        criteria=filtersets.criteria(kind, named),
        organization=_organization(options["organization"]),
        rate=options["rate"],
        with_commands=options["with_commands"],
        actor=options["actor"],
    )


def _moment(text: str, name: str) -> str:
    """A time as the filters take it; durations are counted back from now."""
    if check_duration(text) is None:
        return (timezone.now() - timedelta(microseconds=microseconds_of(text))).isoformat()
    if text[:1].isdecimal() and "-" in text:
        return text
    raise CommandError(f"--{name} {text!r} is neither a duration such as 2h nor a time such as 2026-05-01T06:00Z.")


def _organization(uuid: str | None) -> Organization | None:
    if not uuid:
        return None
    try:
        return Organization.objects.get(uuid=uuid)
    except (Organization.DoesNotExist, ValidationError) as error:
        raise CommandError(f"There is no organization with the uuid {uuid}.") from error


def _error_text(error: CannotReplay | ValidationError) -> str:
    if isinstance(error, ValidationError) and hasattr(error, "error_dict"):
        return " ".join(f"{name}: {text}" for name, texts in error.message_dict.items() for text in texts)
    return " ".join(error.messages) if isinstance(error, ValidationError) else str(error)
