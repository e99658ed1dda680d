"""`manage.py second_factor`: see who has a second factor, and remove that of somebody who has lost it."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandError

from devices.people import second_factor


class Command(BaseCommand):
    help = "Says whether a person has a second factor. --remove switches it off, for who lost phone and recovery codes."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("username")
        parser.add_argument("--remove", action="store_true", help="the next login needs the password alone")

    def handle(self, *_: Any, **options: Any) -> None:
        user = User.objects.filter(username=options["username"]).first()
        if user is None:
            raise CommandError(f"There is no user {options['username']}.")
        was_on = second_factor.remove(user) if options["remove"] else second_factor.is_on(user)
        state = "was on and is off now" if options["remove"] and was_on else "on" if was_on else "off"
        self.stdout.write(f"The second factor of {user.username}: {state}.")
