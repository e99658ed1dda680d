"""What tests share that send readings into a whole system while parts of it are killed."""

from __future__ import annotations

import json
import os
import random
import time

from deploy.local import LocalSystem


def dice(seed: int) -> random.Random:
    """The same moments in every run; others with STORM_SEED=1, 2, and so on."""
    return random.Random(seed + 1_000 * int(os.environ.get("STORM_SEED", "0")))


def random_walk(seed: int, count: int, *, start: float, step: float, within: tuple[float, float]) -> list[float]:
    """So many values, each at most a step from the one before."""
    chance = dice(seed)
    lowest, highest = within
    value, values = start, []
    for _ in range(count):
        value = min(max(value + chance.uniform(-step, step), lowest), highest)
        values.append(round(value, 2))
    return values


def assert_worked_off(system: LocalSystem, number: int) -> None:
    """Waits until the system has dealt with so many events; its ledger closes then, and none is dead."""
    deadline = time.monotonic() + 90
    while True:
        ledger = json.loads(system.manage("ledger", "--json", check=False).stdout)
        total = ledger["lanes"]["total"]
        if total["depth"] == 0 and total["accepted"] >= number:
            break
        assert time.monotonic() < deadline, ledger
        time.sleep(0.5)
    assert ledger["closes"] is True
    assert total["dead"] == 0
