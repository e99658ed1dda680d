"""`manage.py sync_broker`: bring the broker's accounts in step with the live device tokens."""

from __future__ import annotations

from itertools import count
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error as DatabaseError

from aemos.lib.progress import ProgressBar
from gateway.mqtt.accounts import BATCH, connected, difference, verify
from gateway.mqtt.connection import BrokerError


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
            total, batches = wanted.created + wanted.removed, count()
            # Every step is drawn: a batch lasts as long as the broker takes.
            with ProgressBar(self.stdout, draw_seconds=0) as bar:
                done = verify(security, before_batch=lambda: bar.draw(min(next(batches) * BATCH, total), of=total))
        self.stdout.write(f"{done.created:,} made, {done.removed:,} taken away.")
        if done.failed:
            raise CommandError(f"The broker refused {done.failed:,}; the log says why. Run the command again.")
