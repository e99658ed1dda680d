"""Summaries, descriptions and errors of the operations that REST framework finds."""

from __future__ import annotations

import inspect
from typing import Any

from drf_spectacular.openapi import AutoSchema

from aemos.lib import problems
from aemos.openapi import words
from devices.serializers import StrictMixin

_VERBS = {
    "list": "List {many}",
    "retrieve": "Show one {one}",
    "create": "Create a new {one}",
    "update": "Replace the {one}",
    "partial_update": "Change the {one}",
    "destroy": "Delete the {one}",
}
PROBLEM = "Problem"
# Where secrets are tried, and failures counted.
GUESSED = ("/api/v1/auth/", "/api/v1/invitations/accept")
_WRITES = {"post", "put", "patch", "delete"}
# Status -> when it comes; the body is a problem in each case.
ERRORS = {
    "400": "The request is wrong; `errors` names each field.",
    "401": "Nobody is logged in: the token is missing, wrong or expired.",
    "403": "The role does not allow it.",
    "404": "There is no such thing in the organizations of the person who asks.",
    "406": "The answer has no such format.",
    "409": "It cannot be done as things stand; `detail` says why.",
    "413": "The request is larger than 1 MB.",
    "415": "The body has another format than JSON.",
    "429": "Too many requests; Retry-After says when to try again.",
    "503": "What the request needs does not answer; Retry-After says when to try again.",
}


class Schema(AutoSchema):
    """Summaries from the action and the model's name; of views without a model, from what they say of themselves."""

    def get_summary(self) -> str | None:
        action = getattr(self.view, "action", None)
        queryset = getattr(self.view, "queryset", None)
        if not action or queryset is None:
            return self._text().partition(".")[0].strip() or None
        meta = queryset.model._meta
        words = (
            _VERBS.get(action)
            or f"{action.capitalize()} {'the {one}' if getattr(self.view, 'detail', True) else '{many}'}"
        )
        return words.format(one=meta.verbose_name, many=meta.verbose_name_plural)

    def get_description(self) -> str:  # type: ignore[override]  # the stubs have REST framework's own
        text = self._text()
        if getattr(self.view, "action", None):
            return text
        _, _, rest = text.partition(".")
        return rest.strip()

    def _map_basic_serializer(self, serializer: Any, direction: Any) -> Any:
        """Serializers that refuse fields which do not exist say so."""
        schema: dict[str, Any] = super()._map_basic_serializer(serializer, direction)  # type: ignore[no-untyped-call]
        return schema | {"additionalProperties": False} if isinstance(serializer, StrictMixin) else schema

    def _text(self) -> str:
        """What the method says of itself, or else its view."""
        action = getattr(self.view, "action", None) or self.method.lower()
        method = getattr(self.view, action, None)
        own = method is not None and action not in _VERBS and inspect.getdoc(method)
        return " ".join((own or inspect.getdoc(type(self.view)) or "").split())


def add_errors(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """A drf-spectacular hook: every operation declares which problems it may answer, and that no parameter may be empty."""
    result.setdefault("components", {}).setdefault("schemas", {})[PROBLEM] = problem_schema()
    for path, operations in result["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "query":
                    _forbid_empty(parameter["schema"])
            for status in _statuses(path, method, operation):
                operation["responses"].setdefault(status, response(ERRORS[status]))
            operation["responses"] = dict(sorted(operation["responses"].items()))
    return result


def _forbid_empty(schema: dict[str, Any]) -> None:
    if schema == {"type": "string"}:
        schema["minLength"] = 1
    elif schema.get("type") == "array":
        schema["minItems"] = 1


def add_words(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """A drf-spectacular hook: describes what no serializer describes, and the tags."""
    for name, schema in result["components"]["schemas"].items():
        plain = name.removeprefix("Patched")
        for field, described in schema.get("properties", {}).items():
            text = words.FIELDS.get(f"{plain}.{field}") or words.FIELDS.get(field)
            if text and not described.get("description"):
                _describe(described, text)
    for operations in result["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                if not parameter.get("description") and parameter["name"] in words.PARAMETERS:
                    parameter["description"] = words.PARAMETERS[parameter["name"]]
    result["tags"] = [{"name": name, "description": text} for name, text in words.TAGS.items()]
    return result


def _describe(described: dict[str, Any], text: str) -> None:
    if "$ref" in described:  # OpenAPI 3.0 ignores what stands beside a reference
        described["allOf"] = [{"$ref": described.pop("$ref")}]
    described["description"] = text


def _statuses(path: str, method: str, operation: dict[str, Any]) -> list[str]:
    found = ["503"]
    if "requestBody" in operation:
        found += ["413", "415"]
    if method in _WRITES:
        found += ["400"]
    query = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"]
    found += ["400"] if query else []
    found += ["404"] if "page" in query else []
    if {} not in operation.get("security", [{}]):
        found += ["401", "403"]
    if path.startswith(GUESSED):
        found += ["401", "429"]
    if "{" in path:
        found += ["404"]
    if method in _WRITES and not path.startswith("/api/v1/auth/"):
        found += ["409"]
    return found


def response(description: str, schema: str = PROBLEM) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"description": description, "content": {problems.MEDIA_TYPE: {"schema": reference}}}


def problem_schema(**more: Any) -> dict[str, Any]:
    text = {"type": "string"}
    error = {
        "type": "object",
        "description": "One thing that is wrong in the request.",
        "properties": {
            "index": {"type": "integer", "description": "The item of a batch of telemetry, from 0."},
            "field": text | {"description": "The field, such as name or nodes[0].config.value."},
            "code": text | {"description": "A stable word, such as required."},
            "detail": text | {"description": "A sentence for people."},
            "value": {"description": "What was found there.", "nullable": True},
        },
        "required": ["detail"],
    }
    properties = {
        "type": text
        | {"description": f"{problems.TYPE_PREFIX} and the code.", "example": f"{problems.TYPE_PREFIX}invalid"},
        "title": text | {"description": "The code in words.", "example": "Invalid"},
        "status": {"type": "integer", "description": "The HTTP status.", "example": 400},
        "code": text | {"description": "A stable word for programs.", "example": "invalid"},
        "detail": text | {"description": "A sentence for people.", "example": "name: This field is required."},
        "errors": {
            "type": "array",
            "items": error,
            "description": "What is wrong in the request, where it can be named.",
        },
    }
    return {
        "type": "object",
        "description": "Why a request was refused or failed (RFC 9457).",
        "properties": properties | more,
        "required": ["type", "title", "status", "code", "detail"],
    }
