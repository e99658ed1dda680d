"""Measures how long charts wait: last values, a day and a year of a variable beside millions of stored readings, in PostgreSQL.

A year of readings of a hundred variables is written, and rolled up by hour and day as the scheduler does. Then each question is
asked a hundred times, each time of another variable. Beside them stands the year without rollups, which is what they save.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deploy.postgresql import start_postgresql

RESULTS = Path(__file__).parent / "results"
VARIABLES = 100
DAYS = 365
END = datetime(2026, 5, 1, tzinfo=UTC)
ASKED = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--readings", type=int, default=5_000_000, help="in all, of a hundred variables (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for Markdown and JSON (default: %(default)s)"
    )
    options = parser.parse_args()
    server = start_postgresql(durable=True)
    try:
        os.environ |= {
            "DJANGO_SETTINGS_MODULE": "aemos.settings", "AEMOS_ENV": "development", "DB_ENGINE": "postgresql",
            "DB_NAME": "postgres", "DB_PORT": str(server.port), "DB_USER": server.username, "DB_PASSWORD": server.password,
        }  # fmt: skip
        return _measure(options.readings, options.output)
    finally:
        server.stop()


def _measure(readings: int, output: Path) -> int:
    import django

    django.setup()
    from django.core.management import call_command

    from benchmarks.report import save, say

    call_command("migrate", "--verbosity", "0")
    variables = _variables()
    say(f"writing {readings:,} readings of {VARIABLES} variables")
    written = _seconds(lambda: _write(variables, readings))
    say("rolling them up")
    rolled = _seconds(lambda: _roll_up(variables))
    found = {name: _asked(ask, variables) for name, ask in _questions().items()}
    lines = [
        f"# History beside {readings:,} readings",
        "",
        f"Written in {written:.0f} s, rolled up in {rolled:.0f} s ({readings / rolled:,.0f} readings/s).",
        "",
        "| question | median | 95 % | of a day's |",
        "|---|---|---|---|",
    ]
    day = found["a day, 5 minutes each"][0]
    for name, (median, late) in found.items():
        lines.append(f"| {name} | {median * 1_000:.1f} ms | {late * 1_000:.1f} ms | {median / day:.1f} |")
    text = "\n".join(lines) + "\n"
    save(output, "history", text, {"readings": readings, "rolledUpSeconds": rolled, "questions": found})
    return 0


def _variables() -> list[Any]:
    from devices.models import Organization, Sensor, Variable

    farm = Organization.objects.create(name="history")
    sensors = Sensor.objects.bulk_create(Sensor(organization=farm, name=f"sensor {n}") for n in range(VARIABLES))
    return list(Variable.objects.bulk_create(Variable(sensor=each, name="ph") for each in sensors))


def _write(variables: list[Any], readings: int) -> None:
    from django.db import connection

    each = readings // VARIABLES
    step = DAYS * 86_400 / each
    with connection.cursor() as cursor:
        for variable in variables:
            cursor.execute(
                "INSERT INTO devices_reading (variable_id, timestamp, number)"
                " SELECT %s, %s::timestamptz + n * %s * interval '1 second', 6 + random() FROM generate_series(0, %s) n",
                [variable.pk, END - timedelta(days=DAYS), step, each - 1],
            )
        cursor.execute("VACUUM ANALYZE devices_reading")


def _roll_up(variables: list[Any]) -> None:
    from django.db import connection

    from devices.history import rollups
    from devices.history.models import RollupState

    ids = [variable.pk for variable in variables]
    for days in range(0, DAYS, 5):
        begin = END - timedelta(days=DAYS - days)
        rollups.make(ids, begin, min(begin + timedelta(days=5), END))
    RollupState.objects.create(pk=1, until=END, seen_at=END)
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE devices_rollup")


def _questions() -> dict[str, Callable[[Any], object]]:
    from devices.history import series
    from devices.models import Reading

    def points(days: int, interval: str) -> Callable[[Any], object]:
        return lambda variable: series.points(variable, END - timedelta(days=days), END, interval)

    return {
        "the newest value": lambda variable: Reading.objects.filter(variable=variable).order_by("timestamp").last(),
        "a day, 5 minutes each": points(1, "5m"),
        "a month, an hour each": points(30, "1h"),
        "a year, 6 hours each": points(365, "6h"),
        "a year, a day each": points(365, "1d"),
        "a year, a day each, without rollups": lambda variable: list(
            series.of_readings(variable, END - timedelta(days=DAYS), END, timedelta(days=1))
        ),
    }


def _asked(ask: Callable[[Any], object], variables: list[Any]) -> tuple[float, float]:
    """Median and 95 % of the seconds."""
    took = sorted(_seconds(lambda variable=variables[n % VARIABLES]: ask(variable)) for n in range(ASKED))  # type: ignore[misc]
    return statistics.median(took), took[int(len(took) * 0.95)]


def _seconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
