"""One look at the queue: nothing in, what admission and journal know at this moment out, and how healthy that is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from django.conf import settings
from django.db import Error as DatabaseError
from redis.exceptions import RedisError

from aemos.lib import redis
from devices.exceptions import Overloaded
from notifications import broker_load
from notifications.broker_load import BrokerLoad
from rules.admission import circuit_store, control, rejections
from rules.admission.circuit import State, Thresholds
from rules.admission.circuit_store import Stored
from rules.admission.control import Snapshot
from rules.journal import pauses, queue_stats
from rules.journal.pauses import Pause
from rules.journal.queue_stats import Load

log = logging.getLogger(__name__)


class Health(IntEnum):
    """How full the queue is, as a number for Prometheus; the name in lower case is what people read."""

    UNKNOWN = -1
    HEALTHY = 0
    DEGRADED = 1
    WARNING = 2
    CRITICAL = 3

    @property
    def word(self) -> str:
        return self.name.lower()


def health_of(depth: int, thresholds: Thresholds, *, memory_full: bool = False) -> Health:
    """`depth` in events, measured against the thresholds in force. A full Redis accepts nothing, however short the queue."""
    if depth >= thresholds.critical or memory_full:
        return Health.CRITICAL
    if depth >= thresholds.warning:
        return Health.WARNING
    return Health.DEGRADED if depth >= thresholds.warning / 2 else Health.HEALTHY


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What Redis knows. `rejected`: reason -> refused events; `weaknesses`: sentences about its own settings.

    `broker` is None when no gateway hears what the broker says of itself.
    """

    snapshot: Snapshot
    load: Load
    rejected: Mapping[str, int]
    weaknesses: Sequence[str]
    broker: BrokerLoad | None
    paused: Mapping[str, Pause]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The queue as far as it is known: `known` is None while Redis is away, `stored` when the database is, too."""

    known: Known | None
    stored: Stored | None
    stale: bool
    configured: Thresholds

    @property
    def health(self) -> Health:
        if self.known is None:
            return Health.UNKNOWN
        return health_of(self.known.load.total.pending, self.thresholds, memory_full=self.known.snapshot.memory_full)

    @property
    def thresholds(self) -> Thresholds:
        """Those in force; the configured ones while it is not known how fast the queue drains."""
        return self.known.snapshot.thresholds if self.known else self.configured

    @property
    def threshold_source(self) -> str:
        """Where the thresholds in force come from."""
        lowered = self.known is not None and self.known.snapshot.limited_by_drain_rate
        return "drain-rate" if lowered else "configured"

    @property
    def circuit(self) -> State | None:
        return self.stored.state if self.stored else None

    @property
    def changed_at(self) -> datetime | None:
        """When the circuit moved last; None when it never did, or that is not known."""
        return self.stored.changed_at if self.stored and self.stored.version else None

    @property
    def enabled(self) -> bool:
        return bool(settings.ENABLE_BACKPRESSURE)

    @property
    def depth(self) -> int | None:
        """Events accepted and not finished, counted now: the snapshot that admission goes by is a little older."""
        return self.known.load.total.pending if self.known else None

    @property
    def workers(self) -> int | None:
        return len(self.known.load.workers) if self.known else None

    @property
    def rejected(self) -> int | None:
        return sum(self.known.rejected.values()) if self.known else None


def look() -> View:
    """Within about two seconds, also while Redis hangs."""
    known = _known()
    configured = control.configured_thresholds()
    if known:
        return View(known=known, stored=known.snapshot.circuit, stale=known.snapshot.stale, configured=configured)
    stored = stored_circuit()
    return View(known=None, stored=stored, stale=stored is None, configured=configured)


def _known() -> Known | None:
    try:
        snapshot = control.shared().snapshot()
        measured, rejected, weaknesses = queue_stats.measure(), rejections.counts(), redis.weaknesses()
        broker, paused = broker_load.recall(), pauses.current()
    except Overloaded as refusal:
        log.warning("the queue cannot be seen: %s", refusal.detail)
    except RedisError as error:
        log.warning("the queue cannot be seen: %s", redis.explain(error))
    else:
        # A part of the others, not a reason of its own.
        rejected.pop(rejections.UNRECORDED, None)
        return Known(
            snapshot=snapshot, load=measured, rejected=rejected, weaknesses=weaknesses, broker=broker, paused=paused
        )
    return None


def stored_circuit() -> Stored | None:
    """The state that the database holds; None while it is away."""
    try:
        return circuit_store.load()
    except DatabaseError as error:
        log.warning("the circuit's state is not known: %s", error)
        return None
