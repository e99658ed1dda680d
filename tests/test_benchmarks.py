"""The benchmarks of rules run, and both programs that they compare do the same work; how fast is not asked here."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator

import pytest

from benchmarks import rules
from benchmarks.rules import Sizes


@pytest.fixture(autouse=True)
def _nothing_stays_frozen() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.django_db
def test_the_benchmark_of_rules_measures_what_it_says() -> None:
    lines: list[str] = []
    rules.measure(Sizes(chains=25, others=30, events=50, predicates=10), report=lines.append)

    assert [line.split("  ")[0] for line in lines[1:4]] == ["predicate >", "predicate ==", "predicate between"]
    assert lines[4].startswith("events, 25 chains of 3 nodes")
    assert [line.split(":")[0] for line in lines[5:]] == [
        "an event that one chain waits for",
        "an event that no chain waits for",
    ]
    assert all(float(re.sub(r".* ratio ", "", line)) > 0 for line in lines[5:])


@pytest.mark.django_db
def test_loading_is_measured_with_the_chains_there_are() -> None:
    rules.make_chains(rules.make_organization(), 7)

    assert rules.load_here()["chains"] == 7
