"""An example of each body and answer in JSON, made of its schema: examples of fields by their names, and by their types."""

from __future__ import annotations

from typing import Any

from aemos.lib import problems

UUID = "4f6e2d1c-8b3a-4c5d-9e7f-0a1b2c3d4e5f"
MOMENT = "2026-05-01T06:00:00Z"
_CONDITION = {"sourceType": "sensor", "UUID": UUID, "key": "ph", "operator": ">", "value": 6.5}
_COMMAND = {"type": "device_command", "deviceUuid": UUID, "stateName": "power", "value": "on"}

# By "Schema.field", "field", or "type:format"; a field that is not here is left out of a body unless it is required.
FIELDS: dict[str, Any] = {
    "ApiTokenRequest.name": "Grafana",
    "DeviceRequest.name": "Dosing pump",
    "DeviceStateRequest.name": "power",
    "OrganizationRequest.name": "Basil farm",
    "RuleChainRequest.name": "Dose when pH is high",
    "RuleNodeRequest.name": "pH above 6.5",
    "VariableRequest.name": "ph",
    "action": "POST api/v1/sensors",
    "actor": "ada",
    "config": _CONDITION,
    "detail": "name: This field is required.",
    "event": {"id": UUID, "values": {"ph": 6.1}},
    "name": "Tank 1",
    "note": "Bo, second shift",
    "nodes": [
        {"name": "pH above 6.5", "type": "filter", "config": _CONDITION, "next": "pump on"},
        {"name": "pump on", "type": "action", "config": _COMMAND},
    ],
    "password": "correct-horse-battery-staple",
    "payload": '{"values": {"ph": "high"}}',
    "points": [{"at": MOMENT, "count": 15, "minimum": 6.01, "maximum": 6.08, "mean": 6.04, "last": 6.02}],
    "reason": "circuit-open",
    "stateName": "power",
    "unit": "mS/cm",
    "username": "ada",
    "values": {"ph": 6.1},
    "variable": UUID,
    "boolean:": True,
    "integer:": 1,
    "number:": 6.1,
    "string:": "text",
    "string:date-time": MOMENT,
    "string:time": "06:00:00",
    "string:uri": "https://farm.example.org/",
    "string:uuid": UUID,
}
# Of a body, what is not required and yet belongs to a first try.
_WISHED = frozenset({"unit", "values", "timestamp", "stateName", "role"})
JSON = "application/json"


def add_examples(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """A drf-spectacular hook. What has an example keeps it."""
    schemas = result["components"]["schemas"]
    for operations in result["paths"].values():
        for operation in operations.values():
            body = operation.get("requestBody", {}).get("content", {}).get(JSON)
            contents = [(body, True)] if body else []
            for response in operation["responses"].values():
                contents += [
                    (content, False)
                    for kind, content in response.get("content", {}).items()
                    if kind in (JSON, problems.MEDIA_TYPE)
                ]
            for content, is_body in contents:
                if "schema" in content and not {"example", "examples"} & content.keys():
                    content["example"] = _example(content["schema"], schemas, is_body=is_body)
    return result


def _example(schema: dict[str, Any], schemas: dict[str, Any], *, is_body: bool, at: str = "", depth: int = 0) -> Any:
    """`at`: "Schema.field" that it is the value of."""
    for name in (at, at.partition(".")[2]):
        if name in FIELDS and _fits(FIELDS[name], schema):
            return FIELDS[name]
    if "example" in schema:
        return schema["example"]
    for combination in ("allOf", "oneOf", "anyOf"):
        if schema.get(combination):
            return _example(schema[combination][0], schemas, is_body=is_body, at=at, depth=depth)
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _example(schemas[name], schemas, is_body=is_body, at=f"{name}.", depth=depth)
    return _of_form(schema, schemas, is_body=is_body, at=at, depth=depth)


_TYPES: dict[str, type | tuple[type, ...]] = {
    "array": list, "boolean": bool, "integer": int, "number": (int, float), "object": dict, "string": str,
}  # fmt: skip


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value that its name suggests is one of the schema, as far as can be told from its type."""
    if "$ref" in schema or schema.get("enum") or any(name in schema for name in ("allOf", "oneOf", "anyOf")):
        return False
    kind = schema.get("type")
    return kind is None or isinstance(value, _TYPES[kind])


def _of_form(schema: dict[str, Any], schemas: dict[str, Any], *, is_body: bool, at: str, depth: int) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    if "properties" in schema:
        return _of_object(schema, schemas, is_body=is_body, at=at, depth=depth)
    if schema.get("type") == "array":
        items = schema.get("items", {})
        return [] if depth > 3 else [_example(items, schemas, is_body=is_body, at="", depth=depth + 1)]
    return {} if schema.get("type") == "object" else _of_type(schema)


def _of_object(
    schema: dict[str, Any], schemas: dict[str, Any], *, is_body: bool, at: str, depth: int
) -> dict[str, Any]:
    name, required = at.partition(".")[0], set(schema.get("required", ()))
    found = {}
    for field, described in schema["properties"].items():
        if is_body and (described.get("readOnly") or not (field in required or field in _WISHED)):
            continue
        if not is_body and described.get("writeOnly"):
            continue
        found[field] = _example(described, schemas, is_body=is_body, at=f"{name}.{field}", depth=depth + 1)
    return found


def _of_type(schema: dict[str, Any]) -> Any:
    kind, form = schema.get("type", ""), schema.get("format", "")
    value = FIELDS.get(f"{kind}:{form}", FIELDS.get(f"{kind}:"))
    if kind in ("integer", "number") and value is not None:
        return min(max(value, schema.get("minimum", value)), schema.get("maximum", value))
    return value
