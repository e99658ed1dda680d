"""`manage.py lane status|pause|resume`: shows which lanes of the queue are paused, pauses one, or lets it go on."""

from __future__ import annotations

import getpass
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from redis.exceptions import RedisError

from aemos.lib import redis
from rules.engine.durations import check_duration, microseconds_of
from rules.events import Lane
from rules.journal import ledger, pauses


class Command(BaseCommand):
    help = (
        "Show the lanes of the queue, or pause one: its events are accepted and wait, in their order, while you mend something. "
        "A pause ends by itself. Urgent events cannot be paused."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", choices=["status", "pause", "resume"])
        parser.add_argument("lane", nargs="?", choices=list(pauses.PAUSABLE), help="pause and resume: which")
        parser.add_argument(
            "--for", metavar="TIME", help="pause: for so long, such as 30m or 2h; at most 24h (default: 1h)"
        )
        parser.add_argument("--note", default="", help="pause: why; shown in health and on the operations page")
        parser.add_argument("--actor", default=getpass.getuser(), help="your name (default: %(default)s)")

    def handle(self, *args: Any, **options: Any) -> None:
        action, lane = options["action"], options["lane"]
        if (action == "status") != (lane is None):
            raise CommandError("Name the lane that is to be paused or resumed, and none for status.")
        if action != "pause" and (options["for"] or options["note"]):
            raise CommandError("--for and --note belong to pause.")
        try:
            if action == "pause":
                self._pause(lane, options)
            elif action == "resume" and not pauses.resume(lane):
                raise CommandError(f"{lane} is not paused.")
            self._show()
        except RedisError as error:
            raise CommandError(f"Redis cannot be reached: {redis.explain(error)}") from error

    def _pause(self, lane: str, options: dict[str, Any]) -> None:
        duration = options["for"] or "1h"
        if problem := check_duration(duration):
            raise CommandError(f"--for {problem}.")
        try:
            seconds = microseconds_of(duration) / 1e6
            pauses.pause(lane, by=options["actor"][:150], seconds=seconds, note=options["note"][:200])
        except ValueError as error:
            raise CommandError(f"{error}.") from error

    def _show(self) -> None:
        paused, depth = pauses.current(), ledger.counts().depth
        for lane in Lane:
            self.stdout.write(f"{lane:9} {depth[lane]:8,} events  {paused.get(lane, 'running')}")
