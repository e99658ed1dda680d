"""`manage.py rebuild_rule_index`: every chain compiled, here and in all processes; exit status 1 when one cannot be."""

from __future__ import annotations

import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import Error as DatabaseError

from aemos.lib.progress import ProgressBar
from devices import catalogue
from rules.engine.exceptions import InvalidChain
from rules.models import RuleChain
from rules.processing import loading


class Command(BaseCommand):
    help = (
        "Let all processes build anew what they know of rules, sensors, devices and tokens, which is only needed when rows were "
        "changed past AEMOS; they notice within about a second. Compile every chain that may run here, too, name those that "
        "are not valid, and exit with 1 if there are any."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            organizations = catalogue.rebuild_all()
            invalid = self._compile()
        except DatabaseError as error:
            raise CommandError(f"The database cannot be reached: {error}") from error
        self.stdout.write(f"All processes build the index of {organizations:,} organizations again.")
        if invalid:
            raise CommandError("\n".join([*invalid, f"{len(invalid):,} chains are not valid and do not run."]))

    def _compile(self) -> list[str]:
        """Counts are of the chains that run; gives a line for each of the others."""
        began = time.perf_counter()
        invalid: list[str] = []
        chains = nodes = references = 0
        ids = list(RuleChain.objects.running().order_by("pk").values_list("pk", flat=True))
        with ProgressBar(self.stdout, unit="chains") as bar:
            for done, (row, result) in enumerate(loading.compiled(ids), start=1):
                if isinstance(result, InvalidChain):
                    invalid.append(_complaint(row, result))
                else:
                    chains += 1
                    nodes += len(result.spec.nodes)
                    references += len(result.references)
                bar.draw(done, of=len(ids))
        took = time.perf_counter() - began
        self.stdout.write(f"{chains:,} chains, {nodes:,} nodes, {references:,} references compiled in {took:.1f} s.")
        return invalid


def _complaint(row: RuleChain, error: InvalidChain) -> str:
    return f"{row.name} ({row.uuid}) of {row.organization}: {error}"
