"""`manage.py runscheduler`: does what time, not an event, calls for; of several that run, one leads."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.db import Error as DatabaseError
from django.db import close_old_connections
from redis.exceptions import RedisError

from aemos.lib import keys, metrics, redis
from aemos.lib.leader import Leader
from devices import commands
from notifications import overdue
from notifications import retention as history
from rules import alarms, backpressure, recovery, replay, retention, schedules, states, timers

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
DUTIES: tuple[Callable[[], object], ...] = (
    schedules.fire_due,
    timers.fire_due,
    recovery.reissue_lost_tickets,
    states.sweep,
    commands.expire_overdue,
    overdue.settle,
    backpressure.advance_circuit,
    replay.queue_steps,
    alarms.calm_down,
    retention.delete_expired,
    history.delete_expired,
)


class Command(BaseCommand):
    help = (
        "Run rule chains on schedule and when their time has come, queue lost drain tickets again, publish notifications "
        "that a crash left in the outbox, move the circuit and replays on, tell of alarms that have calmed down, delete what "
        "is too old. Run two or more: one "
        "leads, another takes over within five seconds when it dies."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--once", action="store_true", help="Do every duty once, leading or not, and end.")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["once"]:
            for duty in DUTIES:
                duty()
            return
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        self.stdout.write("The scheduler runs; Ctrl-C stops it.")
        _run(stop)


def _run(stop: threading.Event) -> None:
    leader = Leader(keys.SCHEDULER_LEADER)
    while not stop.wait(TICK_SECONDS):
        if leader.leads_or(False):
            _do_duties()
    leader.resign()


def _do_duties() -> None:
    """Each on its own: what one of them stumbles over must not keep the others from their work, except that all need Redis."""
    for duty in DUTIES:
        name = f"{duty.__module__}.{duty.__qualname__}"
        try:
            duty()
        except RedisError as error:
            log.warning("the scheduler waits: %s", redis.explain(error))
            return  # the others need it, too
        except DatabaseError as error:
            log.warning("%s waits, the database is away: %s", name, error)
        except Exception:  # the process loop: a standby would stumble over the same
            metrics.SCHEDULER_FAILURES.labels(name).inc()
            log.exception("%s failed and is tried again", name)
        finally:
            close_old_connections()
    metrics.flush()  # no greenlet of this process would
