"""The REST API of alarms and of what people decide about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast
from uuid import UUID

from django.contrib.auth.models import AbstractBaseUser
from django.db.models import QuerySet
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from aemos.lib.problems import Conflict
from devices.areas.models import Area, within
from devices.filters import BooleanFilter, CharFilter, ChoiceFilter, FilterSet, UUIDFilter, by_uuid
from devices.models import Organization
from devices.serializers import CamelCaseSerializer, ScopedField
from devices.viewsets import ReadViewSet
from rules.effects import alarms
from rules.models import Alarm, RuleChain, Severity


class AlarmSerializer(CamelCaseSerializer[Alarm]):
    """Something that needs a person. `originatorName` is empty when the sensor, device or rule chain was deleted."""

    organization = ScopedField[Organization](read_only=True)
    chain = ScopedField[RuleChain](read_only=True, allow_null=True)
    originator_name = serializers.CharField(read_only=True)

    class Meta:
        model = Alarm
        fields = [
            "uuid",
            "organization",
            "source_type",
            "originator_uuid",
            "originator_name",
            "type",
            "severity",
            "state",
            "message",
            "chain",
            "node",
            "raised_at",
            "last_raised_at",
            "times_raised",
            "is_flapping",
            "acknowledged_at",
            "acknowledged_by",
            "cleared_at",
            "cleared_by",
        ]


class AlarmFilter(FilterSet):
    ordered_by = {"raised_at": "raisedAt", "severity": "severity", "type": "type"}
    searched = ("type", "message")
    span = "raised_at"
    organization = by_uuid("organization")
    chain = by_uuid("chain")
    originator = UUIDFilter(field_name="originator_uuid")
    type = CharFilter()
    severity = ChoiceFilter(choices=Severity.choices)
    state = ChoiceFilter(choices=Alarm.State.choices)
    open = BooleanFilter(method="filter_open", label="Not cleared.")
    area = UUIDFilter(
        method="filter_area", label="uuid of an area; of sensors and devices that stand in it or its parts."
    )

    def filter_open(self, rows: QuerySet[Alarm], name: str, value: bool) -> QuerySet[Alarm]:
        return rows.exclude(state=Alarm.State.CLEARED) if value else rows.filter(state=Alarm.State.CLEARED)

    def filter_area(self, rows: QuerySet[Alarm], name: str, value: UUID) -> QuerySet[Alarm]:
        found = Area.objects.filter(uuid=value).first()
        return alarms.standing_in(rows, within(found)) if found else rows.none()


class AlarmViewSet(ReadViewSet[Alarm]):
    """Alarms, the newest first. Rules raise and clear them; people acknowledge them, and clear what no rule clears."""

    resource = "alarms"
    area_path = "area"
    verbs: ClassVar = dict.fromkeys(("acknowledge", "clear"), "change")
    queryset = Alarm.objects.select_related("organization", "chain")
    serializer_class = AlarmSerializer
    filterset_class = AlarmFilter

    @extend_schema(request=None)
    @action(detail=True, methods=["post"])
    def acknowledge(self, request: Request, **_: Any) -> Response:
        """Says that somebody knows of it. 409 when somebody did before, or it is cleared."""
        return self._decide(request, alarms.acknowledge)

    @extend_schema(request=None)
    @action(detail=True, methods=["post"])
    def clear(self, request: Request, **_: Any) -> Response:
        """Says that it is over. A rule that still finds it wrong raises it anew. 409 when it was cleared before."""
        return self._decide(request, alarms.clear)

    def _decide(self, request: Request, decide: Callable[..., int]) -> Response:
        row = self.get_object()
        by = cast("AbstractBaseUser", request.user).get_username()
        decided = decide(Alarm.objects.filter(pk=row.pk), by=by)
        row = self.get_object()
        if not decided:
            raise Conflict(f"It is {row.state} already.")
        return Response(self.get_serializer(row).data)

    def get_object(self) -> Alarm:
        row: Alarm = super().get_object()
        alarms.name_originators([row])
        return row

    def paginate_queryset(self, queryset: Any) -> Any:
        page = super().paginate_queryset(queryset)
        alarms.name_originators(page or ())
        return page
