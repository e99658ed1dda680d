"""From the operators' own descriptions to `docs/operators.md`: `python -m rules.engine.operators_page`; `--check` only looks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rules.engine.operators import SECTIONS, Operator
from rules.engine.temporal import EXAMPLES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operators.md"

_BEFORE = """\
# Operators of filters

<!-- Written by `python -m rules.engine.operators_page`; change rules/engine/operators.py or rules/engine/temporal.py instead. -->

A filter is a comparison, or a group `{"type": "AND" | "OR", "expressions": [...]}` of comparisons and groups. A comparison
names a variable of a sensor or a state of a device, an operator, and what the operator needs:

    {"sourceType": "sensor", "UUID": "0b7e9d52-6a3c-4f0e-9d1b-2c5a8f4e7d10", "key": "ph", "operator": ">", "value": 6.5}

What holds for all of them:

- **Which value.** Of the sensor or device that triggered the chain the value in that event, never a later one. Of all
  others the latest known.
- **No value.** A variable that was never seen, or whose latest value is null, makes a comparison false, also `!=` and the
  other negative ones, and is named as missing in the result. Only `isNull`, `isEmpty` and `olderThan` are true then, because
  absence is what they ask for.
- **A number never equals a text.** A sensor that sends `"6.5"` in quotes sends text, and `>` is false for it. Nothing is
  converted silently.
- **Which time.** Ages are counted from when a value was taken to when the event that triggered the chain was received.
  `olderThan`, which asks for silence, counts from when the source was last heard, whatever its clock says. What a source dates
  ahead counts from when it was received; see [time and values](time.md).
- **A value does not expire.** The latest value stands until there is a newer one. Where an old value must not count, add
  `{"operator": "newerThan", "duration": "10m"}` for the same variable in an AND group.

Durations are a whole number with s, m, h or d behind it: 10s, 5m, 2h, 1d; at most 366d.
"""

_TIME = """
## Conditions over time

These keys are added to a comparison whose operator needs a `value` and no `duration`. A group cannot have them: put them on
each comparison in it. `for` and `releaseAt` go together, and so do `times` and `within`; nothing else is combined.

They judge by the times of the readings, not by when these arrive, and see every reading of their variable, whatever else the
chain looks at. They look at what the sensor sent, not at what a transform made of it. What they remember survives a restart,
and an edit of the chain that leaves the comparison as it was.

"""

_AFTER = """
**Late readings** can make a condition true later than it would have been, never sooner, and do not undo what a newer reading
has decided. A late reading that contradicts `for` makes it count anew from the newest reading; `per` skips late
readings. A reading that arrives twice counts once.

**Text, null and other values that are no numbers** make > >= < <= and between false, as they do without time: they end `for`,
do not count for `times`, and end a dead band; `per` starts again with the next number.

**When a sensor falls silent,** nobody knows what is true after its last reading. So `for` needs a reading at the end of the
time too, and does not turn true in silence; to act on silence, use `olderThan`. A sensor that reports only what changes
should repeat itself now and then.

**Devices** have `for` only. Their states stand until they are changed, so `for` counts from the last change and turns true by
itself.
"""


def page() -> str:
    parts = [_BEFORE]
    for title, operators in SECTIONS.items():
        parts.append(
            f"\n## {title}\n\n| operator | true when the value | needs | mind | example |\n|---|---|---|---|---|\n"
        )
        parts.extend(_row(symbol, described) for symbol, described in operators.items())
    parts.append(_TIME)
    parts.append("| keys | true when | example |\n|---|---|---|\n")
    parts.extend(f"| {keys} | {meaning} | `{_json(example)}` |\n" for keys, meaning, example in EXAMPLES)
    parts.append(_AFTER)
    return "".join(parts)


def _row(symbol: str, described: Operator) -> str:
    example = _json({"operator": symbol, **described.example})
    cells = [f"`{symbol}`", described.meaning, _needs(described), described.odd, f"`{example}`"]
    return f"| {' | '.join(cells)} |\n"


def _needs(described: Operator) -> str:
    value = [f"`value`: {described.operand.words}"] if described.operand else []
    duration = ["`duration`"] if described.takes_duration else []
    return "; ".join(value + duration) or "nothing"


def _json(example: object) -> str:
    """As it stands in a table of Markdown, where a bar would end the cell."""
    return json.dumps(example).replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is not fresh")
    if parser.parse_args(arguments).check:
        fresh = PAGE.is_file() and PAGE.read_text() == page()
        print(
            f"{PAGE.name} is {'fresh' if fresh else 'not what the code says; run python -m rules.engine.operators_page'}"
        )
        return 0 if fresh else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
