"""An interlock in words."""

from __future__ import annotations

from devices.interlocks.models import Interlock


def describe(row: Interlock) -> str:
    """In words: "at least 60 s off, at most 4 runs per hour"."""
    parts = [
        ("at least {:g} s on", row.minimum_on_seconds),
        ("at most {:g} s on", row.maximum_on_seconds),
        ("at least {:g} s off", row.minimum_off_seconds),
        ("at most {:g} runs per hour", row.maximum_runs_per_hour),
        ("at most {:g} runs per day", row.maximum_runs_per_day),
        ("at most {:g} s on per hour", row.maximum_on_seconds_per_hour),
        ("at most {:g} s on per day", row.maximum_on_seconds_per_day),
        ("at most {:g} per hour", row.maximum_amount_per_hour),
        ("at most {:g} per day", row.maximum_amount_per_day),
    ]
    said = [text.format(limit) for text, limit in parts if limit is not None]
    if row.allowed_from and row.allowed_until:
        said.append(f"from {row.allowed_from:%H:%M} to {row.allowed_until:%H:%M}")
    said += [f"not with {other.device}: {other.name}" for other in row.excludes.all()]
    said += [f"requires {requirement}" for requirement in row.requirements.all()]
    return ", ".join(said)
