"""What the soak calls a leak."""

from __future__ import annotations

import random

import pytest

from benchmarks.soak import LIMIT_MB_PER_HOUR, SAMPLE_EVERY_SECONDS, WARM_UP, Row, mb_per_hour

MINUTES = 10


def rows(*, leak_mb_per_hour: float = 0.0, warm_up_step_mb: float = 0.0, noise_mb: float = 0.3) -> list[Row]:
    """Ten minutes of a process, which grows by the step before the warm-up is over."""
    chance, end = random.Random(7), MINUTES * 60
    return [
        Row(
            seconds,
            {
                "worker": 100
                + leak_mb_per_hour * seconds / 3600
                + (warm_up_step_mb if seconds > end * WARM_UP / 2 else 0.0)
                + chance.uniform(-noise_mb, noise_mb)
            },
            0,
        )
        for seconds in (number * SAMPLE_EVERY_SECONDS for number in range(int(end / SAMPLE_EVERY_SECONDS)))
    ]


def test_flat_memory_with_noise_is_no_leak() -> None:
    assert abs(mb_per_hour(rows())["worker"]) < LIMIT_MB_PER_HOUR / 2


def test_leak_of_20_mb_an_hour_is_found_in_ten_minutes() -> None:
    slope = mb_per_hour(rows(leak_mb_per_hour=20))["worker"]

    assert slope > LIMIT_MB_PER_HOUR
    assert slope == pytest.approx(20, abs=3)


def test_step_in_the_warm_up_is_no_leak() -> None:
    assert abs(mb_per_hour(rows(warm_up_step_mb=40))["worker"]) < LIMIT_MB_PER_HOUR / 2


def test_each_process_has_a_slope_of_its_own() -> None:
    both = [Row(row.seconds, {"worker": 100.0, "Redis": 5 + row.seconds / 60}, 0) for row in rows()]

    assert mb_per_hour(both) == pytest.approx({"worker": 0.0, "Redis": 60.0})
