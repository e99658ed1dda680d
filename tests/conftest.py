"""Fixtures that take the place of a plugin's own."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def django_db_modify_db_settings_xdist_suffix() -> None:
    """Each process of a parallel run has servers and databases of its own, so the names need no suffix."""
