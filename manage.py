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


if __name__ == "__main__":
    main()
