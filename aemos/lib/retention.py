"""Delete old rows in chunks so small that no other transaction waits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.db.models import QuerySet

from aemos.lib import redis

CHUNK_ROWS = 1_000
# The scheduler has other tasks every second; what is left is deleted at its next tick.
CHUNKS_PER_TURN = 5
EVERY_SECONDS = 3_600


def delete_in_chunks(expired: Iterable[QuerySet[Any]], *, done_key: str) -> int:
    """At most once an hour from the moment that nothing is left; returns how many rows. Raises RedisError."""
    client = redis.client()
    if client.exists(done_key):
        return 0
    deleted = 0
    for rows in expired:
        for _ in range(CHUNKS_PER_TURN):
            found = _delete_some(rows)
            deleted += found
            if found < CHUNK_ROWS:
                break
        else:
            return deleted
    client.set(done_key, "1", ex=EVERY_SECONDS)
    return deleted


def _delete_some(rows: QuerySet[Any]) -> int:
    ids = list(rows.order_by("id").values_list("id", flat=True)[:CHUNK_ROWS])
    if ids:
        rows.model._default_manager.filter(id__in=ids).delete()
    return len(ids)
