"""How fast the queue drains, in events per second, and how late an event is therefore, in seconds. Pure.

Waiting in the strict order of lanes: delay of a lane = backlog of it and of the lanes before it / (drain rate - arrivals of the
lanes before it). Little's law turns a budget of seconds into a limit of events.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Mapping, Sequence

SMOOTHING_SECONDS = 10.0
# A collapse must show before ten seconds have smoothed it in.
RECENT_SECONDS = 2.0
RETRY_AFTER_SECONDS = (1, 300)
UNKNOWN_RETRY_SECONDS = 10.0
# In events a second. A smoothed rate that sinks for hours ends near zero, where a share of it is no number to divide by.
SLOWEST_RATE = 0.001


class Rate:
    """Events per second of a growing count: exponentially smoothed, and not above what the last two seconds show.

    None until it was observed for two seconds. Times are seconds of any one clock.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque()
        self._smoothed: float | None = None
        self._observed_seconds = 0.0

    def observe(self, now: float, count: int, *, counts: bool = True) -> None:
        """Takes a sample. Time in which nothing could have happened (`counts` false: no backlog) does not enter the rate."""
        if self._recent and counts:
            then, before = self._recent[-1]
            self._smooth(now - then, count - before)
        if not counts:
            self._recent.clear()
        self._recent.append((now, count))
        while now - self._recent[0][0] > RECENT_SECONDS and len(self._recent) > 2:
            self._recent.popleft()

    def _smooth(self, seconds: float, events: int) -> None:
        if seconds <= 0:
            return
        self._observed_seconds += seconds
        rate = max(0.0, events / seconds)  # a count that went back was reset, not undone
        if self._smoothed is None:
            self._smoothed = rate
        else:
            self._smoothed += (rate - self._smoothed) * (1 - math.exp(-seconds / SMOOTHING_SECONDS))

    @property
    def value(self) -> float | None:
        if self._smoothed is None or self._observed_seconds < RECENT_SECONDS:
            return None
        return self._smoothed

    @property
    def cautious(self) -> float | None:
        """The lower of the smoothed rate and that of the last two seconds."""
        smoothed = self.value
        if smoothed is None or len(self._recent) < 2:
            return smoothed
        (then, before), (now, count) = self._recent[0], self._recent[-1]
        return min(smoothed, max(0.0, (count - before) / (now - then))) if now > then else smoothed


def delays(
    lanes: Sequence[str], *, depths: Mapping[str, int], drain_rate: float | None, arrivals: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Estimated seconds from acceptance to effect per lane, in the order in which they are served.

    0 without a backlog; None when it is not known; infinity when the lanes before take all there is.
    """
    found: dict[str, float | None] = {}
    backlog, ahead = 0, 0.0
    for lane in lanes:
        backlog += depths[lane]
        found[lane] = _delay(backlog, drain_rate, ahead)
        ahead += arrivals[lane] or 0.0
    return found


def _delay(backlog: int, drain_rate: float | None, ahead: float) -> float | None:
    if backlog == 0:
        return 0.0
    if drain_rate is None:
        return None
    return backlog / (drain_rate - ahead) if drain_rate > ahead else math.inf


def retry_after(depth: int, *, drain_rate: float | None, arrivals: float, budget_seconds: float) -> int:
    """Whole seconds until the backlog should be back to half its budget, spread so that not all come back at once."""
    if not drain_rate:
        seconds = UNKNOWN_RETRY_SECONDS
    else:
        drain_rate = max(drain_rate, SLOWEST_RATE)
        surplus = max(drain_rate - arrivals, 0.05 * drain_rate)
        seconds = (depth - drain_rate * budget_seconds / 2) / surplus
    spread = seconds * random.uniform(1.0, 1.5)  # noqa: S311  not a secret
    low, high = RETRY_AFTER_SECONDS
    return math.ceil(min(max(spread, low), high))
