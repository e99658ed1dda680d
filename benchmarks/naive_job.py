"""The job of the simplest program that does the same: one reading, one insert."""

from __future__ import annotations

import os
from functools import cache

import psycopg


@cache
def _connection() -> psycopg.Connection:
    return psycopg.connect(os.environ["NAIVE_DATABASE"], autocommit=True)


def store(variable: int, microseconds: int, number: float) -> None:
    _connection().execute(
        "INSERT INTO readings VALUES (%s, timestamptz 'epoch' + %s * interval '1 microsecond', %s, NULL) ON CONFLICT DO NOTHING",
        (variable, microseconds, number),
    )
