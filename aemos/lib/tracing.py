"""Traces of single readings and requests, by OpenTelemetry: W3C traceparents and moments in, spans out.

Off without an exporter (OTEL_EXPORTER_OTLP_ENDPOINT): then `is_on` is false, nothing else here is called, and the tracing part of
OpenTelemetry is not even imported.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.conf import settings

from aemos.lib.per_process import per_process

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}\Z")
_exporter: SpanExporter | None = None
now_ns = time.time_ns


def is_on() -> bool:
    return _exporter is not None or bool(settings.OTEL_EXPORTER_OTLP_ENDPOINT)


def export_to(exporter: SpanExporter | None) -> None:
    """Sends the spans of this process there instead, at once; None goes back to the settings."""
    global _exporter  # noqa: PLW0603  one for each process
    _exporter = exporter
    _provider.cache_clear()


def valid(traceparent: str) -> str:
    """The traceparent, or empty where a sender has written something else."""
    return traceparent if _TRACEPARENT.match(traceparent) else ""


def trace_id(traceparent: str) -> str:
    """32 hexadecimal digits."""
    return traceparent[3:35]


def log_fields(traceparent: str) -> dict[str, str]:
    """For the `extra` of a log line about something that may be traced."""
    return {"trace_id": trace_id(traceparent)} if traceparent else {}


class OpenSpan:
    """A span that has begun. `traceparent` is empty where it is not sampled: then what comes of it makes no spans either."""

    def __init__(self, span: Span) -> None:
        context = span.get_span_context()
        self._span = span
        self.traceparent = (
            f"00-{context.trace_id:032x}-{context.span_id:016x}-01" if context.trace_flags.sampled else ""
        )

    def end(self, *, error: str = "", at_ns: int = 0) -> None:
        """Now, or at that time. `error`: what went wrong, in one sentence."""
        from opentelemetry.trace import Status, StatusCode

        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(at_ns or now_ns())


def begin(name: str, *, parent: str, start_ns: int, attributes: Mapping[str, Any] | None = None) -> OpenSpan:
    """A span below `parent`, a traceparent, or, where that is empty, of a new trace. Times are nanoseconds since 1970."""
    return OpenSpan(
        _tracer().start_span(name, context=_context(parent), start_time=start_ns, attributes=dict(attributes or {}))
    )


@contextmanager
def span(name: str, *, parent: str = "", attributes: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """A span around a block; log lines of the block name its trace."""
    with _tracer().start_as_current_span(name, context=_context(parent), attributes=dict(attributes or {})) as made:
        yield made


def current_trace_id() -> str:
    """That of the block that `span` is around; empty outside, and where nothing is traced."""
    if not is_on():
        return ""
    from opentelemetry.trace import get_current_span

    context = get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def _context(traceparent: str) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not traceparent:
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, context=Context())


def _tracer() -> Tracer:
    return _provider().get_tracer("aemos")


@per_process
def _provider() -> TracerProvider:
    """Not before the first span: a gunicorn worker must not share its exporter's thread with the master."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.OTEL_TRACES_SAMPLER_ARG)),
        resource=Resource.create({"service.name": f"aemos-{settings.PROCESS_NAME}", "service.namespace": "aemos"}),
    )
    if _exporter is not None:
        provider.add_span_processor(SimpleSpanProcessor(_exporter))
    else:
        endpoint = f"{settings.OTEL_EXPORTER_OTLP_ENDPOINT.rstrip('/')}/v1/traces"
        provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint), schedule_delay_millis=1_000)
        )
    return provider
