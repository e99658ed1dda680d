"""Make texts from outside fit for a column of the database."""

from __future__ import annotations


def storable(text: str, maximum: int) -> str:
    """At most so many characters of it, and no NUL: PostgreSQL stores none."""
    return text.replace("\0", "")[:maximum]
