"""Which readings of a batch are believed: each is judged by the limits of its variable, in the order of the batch."""

from __future__ import annotations

from collections.abc import Mapping

from devices.latest import Key, Latest
from devices.quality import limits
from devices.quality.limits import Limits
from rules.engine.values import Sample
from rules.events import Event


class QualityJudge:
    """Judges the readings of one batch; `latest`: what was known before it of the variables that have limits."""

    def __init__(self, latest: Mapping[Key, Latest]) -> None:
        self._known = dict(latest)
        self._taken: dict[str, dict[str, Latest]] = {}
        self._suspects: dict[str, dict[str, str]] = {}

    def judge(self, event: Event, name: str, value: float, limits_of_it: Limits) -> str:
        """Why the event's value is suspect; empty when it is not. To judge a duplicate again changes nothing."""
        key = (event.source_type, event.originator_uuid, name)
        before = self._known.get(key)
        reason = limits.judge(limits_of_it, value, event.timestamp_us, before)
        taken = limits.taken_in(reason, value, event.timestamp_us, event.received_us, before)
        self._known[key] = taken
        self._taken.setdefault(event.id, {})[name] = taken
        if reason:
            self._suspects.setdefault(event.id, {})[name] = reason
        return reason

    @property
    def has_suspects(self) -> bool:
        return bool(self._suspects)

    def known_after(self, event: Event) -> Mapping[str, Latest]:
        """What is known after the event of its values that have limits, by name."""
        return self._taken.get(event.id, _NOTHING)

    def suspects(self, event: Event) -> Mapping[str, str]:
        """The names of its values that are not believed, and why not."""
        return self._suspects.get(event.id, _NO_REASONS)


def sample_of(latest: Latest, *, clock_us: int, maximum_age_us: int | None) -> Sample:
    """What rules see of it: after its maximum age the value is missing, and its source has been heard all the same."""
    is_gone = maximum_age_us and clock_us - latest.timestamp_us > maximum_age_us
    return Sample(None if is_gone else latest.value, latest.timestamp_us, latest.received_us, latest.suspicion)


_NOTHING: Mapping[str, Latest] = {}
_NO_REASONS: Mapping[str, str] = {}
