"""Measures whether a reading costs more where there is more of everything: chains, sensors, organizations, stored readings.

One system on PostgreSQL, as `make bench` has it. The same 100 sensors send batches of 100 readings that change no state, first
alone and then beside 1,000 and 10,000 chains, 100,000 sensors, 50 organizations and millions of stored readings, each on top of
the one before. The ratio to the first figure is what counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

from benchmarks.farm import BATCH, Farm, connection_of, farm, measured
from benchmarks.report import RESULTS, save, say

# In the process of a management command: rows in bulk, then every process is told that all of it is new.
ADD = """
from uuid import uuid4
from devices import catalogue
from devices.models import Device, DeviceState, Organization, Sensor, Variable
from rules.models import RuleChain, RuleNode
def save(model, rows):
    return model.objects.bulk_create(rows, batch_size=5_000)
def add(of, sensors, chains):
    made = save(Sensor, [Sensor(organization=of, name=f"other {uuid4()}") for n in range(sensors)])
    save(Variable, [Variable(sensor=each, name="ph", unit="pH", datatype="number") for each in made])
    devices = save(Device, [Device(organization=of, name=f"other {uuid4()}") for n in range(chains)])
    save(DeviceState, [DeviceState(device=each, name="power") for each in devices])
    rows = save(RuleChain, [RuleChain(organization=of, name=f"other {uuid4()}") for n in range(chains)])
    nodes = []
    for number, (row, device) in enumerate(zip(rows, devices)):
        leaf = {"sourceType": "sensor", "UUID": str(made[number % len(made)].uuid), "key": "ph", "operator": ">", "value": 6.5}
        command = {"type": "device_command", "deviceUuid": str(device.uuid), "stateName": "power", "value": "on"}
        nodes.append(RuleNode(chain=row, name="band", type="filter", config={**leaf, "releaseAt": 6.2}, next="on"))
        nodes.append(RuleNode(chain=row, name="on", type="action", config=command, position=1))
    save(RuleNode, nodes)
    catalogue.mark_changed(of.pk)
farm = Organization.objects.get(name="throughput")
"""
READINGS_A_STATEMENT = 500_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of load for each figure (default: %(default)s)")
    parser.add_argument(
        "--readings", type=int, default=5_000_000, help="stored before the last figure (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for Markdown and JSON (default: %(default)s)"
    )
    options = parser.parse_args()
    found: dict[str, float] = {}
    with farm("web", "worker", "scheduler") as running:
        for name, prepare in steps(options.readings):
            say(name)
            prepare(running)
            # Every process notices what was added, which is no part of what a reading costs.
            measured(running, "warm", 3.0, size=BATCH, share=0.0, drained=True)
            figure = measured(running, name, options.seconds, size=BATCH, share=0.0, drained=True)
            found[name] = figure.rate
    write(options.output, found)
    return 0


def steps(readings: int) -> Iterator[tuple[str, Callable[[Farm], None]]]:
    yield "100 sensors with a chain each", lambda running: None
    yield "beside 900 other chains", lambda running: add(running, "add(farm, 900, 900)")
    yield "beside 9,900 other chains", lambda running: add(running, "add(farm, 9000, 9000)")
    yield "beside 100,000 other sensors", lambda running: add(running, "add(farm, 90000, 0)")
    yield (
        "beside 49 other organizations with 20 chains each",
        lambda running: add(running, "[add(Organization.objects.create(name=f'o {n}'), 20, 20) for n in range(49)]"),
    )
    yield f"beside {readings:,} stored readings", lambda running: store(running, readings)
    yield "the same once more", lambda running: None


def add(running: Farm, what: str) -> None:
    done = running.system.manage("shell", "--verbosity", "0", "-c", f"{ADD}\n{what}", check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def store(running: Farm, readings: int) -> None:
    """Of the variables that the sensors send, a second apart and older than what they send."""
    with psycopg.connect(**connection_of(running.database), autocommit=True) as connection:
        for first in range(0, readings, READINGS_A_STATEMENT):
            count = min(READINGS_A_STATEMENT, readings - first)
            connection.execute(
                "INSERT INTO devices_reading (variable_id, timestamp, number) "
                "SELECT v.id, timestamptz '2020-01-01' + (%s + n / 100) * interval '1 second', 6.0 "
                "FROM generate_series(0, %s) AS n JOIN "
                "(SELECT id, row_number() OVER (ORDER BY id) - 1 AS place FROM devices_variable LIMIT 100) AS v "
                "ON v.place = n %% 100",
                [first // 100, count - 1],
            )
            say(f"{first + count:,} readings stored")
        connection.execute("ANALYZE devices_reading")


def write(folder: Path, found: dict[str, float]) -> None:
    base = next(iter(found.values()))
    lines = ["| | events a second | of the first |", "|---|---|---|"]
    lines += [f"| {name} | {rate:,.0f} | {rate / base:.2f} |" for name, rate in found.items()]
    save(folder, "growth", "\n".join(lines), found)


if __name__ == "__main__":
    sys.exit(main())
