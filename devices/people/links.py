"""The address of an invitation's page."""

from __future__ import annotations

from typing import Any

from django.urls import reverse


def page_of(request: Any, token: str) -> str:
    """Whole, as the browser or program of this request reaches the server."""
    return str(request.build_absolute_uri(reverse("join-page", args=[token])))
