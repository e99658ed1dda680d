"""Conditions over time: compile `for`, `within` and the other time keys of a leaf.

"for": "5m"                     true without interruption for that long
"times": 3, "within": "10m"     true that often within that time
"releaseAt": 6.2                a dead band: once true, it stays true until the value is beyond this
"per": "1m"                     the change per minute is compared, not the value
"increase": "1h"                how much a counter grew within an hour is compared, over its restarts
"median": 5                     the median of the newest five readings is compared
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

from rules.engine import temporal_state
from rules.engine.ages import reached
from rules.engine.comparisons import Evaluate
from rules.engine.context import Scope
from rules.engine.durations import check_duration, microseconds_of
from rules.engine.fields import Fields, check_number, is_number
from rules.engine.operators import OPERATORS
from rules.engine.temporal_state import Decide, Observe
from rules.engine.values import Reference, Sample, TemporalCondition, Timer

RELEASE_KEYS = ("releaseAt", "off")
"""Of a dead band: the name, and the one that it had first, which stored chains may have."""

TIME_KEYS = ("for", "times", "within", *RELEASE_KEYS, "per", "increase", "median")

MAX_TIMES = 100
"""Hits that one condition remembers."""

MAX_MEDIAN = 101
"""Readings that a median is of."""

DAY_US = microseconds_of("1d")
REBUILD_READINGS = 10_000
"""Stored readings from which a condition is rebuilt at most."""

_TOGETHER = (
    {"for"},
    {"releaseAt"},
    {"for", "releaseAt"},
    {"off"},
    {"for", "off"},
    {"times", "within"},
    {"per"},
    {"increase"},
    {"median"},
)
_BACK = {">": "<", ">=": "<", "<": ">", "<=": ">"}
"""Beyond `releaseAt` is on the other side of it."""

_ON_RATES = (*_BACK, "between")
_OF_NUMBERS = ("per", "increase", "median")
"""Keys with which something else is compared than the value."""


EXAMPLES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "`for`",
        "the comparison was true for every reading from one to the newest, and the time between the two is at least this long",
        {"operator": ">", "value": 6.5, "for": "5m"},
    ),
    (
        "`times`, `within`",
        f"the comparison was true for this number of readings (1 to {MAX_TIMES}) within this time, counted back from the newest "
        "reading or the event; it stays true while there are that many, also at a reading for which the comparison is false",
        {"operator": "<", "value": 20, "times": 3, "within": "10m"},
    ),
    (
        "`releaseAt`",
        "dead band: the comparison was true, and no value since then was beyond `releaseAt` (below it with > and >=, above it "
        "with < and <=); in between it stays what it was. Chains of before may call it `off`",
        {"operator": ">", "value": 6.5, "releaseAt": 6.2},
    ),
    (
        "`releaseAt`, `for`",
        "the dead band was true for that long without interruption",
        {"operator": ">", "value": 6.5, "releaseAt": 6.2, "for": "5m"},
    ),
    (
        "`per`",
        "the comparison is true of the rate of change: the difference of the newest two readings, divided by the time between "
        "them, per this time; it is below zero when values fall. With > >= < <= and between. A reading less than a second after "
        "the one before it is skipped",
        {"operator": "<", "value": -0.5, "per": "1m"},
    ),
    (
        "`increase`",
        "the comparison is true of how much a counter grew in this time, back from the newest reading or the run. A reading "
        "below the one before it says that the counter began anew at 0; between two readings it is taken to have grown evenly. "
        "With > >= < <= and between",
        {"operator": ">=", "value": 100, "increase": "1h"},
    ),
    (
        "`median`",
        f"the comparison is true of the median of the newest readings, this many (an odd number from 3 to {MAX_MEDIAN}): an "
        "outlier changes nothing. False until there are that many. With > >= < <= and between",
        {"operator": ">", "value": 6.5, "median": 5},
    ),
]
"""Which keys, what the leaf with them means and an example; shown to people."""


class Leaf(NamedTuple):
    """A leaf that compiled, without its time keys."""

    reference: Reference
    symbol: str
    operand: Any
    duration_us: int
    evaluate: Evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The time keys of a leaf, durations in microseconds; 0 or None stand for a key that is absent."""

    for_us: int = 0
    times: int = 0
    within_us: int = 0
    release_at: float | None = None
    per_us: int = 0
    increase_us: int = 0
    median_of: int = 0


def check_count(value: object) -> str | None:
    """Refuse what is not a whole number from 1 to MAX_TIMES."""
    return None if type(value) is int and 1 <= value <= MAX_TIMES else f"must be a whole number from 1 to {MAX_TIMES}"


def check_odd(value: object) -> str | None:
    """Refuse what is not an odd number of readings of which one is in the middle."""
    if type(value) is int and 3 <= value <= MAX_MEDIAN and value % 2:
        return None
    return f"must be an odd whole number from 3 to {MAX_MEDIAN}"


def read_timing(fields: Fields, *, source_type: str, symbol: str, operand: Any) -> Timing | None:
    """Read the time keys of a leaf; None if it has none. Problems are noted in `fields`; then the result means nothing."""
    given = [key for key in TIME_KEYS if key in fields]
    if not given:
        return None
    _refuse_where_out_of_place(fields, given, source_type=source_type, symbol=symbol)
    release_key = "off" if "off" in fields else "releaseAt"
    counted = "times" in fields or "within" in fields
    timing = Timing(
        for_us=_duration(fields, "for"),
        times=fields.get("times", check_count) if counted else 0,
        within_us=_duration(fields, "within", required=counted),
        release_at=fields.get(release_key, check_number) if release_key in fields else None,
        per_us=_duration(fields, "per"),
        increase_us=_duration(fields, "increase"),
        median_of=fields.get("median", check_odd) or 0 if "median" in fields else 0,
    )
    if timing.release_at is not None and symbol in _BACK and is_number(operand):
        _refuse_wrong_side(fields, release_key, timing.release_at, symbol=symbol, operand=operand)
    return timing


def _duration(fields: Fields, key: str, *, required: bool = False) -> int:
    if not required and key not in fields:
        return 0
    text = fields.get(key, check_duration)
    return microseconds_of(text) if text else 0


def _refuse_where_out_of_place(fields: Fields, given: list[str], *, source_type: str, symbol: str) -> None:
    """Each key with operators for which it means something, on sources that have readings, and beside keys it goes with."""
    for key in given:
        allowed = _BACK if key in RELEASE_KEYS else _ON_RATES if key in _OF_NUMBERS else None
        if allowed and symbol not in allowed:
            fields.refuse(key, f"goes with {', '.join(allowed)} only, not with {symbol}")
        elif not OPERATORS[symbol].compares:
            fields.refuse(key, f"goes with operators that compare the value, such as >; {symbol} does not")
        elif source_type == "device" and key != "for":
            fields.refuse(key, "is for sensors: the state of a device stands until it is changed, and has no readings")
    if not any(set(given) <= together for together in _TOGETHER):
        fields.refuse(
            given[-1],
            f"{', '.join(given)} cannot be combined; only for and releaseAt, and times and within, go together",
        )


def _refuse_wrong_side(fields: Fields, key: str, release_at: float, *, symbol: str, operand: float) -> None:
    above = symbol in (">", ">=")
    if not (release_at < operand if above else release_at > operand):
        fields.refuse(key, f"must be {'below' if above else 'above'} value, {operand}, for {symbol}")


def compile_timed(leaf: Leaf, timing: Timing) -> tuple[Evaluate, TemporalCondition | Timer]:
    """Make the closure of a leaf with time keys, and what it has to remember; the state of a device needs a timer instead."""
    key = fingerprint(leaf, timing)
    if leaf.reference.source_type == "device":
        return _standing(leaf, timing.for_us), Timer(key, leaf.reference[:2])
    observe, decide, window_us, maximum = _kind(leaf, timing)
    watch = TemporalCondition(key=key, reference=leaf.reference, window_us=window_us, maximum=maximum, observe=observe)
    return temporal_state.deciding(key, leaf.reference, decide), watch


_FIRST_KEYS = 5
"""Fields of Timing that there were at first."""


def fingerprint(leaf: Leaf, timing: Timing = Timing()) -> str:
    """The key of a condition: the same for the same condition, however its durations are written."""
    times = astuple(timing)
    # Conditions of before there were the newest keys are the same still.
    known = times if any(times[_FIRST_KEYS:]) else times[:_FIRST_KEYS]
    text = json.dumps([*leaf.reference, leaf.symbol, leaf.operand, leaf.duration_us, *known], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _standing(leaf: Leaf, for_us: int) -> Evaluate:
    """A state stands until it is changed, so the time of the last change says how long it has been so."""

    def evaluate(scope: Scope) -> bool:
        sample = scope.read(leaf.reference)
        if not leaf.evaluate(scope) or sample is None:
            return False
        return reached(scope, leaf.reference, sample.timestamp_us + for_us, now_us=scope.now_us)

    return evaluate


def _kind(leaf: Leaf, timing: Timing) -> tuple[Observe, Decide, int, int]:
    """How to observe, how to decide, and how many stored readings (microseconds back, at most) bring the memory back."""
    on = temporal_state.alone(leaf.evaluate)
    if timing.median_of:
        observe = temporal_state.observing_newest(timing.median_of)
        return observe, temporal_state.in_the_middle(on, timing.median_of), DAY_US, timing.median_of
    if timing.increase_us:
        observe, decide = (
            temporal_state.observing_growth(timing.increase_us),
            temporal_state.growing(on, timing.increase_us),
        )
        return observe, decide, 2 * timing.increase_us, REBUILD_READINGS
    if timing.per_us:
        return temporal_state.observe_steps, temporal_state.changing(on, timing.per_us), DAY_US, 100
    if timing.times:
        observe = temporal_state.observing_hits(on, timing.times)
        return observe, temporal_state.counting(timing.times, timing.within_us), timing.within_us, REBUILD_READINGS
    observe = temporal_state.observing_hold(on, _released(leaf, timing.release_at))
    return observe, temporal_state.holding(timing.for_us), timing.for_us + 7 * DAY_US, REBUILD_READINGS


def _released(leaf: Leaf, release_at: float | None) -> temporal_state.Test:
    """Which readings end what a leaf began: beyond `release_at` or no number; without a dead band, all for which it is false."""
    if release_at is None:
        return lambda _sample: True
    beyond = temporal_state.alone(OPERATORS[_BACK[leaf.symbol]].make(leaf.reference, release_at, 0))

    def ends(sample: Sample) -> bool:
        return not is_number(sample.value) or beyond(sample)

    return ends
