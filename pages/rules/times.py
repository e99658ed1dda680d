"""Times of a schedule as people write them, and the cron expression of the same."""

from __future__ import annotations

import re
from collections.abc import Sequence

from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy

_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?\s*(am|pm)?", re.IGNORECASE)
_EVERY = re.compile(r"every\s+(?:(\d+)\s*)?(minute|hour|min|h|m)s?", re.IGNORECASE)
_FIVE_FIELDS = 5
EVERY_DAY = "*"
EXAMPLE = "06:00, 18:00"
EXAMPLE_TEXT = lazy("such as 06:00, 18:00 or every 15 minutes")


def as_cron(text: str, weekdays: Sequence[str] = ()) -> str:
    """`weekdays`: numbers from 0, Sunday, to 6; none are all. Raises ValueError with what is wrong, for people."""
    text = " ".join(text.split())
    if len(text.split(" ")) == _FIVE_FIELDS and not text.lower().startswith("every"):
        return text
    days = ",".join(sorted(weekdays)) if 0 < len(weekdays) < 7 else EVERY_DAY
    if every := _EVERY.fullmatch(text):
        return _every(int(every[1] or 1), every[2].lower()[0], days)
    times = [_time(each.strip()) for each in text.split(",") if each.strip()]
    if not times:
        raise ValueError(_("say at which times, such as {example}").format(example=EXAMPLE))
    minutes = sorted({minute for _, minute in times})
    if len(minutes) > 1:
        raise ValueError(
            _("times of one rule must have the same minutes, such as 06:30, 18:30: make a second rule for the others")
        )
    hours = ",".join(str(hour) for hour in sorted({hour for hour, _ in times}))
    return f"{minutes[0]} {hours} * * {days}"


def as_times(cron: str) -> tuple[str, list[str]]:
    """What a form shows: times and weekdays, or the expression itself where it says more than the form has words for."""
    fields = cron.split()
    if len(fields) != _FIVE_FIELDS or fields[2:4] != ["*", "*"] or not re.fullmatch(r"\*|[0-6](,[0-6])*", fields[4]):
        return cron, []
    minute, hour, *_, days = fields
    weekdays = [] if days == EVERY_DAY else days.split(",")
    if hour == "*" and (step := re.fullmatch(r"\*/(\d+)", minute)):
        return f"every {step[1]} minutes", weekdays
    if (minute, hour) == ("*", "*"):
        return "every minute", weekdays
    if minute == "0" and (step := re.fullmatch(r"\*(?:/(\d+))?", hour)):
        return f"every {step[1]} hours" if step[1] else "every hour", weekdays
    if minute.isdigit() and re.fullmatch(r"\d+(,\d+)*", hour):
        return ", ".join(f"{int(each):02d}:{int(minute):02d}" for each in hour.split(",")), weekdays
    return cron, []


def _every(count: int, unit: str, days: str) -> str:
    most = 59 if unit == "m" else 23
    whole = 60 if unit == "m" else 24
    if not 1 <= count <= most or whole % count:
        text = _("{count} minutes do not divide an hour into equal parts")
        if unit != "m":
            text = _("{count} hours do not divide a day into equal parts")
        raise ValueError(text.format(count=count))
    step = "*" if count == 1 else f"*/{count}"
    return f"{step} * * * {days}" if unit == "m" else f"0 {step} * * {days}"


def _time(text: str) -> tuple[int, int]:
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise ValueError(_("“{text}” is no time: write {example}").format(text=text, example=EXAMPLE))
    hour, minute, half = int(match[1]), int(match[2] or 0), (match[3] or "").lower()
    if half:
        hour = hour % 12 + (12 if half == "pm" else 0)
    if hour > 23 or minute > 59:
        raise ValueError(_("“{text}” is no time of a day").format(text=text))
    return hour, minute
