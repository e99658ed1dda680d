"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.programs import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """`rate` is in `unit` per second; `processor_ms` per unit, by process; `memory_mb` the most of each process.

    `redis_bytes`: what an event takes in Redis while it waits for a worker.
    """

    name: str
    rate: float
    unit: str
    processor_ms: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)
    redis_bytes: float | None = None
    note: str = ""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def write(folder: Path, figures: Sequence[Figure], seconds: float) -> None:
    """The ratios first: they are what another machine should show, too."""
    compared = [figure for figure in figures if figure.name in ("hello", "Express + BullMQ")]
    machine = f"{_processor()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"# Throughput, {moment}", "", f"{machine}; {seconds:g} s of load for each figure.", ""]
    lines += _table("", *(f"of {other.name}" for other in compared))
    for figure in figures:
        lines.append(_row(figure.name, *(f"{figure.rate / other.rate:.2f}" for other in compared)))
    lines += ["", *_table("", "per second", "processor ms each", "memory, MB", "bytes in Redis while it waits")]
    for figure in figures:
        lines.append(
            _row(
                f"{figure.name} ({figure.note})" if figure.note else figure.name,
                f"{figure.rate:,.0f} {figure.unit}",
                ", ".join(f"{name} {ms:.3f}" for name, ms in figure.processor_ms.items()),
                ", ".join(f"{name} {mb:.0f}" for name, mb in figure.memory_mb.items()),
                f"{figure.redis_bytes:.0f}" if figure.redis_bytes else "",
            )
        )
    found = {"at": moment, "machine": machine, "seconds": seconds, "figures": [asdict(figure) for figure in figures]}
    save(folder, "throughput", "\n".join(lines), found)


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _cpu_information() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpu_information() -> list[str]:
    source = Path("/proc/cpuinfo")
    return source.read_text().splitlines() if source.exists() else []


def _table(*titles: str) -> list[str]:
    return [_row(*titles), "|---" * len(titles) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def save(folder: Path, name: str, text: str, found: Any) -> None:
    """Prints the table, and keeps it with its figures as Markdown and JSON."""
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(f"{text}\n")
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
