"""`manage.py ledger`: the account of every accepted event, lane by lane; exit status 1 when it does not close."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from redis.exceptions import RedisError

from aemos.lib import redis
from rules.events import Lane
from rules.journal.ledger import Account, audit
from rules.journal.slots import slots

COLUMNS = ("accepted", "processed", "duplicate", "dead", "waiting", "in_flight", "missing")


class Command(BaseCommand):
    help = (
        "Print, per lane, accepted = processed + duplicate + dead + waiting + in flight, where waiting and in flight are "
        "counted in the journal itself, and exit with 1 if it does not close."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            accounts = {slot: audit(slot) for slot in slots()}
        except RedisError as error:
            raise CommandError(redis.explain(error)) from error
        lanes = {
            str(lane): sum((account for slot, account in accounts.items() if slot.lane == lane), Account())
            for lane in Lane
        }
        self.stdout.write(_as_json(lanes) if options["json"] else _as_table(lanes))
        wrong = [f"{slot.lane}/{slot.partition}" for slot, account in accounts.items() if not account.closes]
        if wrong:
            raise CommandError(f"The ledger does not close: {', '.join(wrong)}.")
        if not options["json"]:
            self.stdout.write("The ledger closes.")


def _rows(lanes: dict[str, Account]) -> dict[str, dict[str, int]]:
    rows = lanes | {"total": sum(lanes.values(), Account())}
    return {
        name: {column: getattr(account, column) for column in (*COLUMNS, "depth")} for name, account in rows.items()
    }


def _as_json(lanes: dict[str, Account]) -> str:
    closes = all(account.closes for account in lanes.values())
    return json.dumps({"lanes": _rows(lanes), "closes": closes}, indent=2)


def _as_table(lanes: dict[str, Account]) -> str:
    lines = ["".join([f"{'lane':<10}", *(f"{column.replace('_', ' '):>12}" for column in COLUMNS)])]
    for name, row in _rows(lanes).items():
        lines.append("".join([f"{name:<10}", *(f"{row[column]:>12,}" for column in COLUMNS)]))
    return "\n".join(lines)
