"""The least that a web server can do: what other figures are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def application(_environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"hello"]
