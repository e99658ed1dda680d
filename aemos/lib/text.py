"""Texts from outside in, as a column of the database can hold them out."""

from __future__ import annotations


def storable(text: str, maximum: int) -> str:
    """At most so many characters of it, and no NUL: PostgreSQL stores none."""
    return text.replace("\0", "")[:maximum]
