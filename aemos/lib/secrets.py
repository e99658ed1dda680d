"""Secrets that are made rather than configured: a file name in, a random text out that stays the same for this installation."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path


def development_secret(path: Path) -> str:
    """The secret kept in `path`, made on first use (mode 0600); a new one per process where the folder cannot be written."""
    try:
        if not path.exists():
            _create(path)
        return path.read_text(encoding="utf-8")
    except OSError:
        return secrets.token_urlsafe(48)


def _create(path: Path) -> None:
    """Written aside and linked into place, so that of two processes that start together neither reads half a secret."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(48))
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        os.unlink(aside)
