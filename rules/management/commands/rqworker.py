"""`manage.py rqworker [queue ...]`: drains the journal and runs rules; without queues it serves critical, normal and low."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError
from django_rq.management.commands.rqworker import Command as RqWorkerCommand
from redis.exceptions import RedisError

from aemos.lib import redis
from rules.processing import index

WORKER_TTL_SECONDS = 30


class Command(RqWorkerCommand):
    help = "Drain the journal and run rules. Queues are served in the order given; the default is critical normal low."

    def add_arguments(self, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        # RQ's own default would unpickle whatever lies in Redis. Its worker_ttl of 7 minutes is how long one that was killed
        # would be counted as living, and how long an idle one would not notice that Redis hangs.
        parser.set_defaults(serializer="rq.serializers.JSONSerializer", worker_ttl=WORKER_TTL_SECONDS)

    def handle(self, *args: str, **options: Any) -> None:
        try:
            redis.client().ping()
        except RedisError as error:
            raise CommandError(redis.explain(error)) from error
        index.load()
        # RQ logs four lines a job; at the usual verbosity only what went wrong is worth a line.
        options["verbosity"] = max(0, options["verbosity"] - 1)
        super().handle(*(args or settings.LANES), **options)
