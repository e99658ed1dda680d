"""`manage.py import_readings FILE --sensor UUID`: stores readings of before, from a CSV file."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError

from aemos.lib.progress import ProgressBar
from devices.history import importing
from devices.history.importing import Report, UnusableFile
from devices.models import Sensor


class Command(BaseCommand):
    help = (
        "Store readings of before, from a CSV file with a column of times (at, timestamp, time) and one for each variable, "
        "or with the columns at, variable and value, as exports have them. What is stored already stays as it is; what "
        "cannot be used is named by line and column. Imported readings run no rules. Run it again after an interruption: "
        "nothing comes twice."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", type=Path, help="the CSV file, in UTF-8; times without a zone are UTC")
        parser.add_argument("--sensor", type=UUID, required=True, help="uuid of the sensor that measured")
        parser.add_argument(
            "--column",
            action="append",
            default=[],
            metavar="COLUMN=VARIABLE",
            help="a column that has another name than its variable; may be given several times",
        )
        parser.add_argument("--dry-run", action="store_true", help="read and report, and store nothing")

    def handle(self, *_: Any, **options: Any) -> None:
        sensor = Sensor.objects.filter(uuid=options["sensor"]).first()
        if sensor is None:
            raise CommandError(f"There is no sensor {options['sensor']}.")
        path: Path = options["file"]
        report = Report()
        try:
            with path.open(encoding="utf-8", newline="") as file, ProgressBar(self.stderr, unit="bytes") as bar:
                size, lines, columns = path.stat().st_size, _Counted(file), _columns(options["column"])
                for done in importing.read(lines, sensor, dry_run=options["dry_run"], columns=columns):
                    report = done
                    bar.draw(min(lines.read, size), of=size)
        except (OSError, UnicodeDecodeError, UnusableFile) as error:
            raise CommandError(f"{path}: {error}") from error
        except DatabaseError as error:
            raise CommandError(f"The database gave up: {error}. Run it again: what is stored stays.") from error
        self._tell(report, dry_run=options["dry_run"])

    def _tell(self, report: Report, *, dry_run: bool) -> None:
        for problem in report.problems:
            self.stderr.write(str(problem))
        if report.refused > len(report.problems):
            self.stderr.write(f"and {report.refused - len(report.problems):,} more")
        each = ", ".join(f"{name} {count:,}" for name, count in sorted(report.by_variable.items()))
        self.stdout.write(
            f"{report.lines:,} lines: {report.stored:,} readings {'would be ' if dry_run else ''}stored"
            f"{f' ({each})' if each else ''}, {report.duplicates:,} known already, {report.empty:,} empty, "
            f"{report.refused:,} refused"
        )
        if report.refused:
            raise CommandError(
                "Not everything could be used: see above. The rest is stored." if not dry_run else "See above."
            )


class _Counted:
    """Lines of a file, and how many bytes they were so far; the file itself does not say so while it is iterated."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.read += len(line.encode())
            yield line


def _columns(given: list[str]) -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    if wrong := [column for column, sign, name in pairs if not (column and sign and name)]:
        raise CommandError(f"--column {wrong[0]}: write COLUMN=VARIABLE.")
    return {column: name for column, _, name in pairs}
