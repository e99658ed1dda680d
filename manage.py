#!/usr/bin/env python
"""Runs AEMOS management commands: arguments in, an exit status out."""

from __future__ import annotations

import os
import sys

# The gateway and the scheduler wait on many sockets in greenlets: patching must come before anything imports threading.
if len(sys.argv) > 1 and sys.argv[1] in ("rungateway",):
    from gevent import monkey

    monkey.patch_all()


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "aemos.settings")
    from django.core.management import execute_from_command_line

    from aemos.checks import UnsafeConfiguration

    try:
        execute_from_command_line(sys.argv)
    except UnsafeConfiguration as refusal:
        sys.exit(str(refusal))
    _note(sys.argv[1:])


def _note(words: list[str]) -> None:
    """What changes something stands in the audit log; a database that is away has said so before."""
    from django.apps import apps

    if not apps.ready:  # `help` and the like need no settings
        return
    from django.db import DatabaseError

    from devices.audit.notes import note_command

    try:
        note_command(words)
    except DatabaseError as error:
        print(f"this is not in the audit log: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
