"""Measures how many readings a second go through a whole system, beside what the machine can do at all.

One web process, one worker, one gateway and one scheduler on PostgreSQL and Redis that sync every write, and Mosquitto; wrk and
mosquitto_pub send the readings of 100 sensors, each with a rule chain. In the same run: the least that the same web server can do
("hello"), readings inserted without anything else, entries appended to Redis one by one, a job of RQ for each reading, and, where
node is there, Express that adds a job to BullMQ for each. Compare the ratios: absolute figures are those of the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import baselines
from benchmarks.farm import (
    BATCH,
    bytes_waiting,
    depth,
    farm,
    may_publish,
    measured,
    peak_memory,
    processors,
    publish_command,
    redis_of,
    until,
)
from benchmarks.report import RESULTS, Figure, say, write
from deploy.local import LocalSystem

PUBLISHERS = 10
# Of each publisher and second of load. All of them are sent, however long it takes.
PUBLISHED_EACH = 800


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for each figure (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="four seconds each: about a minute in all")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for Markdown and JSON (default: %(default)s)"
    )
    options = parser.parse_args()
    seconds = 4.0 if options.short else options.seconds
    figures: list[Figure] = []
    try:
        for figure in measure_all(seconds):
            figures.append(figure)
    finally:  # what was measured before something failed is shown all the same
        if figures:
            write(options.output, figures, seconds)
    return 0


def measure_all(seconds: float) -> Iterator[Figure]:
    for name, measure in baselines.all_of_them():
        say(name)
        yield measure(seconds)
    yield from over_http(seconds, 0.0)
    yield from over_http(seconds, 0.18)
    yield over_mqtt(seconds)


def over_http(seconds: float, share: float) -> Iterator[Figure]:
    """Single events as far as their answers, then batches end to end: accepted, stored, decided, nothing left in the queue."""
    with farm("web", "worker", "scheduler") as running:
        kind = f"{share:.0%} of events change a state" if share else "no state changes"
        if not share:
            say("single events")
            figure = measured(running, "HTTP, single events", seconds, size=1, share=0.0, drained=False)
            yield replace(figure, redis_bytes=bytes_waiting(2.0, size=1))
            until(lambda: depth(running.system) == 0, seconds=300)
        say(f"batches of {BATCH}, {kind}")
        name = f"HTTP, batches of {BATCH}, end to end, {kind}"
        figure = measured(running, name, seconds, size=BATCH, share=share, drained=True)
        yield figure if share else replace(figure, redis_bytes=bytes_waiting(2.0, size=BATCH))


def over_mqtt(seconds: float) -> Figure:
    """QoS 1, from the first message until all are stored and decided."""
    say("MQTT")
    with farm("web", "worker", "scheduler", "gateway") as running, tempfile.TemporaryDirectory() as folder:
        system, each = running.system, int(PUBLISHED_EACH * seconds)
        senders = list(zip(running.uuids, running.tokens, strict=True))[:PUBLISHERS]
        until(lambda: all(may_publish(system, *sender) for sender in senders))
        until(lambda: depth(system) == 0)
        before, began, waiting = processors(running), time.monotonic(), accepted(system)
        publishers = [publisher(system, *sender, each, Path(folder)) for sender in senders]
        for process in publishers:
            if process.wait(timeout=600):
                raise RuntimeError(f"mosquitto_pub ended with {process.returncode}")
        acknowledged = time.monotonic() - began
        count = each * PUBLISHERS
        until(lambda: accepted(system) - waiting >= count and depth(system) == 0, seconds=600)
        elapsed, used = time.monotonic() - began, processors(running)
        return Figure(
            name=f"MQTT QoS 1, {PUBLISHERS} publishers, end to end",
            rate=count / elapsed,
            unit="messages",
            processor_ms={process: (used[process] - before[process]) / count * 1_000 for process in used},
            memory_mb=peak_memory(running),
            note=f"acknowledged by the broker at {count / acknowledged:,.0f} a second",
        )


def publisher(system: LocalSystem, uuid: str, token: str, count: int, folder: Path) -> subprocess.Popen[bytes]:
    """Sends a reading per line of a file as fast as it is acknowledged, at most 20 ahead."""
    start = int(time.time()) - 200  # none of them is late
    moments = (datetime.fromtimestamp(start + number / 1_000, UTC).isoformat() for number in range(count))
    lines = folder / uuid
    lines.write_text("".join(f'{{"values":{{"ph":5.9}},"timestamp":"{moment}"}}\n' for moment in moments))
    command, environment = publish_command(system, uuid, token, "-l")
    with lines.open("rb") as readings:
        return subprocess.Popen(command, env=environment, stdin=readings)


def accepted(system: LocalSystem) -> int:
    """Events by the ledger, since the system began."""
    with redis_of(system) as client:
        ledgers = client.scan_iter(match="aemos:ledger:*")
        return sum(int(client.hget(name, "accepted") or 0) for name in ledgers)


if __name__ == "__main__":
    sys.exit(main())
