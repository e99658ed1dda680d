"""A believable week of readings for the demo farm, so that every chart shows something from the first minute."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from devices.models import Reading, Sensor, Variable

EVERY = timedelta(minutes=5)
WEEK = timedelta(days=7)
HIGH_PH, DOSED_PH = 6.5, 6.1
LOW_EC, FED_EC = 1.5, 1.9
LOW_WATER, FULL = 60.0, 95.0
_SECONDS_PER_DAY = 86_400


def fill(sensors: list[Sensor], *, end: datetime) -> int:
    """Readings of the week before `end` for sensors that have none; gives their number."""
    count = 0
    for number, sensor in enumerate(sensors):
        variables = {row.name: row for row in sensor.variables.all()}
        if Reading.objects.filter(variable__in=variables.values()).exists():
            continue
        noise = random.Random(number)  # noqa: S311  no secret: the same week each time
        rows = Reading.objects.bulk_create(_readings(variables, end, noise), batch_size=2_000)
        count += len(rows)
    return count


def _readings(variables: Mapping[str, Variable], end: datetime, noise: random.Random) -> Iterator[Reading]:
    begin = end - WEEK
    for step, values in enumerate(_values(begin, noise)):
        at = begin + step * EVERY
        if at >= end:
            return
        for name, value in values.items():
            if name in variables:
                yield Reading(variable=variables[name], timestamp=at, number=round(value, 2))


def _values(begin: datetime, noise: random.Random) -> Iterator[dict[str, float]]:
    """Plants take up nutrients and raise the pH, acid lowers it; days are warmer than nights; water goes and is filled up."""
    ph, ec, water, dosing = noise.uniform(6.1, 6.4), noise.uniform(1.6, 1.9), noise.uniform(70, 95), False
    at = begin
    while True:
        dosing = ph > HIGH_PH or (dosing and ph > DOSED_PH)
        ph += -0.04 if dosing else 0.005
        ec = FED_EC if ec < LOW_EC else ec - 0.0008
        water = FULL if water < LOW_WATER else water - 0.03
        of_day = (at.timestamp() % _SECONDS_PER_DAY) / _SECONDS_PER_DAY
        temperature = 22.5 + 2.5 * math.sin(2 * math.pi * (of_day - 0.375))
        yield {
            "ph": ph + noise.gauss(0, 0.015),
            "ec": ec + noise.gauss(0, 0.01),
            "temperature": temperature + noise.gauss(0, 0.1),
            "waterLevel": water + noise.gauss(0, 0.15),
        }
        at += EVERY
