"""History over REST: points of a sensor's variables for charts and tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar

import msgspec
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import StreamingHttpResponse
from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request
from rest_framework.response import Response

from aemos.lib.csv_lines import csv_lines
from devices.areas.models import Area, within
from devices.filters import IsoDateTimeFilter
from devices.history import series
from devices.history.series import INTERVALS, RAW, TooManyPoints
from devices.models import Sensor, Variable
from devices.viewsets import CsvRenderer, NdjsonRenderer

# Without "from", the last day.
DEFAULT_SPAN = timedelta(days=1)
AUTO = "auto"
_HEADER = ("at", "variable", "value", "count", "minimum", "maximum", "mean", "inRange", "last", "suspect")


class PointSerializer(serializers.Serializer[Any]):
    """A reading (`value`), or the good readings of one interval."""

    at = serializers.DateTimeField(help_text="When it was measured, or when the interval begins.")
    value = serializers.JSONField(required=False, help_text="Of a single reading: a number, a text, true or false.")
    suspect = serializers.CharField(required=False, help_text="Of a single reading: why rules do not believe it.")
    count = serializers.IntegerField(required=False, help_text="Readings in the interval.")
    minimum = serializers.FloatField(required=False, help_text="The lowest of them.")
    maximum = serializers.FloatField(required=False, help_text="The highest of them.")
    mean = serializers.FloatField(required=False, help_text="Their mean.")
    inRange = serializers.IntegerField(  # noqa: N815
        required=False, allow_null=True, help_text="Those of them within the target range; null where there is none."
    )
    last = serializers.FloatField(required=False, allow_null=True, help_text="The newest of them.")


class SeriesSerializer(serializers.Serializer[Any]):
    """One variable."""

    name = serializers.CharField(help_text="Its name.")
    unit = serializers.CharField(help_text="Its unit; may be empty.")
    points = PointSerializer(many=True, help_text="In the order of time; intervals without readings are left out.")
    truncated = serializers.BooleanField(
        help_text="Whether there are more readings than fit; only where the interval is raw."
    )


class HistorySerializer(serializers.Serializer[Any]):
    """What a sensor measured in a span of time."""

    sensor = serializers.UUIDField(help_text="uuid of the sensor.")
    interval = serializers.CharField(
        help_text="raw: single readings; otherwise the length of the interval of each point."
    )
    variables = SeriesSerializer(many=True, help_text="Those that were asked for.")


class _Query(serializers.Serializer[Any]):
    variables = serializers.CharField(required=False)
    interval = serializers.ChoiceField(choices=[AUTO, RAW, *INTERVALS], default=AUTO)
    format = serializers.CharField(required=False)

    def to_internal_value(self, data: Any) -> Any:
        if unknown := sorted(set(data) - {"from", "to", "variables", "interval", "format"}):
            text = "There is no such parameter; there are: from, interval, to, variables."
            raise serializers.ValidationError({name: [text] for name in unknown})
        found = super().to_internal_value(data)
        for name in ("from", "to"):
            found[name] = self._moment(data.get(name), name)
        return found

    def _moment(self, text: str | None, name: str) -> datetime | None:
        if text is None:
            return None
        try:
            moment: datetime | None = IsoDateTimeFilter().field.clean(text)
        except ValidationError as error:
            raise serializers.ValidationError({name: error.messages}) from None
        return moment

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        end = attrs["to"] or timezone.now()
        begin = attrs["from"] or end - DEFAULT_SPAN
        if begin >= end:
            raise serializers.ValidationError({"from": ["It is not before the end of the span."]})
        return {**attrs, "from": begin, "to": end}


_SPAN = (
    OpenApiParameter("from", datetime, description="Begin, with its zone; without it a day before the end."),
    OpenApiParameter("to", datetime, description="End, not included; without it now."),
    OpenApiParameter(
        "interval",
        enum=[AUTO, RAW, *INTERVALS],
        description="auto, raw for single readings, or the length of an interval.",
    ),
)


class HistoryMixin:
    """`GET /sensors/{uuid}/history`."""

    history_formats: ClassVar = (CsvRenderer, NdjsonRenderer)

    def get_renderers(self: Any) -> list[BaseRenderer]:
        renderers: list[BaseRenderer] = super().get_renderers()  # type: ignore[misc]
        return [*renderers, *(each() for each in self.history_formats)] if self.action == "history" else renderers

    @extend_schema(
        summary="History of a sensor for charts and tables",
        description="At most 2,000 points of each variable. Without an interval, one is chosen of which a chart has enough. "
        "Hours and days are in UTC. Suspect readings are left out of all but raw. As CSV or NDJSON, one line for each point.",
        parameters=[
            OpenApiParameter("variables", description="Names, separated by commas; without it all of the sensor."),
            *_SPAN,
        ],
        responses=HistorySerializer,
        filters=False,
    )
    @action(detail=True, methods=["get"], pagination_class=None, filter_backends=[])
    def history(self: Any, request: Request, uuid: str) -> Any:
        """Points of the variables of a sensor."""
        sensor: Sensor = self.get_object()
        asked = _asked(request)
        found = list(_series(_variables(sensor, asked.get("variables")), asked))
        if isinstance(request.accepted_renderer, CsvRenderer):
            return _export(request, _HEADER, _flat(found), sensor.name)
        interval = found[0]["interval"] if found else asked["interval"]
        variables = [{name: each[name] for name in ("name", "unit", "points", "truncated")} for each in found]
        return Response({"sensor": sensor.uuid, "interval": interval, "variables": variables})


class AreaHistoryMixin:
    """`GET /areas/{uuid}/history`: a file of all that stands in an area."""

    def get_renderers(self: Any) -> list[BaseRenderer]:
        renderers: list[BaseRenderer] = super().get_renderers()  # type: ignore[misc]
        return [CsvRenderer(), NdjsonRenderer()] if self.action == "history" else renderers

    @extend_schema(
        summary="History of all sensors of an area, as a file",
        description="As CSV, or NDJSON: one line for each point of each variable of the sensors that stand in the area or its "
        "parts, sensor by sensor. At most 2,000 points of each variable; without an interval, one is chosen.",
        parameters=[
            OpenApiParameter("variables", description="Names, separated by commas; without it all that there are."),
            *_SPAN,
        ],
        responses={(200, "text/csv"): OpenApiTypes.STR, (200, "application/x-ndjson"): OpenApiTypes.STR},
        filters=False,
    )
    @action(detail=True, methods=["get"], pagination_class=None, filter_backends=[])
    def history(self: Any, request: Request, uuid: str) -> Any:
        """Points of all that stands there."""
        area: Area = self.get_object()
        asked = _asked(request)
        sensors = Sensor.objects.filter(area__in=within(area)).order_by("name")
        known = set(Variable.objects.filter(sensor__in=sensors).values_list("name", flat=True))
        wanted = known if asked.get("variables") is None else {each.strip() for each in asked["variables"].split(",")}
        _refuse_unknown(wanted - known, known, "a sensor of this area")
        return _export(request, ("sensor", *_HEADER), _of_sensors(sensors, asked, wanted), area.name)


def _of_sensors(sensors: QuerySet[Sensor], asked: dict[str, Any], wanted: set[str]) -> Iterator[dict[str, Any]]:
    for sensor in sensors.prefetch_related("variables").iterator(chunk_size=100):
        variables = sorted((row for row in sensor.variables.all() if row.name in wanted), key=lambda row: row.name)
        for row in _flat(_series(variables, asked)):
            yield {"sensor": sensor.name, **row}


def _asked(request: Request) -> dict[str, Any]:
    """The parameters, with the interval that was chosen. Raises ValidationError."""
    query = _Query(data=request.query_params.dict())
    query.is_valid(raise_exception=True)
    asked: dict[str, Any] = query.validated_data
    begin, end, interval = asked["from"], asked["to"], asked["interval"]
    asked["interval"] = series.interval_for(begin, end) if interval == AUTO else interval
    try:
        series.check(begin, end, asked["interval"])
    except TooManyPoints as problem:
        raise serializers.ValidationError({"interval": [f"{problem}."]}) from None
    return asked


def _series(variables: Iterable[Variable], asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    begin, end, interval = asked["from"], asked["to"], asked["interval"]
    for variable in variables:
        if interval == RAW:
            values = series.values(variable, begin, end)
            truncated = len(values) > series.MAXIMUM_POINTS
            points = list(series.as_rows(values[: series.MAXIMUM_POINTS]))
        else:
            truncated, points = False, list(series.as_rows(series.points(variable, begin, end, interval)))
        yield {
            "name": variable.name,
            "unit": variable.unit,
            "points": points,
            "truncated": truncated,
            "interval": interval,
        }


def _variables(sensor: Sensor, names: str | None) -> list[Variable]:
    known = {variable.name: variable for variable in sensor.variables.order_by("name")}
    if names is None:
        return list(known.values())
    wanted = [name.strip() for name in names.split(",")]
    _refuse_unknown(set(wanted) - known.keys(), known.keys(), "this sensor")
    return [known[name] for name in dict.fromkeys(wanted)]


def _refuse_unknown(unknown: Collection[str], known: Collection[str], owner: str) -> None:
    if unknown:
        names, there = ", ".join(map(repr, sorted(unknown))), ", ".join(sorted(known)) or "none"
        raise serializers.ValidationError({"variables": [f"{names}: not a variable of {owner} (known: {there})."]})


def _flat(found: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in found:
        for point in each["points"]:
            yield {"variable": each["name"], **point}


def _export(
    request: Request, header: Sequence[str], rows: Iterator[dict[str, Any]], name: str
) -> StreamingHttpResponse:
    """A file in the format that was asked for."""
    if request.accepted_renderer.format == NdjsonRenderer.format:
        lines: Iterator[Any] = (msgspec.json.encode(row) + b"\n" for row in rows)
        return _stream(lines, NdjsonRenderer.media_type, f"{name}.ndjson")
    lines = csv_lines(list(header), ([row.get(column) for column in header] for row in rows))
    return _stream(lines, "text/csv; charset=utf-8", f"{name}.csv")


def _stream(lines: Iterator[Any], content_type: str, name: str) -> StreamingHttpResponse:
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    return StreamingHttpResponse(
        lines, content_type=content_type, headers={"Content-Disposition": f'attachment; filename="{plain}"'}
    )
