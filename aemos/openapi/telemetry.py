"""POST /telemetry, which REST framework does not know: the view is plain Django for speed, and so described by hand."""

from __future__ import annotations

from typing import Any

from aemos.openapi.operations import problem_schema, response
from rules.events import CLAIMABLE, MAXIMUM_EVENTS

PATH = "/api/v1/telemetry"
SECURITY_SCHEME = "deviceToken"
TAG = "telemetry"
REFUSAL, OVERLOAD = "TelemetryRefusal", "TelemetryOverload"


def add_telemetry(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """A drf-spectacular hook."""
    result["paths"][PATH] = {"post": _operation()}
    result["paths"] = dict(sorted(result["paths"].items()))
    components = result.setdefault("components", {})
    components.setdefault("schemas", {}).update(_schemas())
    components.setdefault("securitySchemes", {})[SECURITY_SCHEME] = {
        "type": "http",
        "scheme": "bearer",
        "description": "The token of a sensor or a device, as POST /api/v1/device-tokens shows it once.",
    }
    return result


def _operation() -> dict[str, Any]:
    body = {"oneOf": [_reference("TelemetryEvent"), _reference("TelemetryBatch")]}
    return {
        "operationId": "telemetry_create",
        "summary": "Send what a sensor measured, or what a device reports of its states",
        "description": "The token names the sensor or device. 202 means that the events are kept, whatever happens next.",
        "tags": [TAG],
        "security": [{SECURITY_SCHEME: []}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body, "examples": _examples()}}},
        "responses": _responses(),
    }


def _responses() -> dict[str, Any]:
    retry = {"Retry-After": _header("integer", "Seconds to wait")}
    return {
        "202": _response("The events are kept.", "TelemetryReceipt"),
        "400": response("Nothing is accepted; `errors` says where it is wrong.", REFUSAL),
        "401": response("The token is missing, unknown, revoked or expired.", REFUSAL)
        | {"headers": {"WWW-Authenticate": _header("string", "Bearer")}},
        "403": response("The token may not send this: another's uuid, or a type too urgent for it.", REFUSAL),
        "413": response(f"More than {MAXIMUM_EVENTS} events, or more than 1 MB.", REFUSAL),
        "415": response("The body is compressed in a way that is not known here; gzip is.", REFUSAL),
        "429": response("The organization has used up its share of the queue.", OVERLOAD) | {"headers": retry},
        "503": response("None can be taken now; try again after the time given.", OVERLOAD) | {"headers": retry},
    }


def _schemas() -> dict[str, Any]:
    event = {
        "values": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                "nullable": True,
                "oneOf": [{"type": "number"}, {"type": "string"}, {"type": "boolean"}],
            },
            "description": "Variables of the sensor, or states of the device, by name.",
        },
        "timestamp": _text("When it was measured, with time zone; now if left out.", format="date-time"),
        "eventId": _text("The sender's own id, for tracing.", format="uuid"),
        "type": _text(
            "telemetry-data for sensors and device-state-change for devices if left out.", enum=sorted(CLAIMABLE)
        ),
        "uuid": _text("The sensor or device of the token; another one is refused.", format="uuid"),
    }
    counts = {"accepted": {"type": "integer", "minimum": 0}, "rejected": {"type": "integer", "minimum": 0}}
    result = _object(
        {"index": {"type": "integer"}, "accepted": {"type": "boolean"}, "reason": _text("accepted, or why not")}
    )
    accepted = {"type": "integer", "enum": [0], "description": "No event of the request was accepted."}
    place = {
        "index": {"type": "integer", "nullable": True, "description": "The item of a batch."},
        "field": _text("The field in it, such as values.ph.", nullable=True),
    }
    overload = {
        "reason": _text("The same word as in code."),
        "queueDepth": {"type": "integer", "nullable": True},
        "threshold": {"type": "integer", "nullable": True},
        "thresholdSource": _text(
            "configured, or drain-rate: lowered to what the workers finish in time.", nullable=True
        ),
        "drainRate": {"type": "number", "nullable": True, "description": "Events that the workers finish in a second."},
        "circuitState": _text("CLOSED, HALF_OPEN or OPEN, where the circuit was asked.", nullable=True),
        "retryAfter": {"type": "integer", "description": "Seconds."},
    }
    strict = {"type": "boolean", "default": False, "description": "Refuse all when anything cannot be used."}
    left_out = {"type": "string", "enum": ["value", "event"]}
    problem = _object(
        place | {"detail": _text("A sentence for people."), "leftOut": left_out}, required=["detail", "leftOut"]
    )
    batch = {"type": "array", "minItems": 1, "maxItems": MAXIMUM_EVENTS, "items": _reference("TelemetryEvent")}
    return {
        "TelemetryEvent": _object(event, required=["values"]) | {"additionalProperties": False},
        "TelemetryBatch": _object({"events": batch, "strict": strict}, required=["events"])
        | {"additionalProperties": False},
        "TelemetryReceipt": _object(
            counts
            | {
                "results": {"type": "array", "items": result, "description": "Only when some were rejected."},
                "problems": {
                    "type": "array",
                    "items": problem,
                    "description": "What cannot be used, and was left out.",
                },
            },
            required=[*counts],
        ),
        REFUSAL: problem_schema(accepted=accepted),
        OVERLOAD: problem_schema(accepted=accepted, **overload),
    }


def _examples() -> dict[str, Any]:
    one = {"values": {"ph": 6.1, "waterLevel": 41.5}}
    return {
        "one": {"summary": "One event, measured now", "value": one},
        "batch": {"summary": "Several at once", "value": {"events": [one | {"timestamp": "2026-05-01T06:00:00Z"}]}},
    }


def _object(properties: dict[str, Any], *, required: list[str] | None = None) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | {"required": required} if required else schema


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


def _header(kind: str, description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _response(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _reference(schema)}}}


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
