"""Texts from outside: fit for a column of the database, or read from a header."""

from __future__ import annotations


def storable(text: str, maximum: int) -> str:
    """At most so many characters of it, and no NUL: PostgreSQL stores none."""
    return text.replace("\0", "")[:maximum]


def bearer_token(authorization: str) -> str:
    """The token of an Authorization header; empty when it has none, or is of another scheme."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
