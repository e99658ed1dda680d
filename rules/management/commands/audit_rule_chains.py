"""`manage.py audit_rule_chains`: every chain judged as if it were saved now; exit status 1 when one has a problem."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, groupby
from operator import attrgetter
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error as DatabaseError
from django.db.models import QuerySet

from aemos.lib.progress import ProgressBar
from devices.models import Organization
from rules.authoring import lint, validation
from rules.engine.exceptions import Problem
from rules.models import RuleChain
from rules.processing import schedules

CHUNK = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A chain with what is wrong with it, and what looks wrong."""

    chain: RuleChain
    problems: Sequence[Problem]
    warnings: Sequence[Problem]


class Command(BaseCommand):
    help = (
        "Judge every rule chain, enabled or not, as saving it would, print its problems and warnings, and exit with 1 if any "
        "has a problem. A chain that was valid once has one when its sensor, device or state is gone."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--organization", metavar="UUID", help="chains of this organization only")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            chains = _chains(options["organization"])
            number = chains.count()
            # On standard error, so that JSON can be piped.
            with ProgressBar(self.stderr, unit="chains") as bar:
                findings = list(_findings(chains, done=partial(bar.draw, of=number)))
        except DatabaseError as error:
            raise CommandError(f"The database cannot be reached: {error}") from error
        wrong = sum(bool(found.problems) for found in findings)
        self.stdout.write(_as_json(findings, number) if options["json"] else _as_text(findings, number))
        if wrong:
            raise CommandError(f"{wrong:,} of {number:,} chains have problems.")


def _findings(chains: QuerySet[RuleChain], *, done: Callable[[int], None]) -> Iterator[Finding]:
    """Of the chains with a problem or a warning; `done` is called with the number of chains that were judged."""
    numbers = count(1)
    for organization_id, own in groupby(chains.iterator(chunk_size=CHUNK), key=attrgetter("organization_id")):
        everyone = lint.OrganizationWriters(organization_id)
        for chain in own:
            nodes = list(chain.nodes.all())
            problems = schedules.problems_of(chain) + validation.problems_of(chain, nodes)
            doubts = lint.warnings_of(chain, nodes, rivals=everyone)
            done(next(numbers))
            if problems or doubts:
                yield Finding(chain=chain, problems=problems, warnings=doubts)


def _chains(organization: str | None) -> QuerySet[RuleChain]:
    chains = RuleChain.objects.select_related("organization").prefetch_related("nodes")
    rows = chains.order_by("organization__name", "organization_id", "name")
    if not organization:
        return rows
    try:
        return rows.filter(organization=Organization.objects.get(uuid=organization))
    except (Organization.DoesNotExist, ValidationError) as error:
        raise CommandError(f"There is no organization with the uuid {organization}.") from error


def _as_text(findings: Sequence[Finding], number: int) -> str:
    lines = []
    for found in findings:
        off = "" if found.chain.enabled else ", switched off"
        lines.append(f"{found.chain.name} ({found.chain.uuid}) of {found.chain.organization}{off}")
        lines += [f"  problem  {problem}" for problem in found.problems]
        lines += [f"  warning  {problem}" for problem in found.warnings]
    warned = sum(bool(found.warnings) for found in findings)
    wrong = sum(bool(found.problems) for found in findings)
    lines.append(f"{number:,} chains: {wrong:,} with problems, {warned:,} with warnings.")
    return "\n".join(lines)


def _as_json(findings: Sequence[Finding], number: int) -> str:
    rows = [
        {
            "uuid": str(found.chain.uuid),
            "name": found.chain.name,
            "organization": str(found.chain.organization.uuid),
            "enabled": found.chain.enabled,
            "validationErrors": [asdict(problem) for problem in found.problems],
            "validationWarnings": [asdict(problem) for problem in found.warnings],
        }
        for found in findings
    ]
    return json.dumps({"chains": number, "findings": rows}, indent=2)
