"""`manage.py audit`: verify the audit log, or export it."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError

from aemos.lib.progress import ProgressBar
from devices.audit import chain
from devices.audit.models import AuditEntry, AuditHead


class Command(BaseCommand):
    help = (
        "The audit log. `status` says where it ends: write the hash down elsewhere, and nobody can change what is before it "
        "unseen. `verify` follows the chain of hashes and exits with 1 when it was changed. `export` writes one JSON object a "
        "line."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("action", choices=["status", "verify", "export"])
        parser.add_argument("--file", type=Path, help="verify an exported file instead of the database")
        parser.add_argument(
            "--head", default="", help="verify that the chain holds this hash, which was written down before"
        )
        parser.add_argument(
            "--after", type=int, default=0, metavar="POSITION", help="export what comes after that entry"
        )

    def handle(self, *_: Any, **options: Any) -> None:
        try:
            getattr(self, f"_{options['action']}")(options)
        except DatabaseError as error:
            raise CommandError(f"The database cannot be reached: {error}") from error

    def _status(self, _: dict[str, Any]) -> None:
        head = AuditHead.objects.filter(pk=1).first() or AuditHead()
        self.stdout.write(f"sealed    {head.position:,} entries, kept from {head.first_position + 1:,} on")
        self.stdout.write(f"waiting   {AuditEntry.objects.filter(position=None).count():,} entries")
        self.stdout.write(f"head      {head.hash or 'none yet'}")

    def _verify(self, options: dict[str, Any]) -> None:
        if options["file"]:
            found, heads = _of_file(options["file"])
        else:
            with ProgressBar(self.stdout, unit="entries") as bar:
                found = chain.verify(on_progress=lambda done, of: bar.draw(done, of=of))
            heads = set()
        if options["head"] and not _holds(options["head"], heads, in_file=bool(options["file"])):
            found.append(f"no entry has the hash {options['head']}")
        if found:
            raise CommandError("The audit log was changed:\n" + "\n".join(f"  {each}" for each in found))
        self.stdout.write("The audit log is whole.")

    def _export(self, options: dict[str, Any]) -> None:
        rows = AuditEntry.objects.filter(position__gt=options["after"]).order_by("position").iterator(chunk_size=1_000)
        for record in chain.exported(rows):
            self.stdout.write(json.dumps(record, ensure_ascii=False))


def _of_file(path: Path) -> tuple[list[str], set[str]]:
    """Its problems, and its hashes. The first entry is believed: it says what the second has to follow."""
    try:
        with path.open(encoding="utf-8") as lines:
            records = _records(lines)
            first = next(records, None)
            if first is None:
                raise CommandError(f"{path} is empty.")
            hashes = {first["hash"]}

            def followed() -> Iterator[dict[str, Any]]:
                for record in records:
                    hashes.add(record["hash"])
                    yield record

            begins = list(chain.problems([first])) if first["position"] == 1 else []
            return begins + list(chain.problems(followed(), before=first["hash"], position=first["position"])), hashes
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} is no export of the audit log: {error}") from error


def _records(lines: Any) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in lines if line.strip())


def _holds(head: str, hashes: set[str], *, in_file: bool) -> bool:
    return head in hashes if in_file else AuditEntry.objects.filter(hash=head).exists()
