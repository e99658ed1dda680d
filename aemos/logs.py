"""Log lines with fields: text for people, or one JSON object a line for programs, as LOG_FORMAT says.

Every line has `timestamp`, `level`, `logger`, `message` and `process`; lines about something name it in `fields`, such as
`device`, `chain`, `event_id`, `slot`, `request_id` and `trace_id`. Libraries' lines come in the same format.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from aemos.lib import tracing

# What `fields` are called in a line; anything else that a library attaches to its records stays out.
FIELDS = frozenset(
    {
        "address", "bytes", "chain", "device", "event_id", "message_id", "method", "milliseconds", "organization", "path",
        "protocol", "request_id", "slot", "status", "trace_id", "user",
    }
)  # fmt: skip
_INVITATION = re.compile(r"(/join/)[^\s\"'?#,]+")
_PROCESSES = {"rqworker": "worker", "rungateway": "gateway", "runscheduler": "scheduler"}


def process_name() -> str:
    """web, worker, gateway, scheduler, or the name of a management command."""
    program, *arguments = sys.argv
    if Path(program).name == "gunicorn" or "gunicorn" in Path(program).parts:
        return "web"
    return _PROCESSES.get(arguments[0], arguments[0]) if arguments and program.endswith("manage.py") else "other"


def formatter(kind: str) -> logging.Formatter:
    """For the LOGGING setting; `kind` is text or json."""
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(allow=FIELDS),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _with_trace,
        structlog.processors.format_exc_info,
        _without_secrets,
    ]
    last: list[Processor] = [_as_object, structlog.processors.JSONRenderer()] if kind == "json" else [_as_text]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=before, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )


def _with_trace(_logger: Any, _name: str, line: EventDict) -> EventDict:
    if "trace_id" not in line and (found := tracing.current_trace_id()):
        line["trace_id"] = found
    return line


def _without_secrets(_logger: Any, _name: str, line: EventDict) -> EventDict:
    """Django's own lines have the path of a request, and the link of an invitation is a secret."""
    for name in ("event", "exception"):
        if "/join/" in str(line.get(name, "")):
            line[name] = _INVITATION.sub(r"\1...", str(line[name]))
    return line


def _as_object(_logger: Any, _name: str, line: EventDict) -> EventDict:
    first = {name: line.pop(name) for name in ("timestamp", "level", "logger")}
    return {**first, "message": line.pop("event"), "process": process_name(), **line}


def _as_text(_logger: Any, _name: str, line: MutableMapping[str, Any]) -> str:
    timestamp, level, logger = line.pop("timestamp"), line.pop("level").upper(), line.pop("logger")
    message, trace = line.pop("event"), line.pop("exception", "")
    fields = "".join(f" {name}={value}" for name, value in line.items())
    return f"{timestamp} {level} {logger} {message}{fields}" + (f"\n{trace}" if trace else "")
