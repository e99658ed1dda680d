"""`manage.py runscheduler`: run the periodic tasks; of several schedulers, one leads and the others stand by."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser
from django.db import Error as DatabaseError
from django.db import close_old_connections
from redis.exceptions import RedisError

from aemos.lib import keys, metrics, redis
from aemos.lib.leader import Leader
from devices.audit import chain as audit
from devices.history import retention as history_retention
from devices.history import rollups
from monitoring import recent
from notifications import upkeep
from rules import retention
from rules.admission import control, replay
from rules.effects import alarms, device_alarms, fail_safe, states
from rules.journal import recovery
from rules.processing import schedules, timers

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
PERIODIC_TASKS: tuple[Callable[[], object], ...] = (
    fail_safe.switch_off_overdue,
    schedules.fire_due,
    timers.fire_due,
    recovery.reissue_lost_tickets,
    states.sweep,
    device_alarms.expire_commands,
    upkeep.expire_and_republish,
    control.advance_circuit,
    recent.record,
    replay.queue_steps,
    alarms.end_flapping,
    audit.seal,
    audit.delete_old,
    rollups.roll_up,
    history_retention.delete_old,
    retention.delete_expired,
    upkeep.delete_old,
)


class Command(BaseCommand):
    help = (
        "Run the periodic tasks: schedules and timers of rule chains, lost drain tickets, notifications that a crash left in "
        "the outbox, the circuit, replays, flapping alarms, the audit log, retention. Run two or more: one leads, and another "
        "takes over within five seconds when it dies."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--once", action="store_true", help="Run every task once, leading or not, and exit.")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["once"]:
            for task in PERIODIC_TASKS:
                task()
            return
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        if settings.LOG_FORMAT == "json":
            log.info("The scheduler is running")
        else:
            self.stdout.write("The scheduler is running; Ctrl-C stops it.")
        _run(stop)


def _run(stop: threading.Event) -> None:
    leader = Leader(keys.SCHEDULER_LEADER)
    while not stop.wait(TICK_SECONDS):
        if leader.leads_or(False):
            _run_tasks()
    leader.resign()


def _run_tasks() -> None:
    """Run each task on its own: the failure of one must not keep the others from running, unless it is Redis that is away."""
    for task in PERIODIC_TASKS:
        name = f"{task.__module__}.{task.__qualname__}"
        try:
            task()
        except RedisError as error:
            log.warning("the scheduler waits: %s", redis.explain(error))
            return  # the others need it, too
        except DatabaseError as error:
            log.warning("%s waits for the database: %s", name, error)
        except Exception:  # the process loop: a standby would fail in the same way
            metrics.SCHEDULER_FAILURES.labels(name).inc()
            log.exception("%s failed and is tried again", name)
        finally:
            close_old_connections()
    metrics.flush()  # no greenlet of this process would
