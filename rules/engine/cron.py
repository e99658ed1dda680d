"""The times of a schedule: the next and the latest one, in UTC, for a cron expression and a time zone. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import NamedTuple
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

FIELDS = 5
EXAMPLE = "0 6 * * *"
# A schedule that runs every minute has 525,600 times in a year; they are looked for backwards in growing windows.
WINDOWS = (timedelta(hours=1), timedelta(days=1), timedelta(days=32), timedelta(days=366))


class Schedule(NamedTuple):
    """Five cron fields, and the name of the time zone in which they count."""

    cron: str
    timezone: str

    def next_after(self, moment: datetime) -> datetime | None:
        """The first time later than `moment`, which is aware; None when there is none within about 50 years.

        Raises ValueError when the schedule cannot be read.
        """
        return next(self._times_after(moment), None)

    def latest_until(self, moment: datetime, *, since: datetime) -> datetime:
        """The last time that is not later than `moment`; `since`, which counts as one, when there is no later one."""
        for window in WINDOWS:
            if moment - window > since and (found := self._last(moment - window, moment)):
                return found
        return self._last(since, moment) or since

    def _last(self, start: datetime, end: datetime) -> datetime | None:
        last = None
        for time in self._times_after(start):
            if time > end:
                break
            last = time
        return last

    def _times_after(self, moment: datetime) -> Iterator[datetime]:
        """In ascending order. cronsim gives a time twice, or one that has passed, where clocks are moved."""
        previous = moment.astimezone(UTC)
        try:
            times = CronSim(self.cron, moment.astimezone(ZoneInfo(self.timezone)))
        except (CronSimError, KeyError, OSError) as error:
            raise ValueError(f"{self.cron} {self.timezone}: {error}") from error
        for found in times:
            time = found.astimezone(UTC)
            if time > previous:
                previous = time
                yield time


def problems(cron: str, timezone: str, *, is_scheduled: bool) -> dict[str, str]:
    """What is wrong with the schedule of a chain, by field; empty when nothing is."""
    found = {"cron": _problem_with_cron(cron, is_scheduled=is_scheduled), "timezone": _problem_with_timezone(timezone)}
    return {field: problem for field, problem in found.items() if problem}


def _problem_with_cron(cron: str, *, is_scheduled: bool) -> str:
    if not is_scheduled:
        return "is for scheduled chains: leave it empty, or choose schedule-only or hybrid" if cron else ""
    if len(cron.split()) != FIELDS:
        return f"must have five fields, minute hour day month weekday, such as {EXAMPLE}"
    try:
        found = Schedule(cron, "UTC").next_after(datetime.now(UTC))
    except ValueError:
        return f"{_reason(cron)}; it is read as minute hour day month weekday, such as {EXAMPLE}"
    return "" if found else "never comes due"


def _problem_with_timezone(name: str) -> str:
    return "" if name in _timezones() else "must be a time zone by its name, such as Europe/Berlin"


def _reason(cron: str) -> str:
    """cronsim says "Bad day-of-week"."""
    try:
        CronSim(cron, datetime.now(UTC))
    except CronSimError as error:
        return f"the field {str(error).removeprefix('Bad ')} cannot be read"
    return "cannot be read"


@cache
def _timezones() -> frozenset[str]:
    return frozenset(available_timezones())
