"""Read what the API says of a refused request."""

from __future__ import annotations

from typing import Any

from aemos.lib.problems import MEDIA_TYPE


def problem(answer: Any, status: int | None = None) -> dict[str, Any]:
    """The problem details of an answer that is one."""
    assert answer.headers["Content-Type"] == MEDIA_TYPE, answer.headers["Content-Type"]
    body: dict[str, Any] = answer.json()
    assert body["status"] == answer.status_code
    assert status in (None, answer.status_code), body
    return body


def wrong(answer: Any) -> dict[str, str]:
    """Field -> what is wrong with it; "" is the request as a whole."""
    return {error.get("field", ""): error["detail"] for error in problem(answer)["errors"]}
