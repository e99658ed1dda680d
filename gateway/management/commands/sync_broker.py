"""`manage.py sync_broker`: live device tokens and the broker's own tables in, a broker that is in step with them out."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error as DatabaseError

from gateway.mqtt.accounts import BATCH, Changes, connected, difference, verify
from gateway.mqtt.connection import BrokerError

BAR_WIDTH = 30


class Command(BaseCommand):
    help = (
        "Compare the accounts and rights that the MQTT broker has for sensors and devices with their live tokens, and even out "
        "the difference. The gateway does the same by itself, every minute and after every change; this command shows it. It "
        "may run beside a gateway and may be repeated."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="only count what is missing and what is too much")

    def handle(self, *args: Any, **options: Any) -> None:
        if not settings.MQTT_ENABLED:
            raise CommandError("There is no broker to bring in step: MQTT_ENABLED is false.")
        try:
            self._sync(dry_run=options["dry_run"])
        except BrokerError as error:
            where = f"{settings.MQTT_HOST}:{settings.MQTT_PORT}"
            raise CommandError(
                f"{where}: {error}. Check MQTT_HOST, MQTT_PORT, MQTT_USERNAME, MQTT_PASSWORD."
            ) from error
        except DatabaseError as error:
            raise CommandError(f"The database cannot be reached: {error}") from error

    def _sync(self, *, dry_run: bool) -> None:
        with connected() as security:
            wanted = difference(security)
            self.stdout.write(f"{wanted.created:>12,}  accounts are missing\n{wanted.removed:>12,}  are too many")
            if dry_run:
                return
            done = verify(security, before_batch=self._progress(wanted))
        self.stdout.write(f"{done.created:,} made, {done.removed:,} taken away.")
        if done.failed:
            raise CommandError(f"The broker refused {done.failed:,}; the log says why. Run the command again.")

    def _progress(self, wanted: Changes) -> Any:
        """What draws the bar before each batch; nothing where nobody looks."""
        total, batches = wanted.created + wanted.removed, 0

        def draw() -> None:
            nonlocal batches
            done = min(batches * BATCH, total)
            batches += 1
            full = BAR_WIDTH * done // max(total, 1)
            self.stdout.write(f"\r[{'#' * full}{'.' * (BAR_WIDTH - full)}] {done:,} of {total:,}\r", ending="")
            self.stdout.flush()

        return draw if self.stdout.isatty() else lambda: None
