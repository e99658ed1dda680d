"""Measures what rules cost: predicates and events a second beside a hand-written loop, other chains, and loading 10,000 of them.

The engine alone, in one process: look-up in the index, trigger, run, effects; no journal, no readings, no outbox. Seconds are
those of the processor, the best of several rounds in turn, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from rules.engine.conditions import compile_condition
from rules.engine.context import Run, Trigger
from rules.engine.effect_types import DeviceCommand
from rules.events import Event

if TYPE_CHECKING:
    from rules.engine.effect_types import Effect
    from rules.processing.index import RuleIndex

ROUNDS = 7
HEARD = 10
LIMIT, STEP = 6.5, 0.2
NOON_US = 1_777_636_800_000_000
OPERANDS: Mapping[str, Any] = {">": LIMIT, "==": 7.0, "between": [6.0, 8.0]}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    chains: int = 1_000
    others: int = 10_000
    events: int = 20_000
    predicates: int = 200_000


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Per second, and as a share of what the hand-written loop did."""

    per_second: float
    of_hand_written: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=Sizes.chains, help="that events trigger (default: %(default)s)")
    parser.add_argument("--others", type=int, default=Sizes.others, help="that they do not (default: %(default)s)")
    parser.add_argument("--events", type=int, default=Sizes.events, help="a round (default: %(default)s)")
    parser.add_argument("--load-only", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load_only:
        set_up(Path(options.load_only))
        print(json.dumps(load_here()))
        return 0
    sizes = Sizes(chains=options.chains, others=options.others, events=options.events)
    with tempfile.TemporaryDirectory(prefix="aemos-bench-") as folder:
        set_up(Path(folder))
        measure(sizes, report=lambda line: print(line, flush=True))
        print_load(Path(folder))
    return 0


def set_up(folder: Path) -> None:
    """A database of its own, whatever the environment says."""
    own = {"AEMOS_ENV": "test", "VAR_DIR": str(folder), "DB_ENGINE": "sqlite", "DB_NAME": str(folder / "bench.sqlite3")}
    os.environ |= own | {"DJANGO_SETTINGS_MODULE": "aemos.settings"}
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)


def measure(sizes: Sizes, *, report: Callable[[str], None]) -> None:
    """Makes chains in the database that Django is set up for, and reports each measurement as it is done."""
    report(f"rules on one core, Python {sys.version.split()[0]}, {datetime.now(UTC):%Y-%m-%d}")
    for symbol, rate in predicates(sizes.predicates).items():
        report(f"predicate {symbol:<8}{rate.per_second:>12,.0f} /s {rate.of_hand_written:>9.2f} of a hand-written loop")
    organization_id = make_organization()
    heard = make_chains(organization_id, HEARD)
    few = make_chains(organization_id, HEARD)
    small = loaded_index()
    chains = heard + few + make_chains(organization_id, sizes.chains - 2 * HEARD)
    rate = engine_rate(loaded_index(), events_of(chains, sizes.events, organization_id=organization_id))
    report(
        f"events, {sizes.chains:,} chains of 3 nodes {rate.per_second:>10,.0f} /s "
        f"{rate.of_hand_written:>9.2f} of a hand-written loop"
    )
    make_chains(organization_id, sizes.others - sizes.chains + HEARD)
    for name, sensors in (
        ("that one chain waits for", heard),
        ("that no chain waits for", [str(uuid4()) for _ in heard]),
    ):
        events = events_of(sensors, sizes.events, organization_id=organization_id)
        before, after = scaling([small, loaded_index()], events)
        report(
            f"an event {name}: {before:.2f} us beside {HEARD:,} other chains, {after:.2f} us beside {sizes.others:,}: "
            f"ratio {after / before:.2f}"
        )


def best(*works: Callable[[], object]) -> list[float]:
    """Processor seconds of each work."""
    found = [float("inf")] * len(works)
    for _ in range(ROUNDS):
        for number, work in enumerate(works):
            began = time.process_time()
            work()
            found[number] = min(found[number], time.process_time() - began)
    return found


def predicates(count: int) -> dict[str, Rate]:
    """One comparison with a value of the event, again and again in one run."""
    found = {}
    for symbol, operand in OPERANDS.items():
        sensor = str(uuid4())
        leaf = {"sourceType": "sensor", "UUID": sensor, "key": "ph", "operator": symbol, "value": operand}
        evaluate = compile_condition(leaf, path="config").evaluate
        run = Run(trigger_of(events_of([sensor], 1, organization_id=1)[0]))
        assert evaluate(run) is BY_HAND[symbol](run.values) is True
        ours, by_hand = best(partial(call, evaluate, run, count), partial(call, BY_HAND[symbol], run.values, count))
        found[symbol] = Rate(per_second=count / ours, of_hand_written=by_hand / ours)
    return found


def call(function: Callable[[Any], object], argument: object, count: int) -> None:
    for _ in repeat(None, count):
        function(argument)


# What somebody would write who knew the rule when writing the program.
BY_HAND: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    ">": lambda values: (ph := values.get("ph")) is not None and ph > LIMIT,
    "==": lambda values: (ph := values.get("ph")) is not None and ph == 7.0,
    "between": lambda values: (ph := values.get("ph")) is not None and 6.0 <= ph <= 8.0,
}


def engine_rate(index: RuleIndex, events: Sequence[Event]) -> Rate:
    """Every event passes its filter, is transformed and asks for a command, in both programs the same one."""
    by_sensor = {
        reference.uuid: (bound.uuid, bound.compiled.commands[0].device_uuid)
        for bound in index
        for reference in bound.compiled.references
    }
    commands = [each for each in engine(index, events) if isinstance(each, DeviceCommand)]
    same = [(each.effect_key, each.device_uuid, each.value) for each in commands]
    assert same == [each[:3] for each in hand_written(by_sensor, events)]
    took, by_hand = best(partial(engine, index, events), partial(hand_written, by_sensor, events))
    return Rate(per_second=len(events) / took, of_hand_written=by_hand / took)


def engine(index: RuleIndex, events: Sequence[Event]) -> list[Effect]:
    """As a worker does for a batch."""
    effects: list[Effect] = []
    for event in events:
        source = (event.source_type, event.originator_uuid)
        for bound in index.triggered(source, event.values, organization_id=event.organization_id):
            effects += bound.compiled.run(trigger_of(event)).effects
    return effects


def trigger_of(event: Event) -> Trigger:
    return Trigger(
        event_id=str(event.id),
        source_type=event.source_type,
        uuid=event.originator_uuid,
        values=event.values,
        timestamp_us=event.timestamp_us,
        lookup=lambda reference: None,
    )


Command = tuple[str, str, float, str, int]


def hand_written(by_sensor: Mapping[str, tuple[str, str]], events: Sequence[Event]) -> list[Command]:
    """Sensor uuid -> (chain, device) in place of the index, and the rule itself as plain Python."""
    commands: list[Command] = []
    for event in events:
        rule = by_sensor.get(event.originator_uuid)
        if rule is None:
            continue
        values = dict(event.values)
        ph = values.get("ph")
        if ph is not None and ph > LIMIT:
            values["ph"] = ph + STEP
            commands.append((f"{event.id}:{rule[0]}:dose", rule[1], values["ph"], "speed", event.timestamp_us))
    return commands


def scaling(indexes: Sequence[RuleIndex], events: Sequence[Event]) -> list[float]:
    """Microseconds an event costs with each index."""
    return [seconds / len(events) * 1e6 for seconds in best(*(partial(engine, index, events) for index in indexes))]


def events_of(sensors: Sequence[str], count: int, *, organization_id: int) -> list[Event]:
    return [
        Event(
            id=str(uuid4()),
            type="telemetry-data",
            priority=5,
            source_type="sensor",
            originator_uuid=sensors[number % len(sensors)],
            organization_id=organization_id,
            values={"ph": 7.0},
            timestamp_us=NOON_US + number,
            received_us=NOON_US + number,
            protocol="http",
        )
        for number in range(count)
    ]


def make_organization() -> int:
    from devices.models import Organization

    return Organization.objects.create(name="Benchmark").pk


def make_chains(organization_id: int, count: int) -> list[str]:
    """Chains of a filter, a transform and an action, each with a sensor and a device of its own; gives the sensors' uuids."""
    from devices import catalogue
    from devices.models import Device, DeviceState
    from rules.models import RuleChain, RuleNode

    sensors = [str(uuid4()) for _ in range(count)]
    devices = Device.objects.bulk_create(
        Device(organization_id=organization_id, name=f"Pump {sensor}") for sensor in sensors
    )
    DeviceState.objects.bulk_create(DeviceState(device=device, name="speed", datatype="number") for device in devices)
    rows = RuleChain.objects.bulk_create(
        RuleChain(organization_id=organization_id, name=f"pH down {sensor}") for sensor in sensors
    )
    RuleNode.objects.bulk_create(
        node
        for row, sensor, device in zip(rows, sensors, devices, strict=True)
        for node in nodes_of(row.pk, sensor, device.uuid)
    )
    catalogue.mark_changed(organization_id)
    return sensors


def nodes_of(chain_id: int, sensor: str, device: UUID) -> list[Any]:
    from rules.models import RuleNode

    high = {"sourceType": "sensor", "UUID": sensor, "key": "ph", "operator": ">", "value": LIMIT}
    step = {"operation": "add", "key": "ph", "value": STEP}
    dose = {"type": "device_command", "deviceUuid": str(device), "stateName": "speed", "valueFrom": "ph"}
    return [
        RuleNode(chain_id=chain_id, name="high", type="filter", config=high, next="step", position=0),
        RuleNode(chain_id=chain_id, name="step", type="transform", config=step, next="dose", position=1),
        RuleNode(chain_id=chain_id, name="dose", type="action", config=dose, position=2),
    ]


def loaded_index() -> RuleIndex:
    """Like a worker's: what is loaded is passed over when garbage is collected."""
    from rules.processing.index import RuleIndex

    index = RuleIndex()
    index.refresh()
    gc.freeze()
    return index


def load_here() -> dict[str, float]:
    """In a process that has done nothing else, because memory that was used before would be used again."""
    from devices.models import Organization
    from rules.processing import index

    Organization.objects.count()  # a connection, which a worker has anyway
    before, began, busy = resident_mb(), time.perf_counter(), time.process_time()
    index.load()
    return {
        "chains": len(index.shared()),
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - busy,
        "megabytes": resident_mb() - before,
    }


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def print_load(folder: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.rules", "--load-only", str(folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"loading {found['chains']:,} chains: {found['seconds']:.1f} s, {found['processor_seconds']:.1f} s of the processor, "
        f"{found['megabytes']:.0f} MB more"
    )


if __name__ == "__main__":
    sys.exit(main())
