"""Interlocks, what they require, and what they vetoed, in the REST API."""

from __future__ import annotations

from typing import Any

from django.utils import timezone
from rest_framework import serializers

from devices.filters import ChoiceFilter, FilterSet, by_uuid
from devices.models import DeviceState, Interlock, Requirement, StateChange, Variable, Veto
from devices.serializers import CamelCaseSerializer, ScopedField, StrictMixin, ValueField
from devices.viewsets import EditViewSet, ReadViewSet


class InterlockSerializer(CamelCaseSerializer[Interlock]):
    """What a state must never do, whoever asks. What is null limits nothing."""

    state = ScopedField[DeviceState](queryset=DeviceState.objects.select_related("device"), path="device__organization")
    excludes = ScopedField[DeviceState](
        queryset=DeviceState.objects.select_related("device"),
        path="device__organization",
        many=True,
        required=False,
        help_text="uuids of states that must not be on at the same time.",
    )

    class Meta:
        model = Interlock
        fields = [
            "uuid", "state", "minimum_on_seconds", "minimum_off_seconds", "maximum_on_seconds", "maximum_runs_per_hour",
            "maximum_runs_per_day", "maximum_on_seconds_per_hour", "maximum_on_seconds_per_day", "maximum_amount_per_hour",
            "maximum_amount_per_day", "allowed_from", "allowed_until", "timezone", "excludes", "alarm_on_veto",
        ]  # fmt: skip
        immutable = ["state"]

    def candidate(self, attrs: Any) -> Any:
        return super().candidate({name: value for name, value in attrs.items() if name != "excludes"})

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        state = attrs.get("state") or (self.instance.state if isinstance(self.instance, Interlock) else None)
        problems = [problem for each in attrs.get("excludes", ()) if (problem := exclusion_problem(state, each))]
        if problems:
            raise serializers.ValidationError({"excludes": problems})
        return super().validate(attrs)


def exclusion_problem(state: DeviceState | None, other: DeviceState) -> str:
    """Why the one cannot exclude the other; empty when it can."""
    if state is not None and other.pk == state.pk:
        return "a state cannot exclude itself"
    if state is not None and other.device.organization_id != state.device.organization_id:
        return f"{other} belongs to another organization"
    if other.is_momentary:
        return f"{other} is momentary, and so never on"
    return "" if other.safe_value is not None else f"{other} needs a safe value, which says when it is on"


class RequirementSerializer(CamelCaseSerializer[Requirement]):
    """A variable that must be fresh, not suspect and in range for a state to go on."""

    interlock = ScopedField[Interlock](
        queryset=Interlock.objects.select_related("state__device"), path="state__device__organization"
    )
    variable = ScopedField[Variable](queryset=Variable.objects.select_related("sensor"), path="sensor__organization")
    equals = ValueField(required=False, allow_null=True)

    class Meta:
        model = Requirement
        fields = ["uuid", "interlock", "variable", "minimum", "maximum", "equals", "fresh_seconds", "holds_while_on"]
        immutable = ["interlock"]


class VetoSerializer(CamelCaseSerializer[Veto]):
    """What an interlock did not let happen, counted by kind and who asked. With an `overriddenReason` it was done."""

    device = serializers.UUIDField(source="state.device.uuid", read_only=True)
    deviceName = serializers.CharField(source="state.device.name", read_only=True)  # noqa: N815
    state = serializers.UUIDField(source="state.uuid", read_only=True)
    stateName = serializers.CharField(source="state.name", read_only=True)  # noqa: N815
    value = ValueField(read_only=True)

    class Meta:
        model = Veto
        fields = [
            "uuid", "device", "deviceName", "state", "stateName", "kind", "source", "actor", "count", "value", "detail",
            "overridden_reason", "first_at", "last_at",
        ]  # fmt: skip


class LockSerializer(StrictMixin):
    """Until when rules and other people leave a state as it is, and why."""

    until = serializers.DateTimeField()
    reason = serializers.CharField(max_length=200, required=False, allow_blank=True, default="")

    def validate_until(self, value: Any) -> Any:
        if value <= timezone.now():
            raise serializers.ValidationError("Must be in the future.")
        return value


class InterlockFilter(FilterSet):
    device = by_uuid("state__device")
    state = by_uuid("state")


class InterlockViewSet(EditViewSet[Interlock]):
    """What states must never do, whoever asks: rules, schedules, replays and people. One for each state."""

    resource = "interlocks"
    organization_path = "state__device__organization"
    parent = "state"
    parent_path = "device__organization"
    queryset = Interlock.objects.select_related("state__device__organization").prefetch_related("excludes")
    serializer_class = InterlockSerializer
    filterset_class = InterlockFilter


class RequirementFilter(FilterSet):
    interlock = by_uuid("interlock")
    variable = by_uuid("variable")


class RequirementViewSet(EditViewSet[Requirement]):
    """What must be so for a state to go on."""

    resource = "interlocks"
    organization_path = "interlock__state__device__organization"
    parent = "interlock"
    parent_path = "state__device__organization"
    queryset = Requirement.objects.select_related("interlock__state__device__organization", "variable__sensor")
    serializer_class = RequirementSerializer
    filterset_class = RequirementFilter


class VetoFilter(FilterSet):
    ordered_by = {"last_at": "lastAt", "count": "count"}
    searched = ("detail", "actor")
    span = "last_at"
    device = by_uuid("state__device")
    state = by_uuid("state")
    kind = ChoiceFilter(choices=Veto.Kind.choices)
    source = ChoiceFilter(choices=StateChange.Source.choices)


class VetoViewSet(ReadViewSet[Veto]):
    """What interlocks did not let happen, and what people overrode, the newest first."""

    resource = "vetoes"
    organization_path = "state__device__organization"
    queryset = Veto.objects.select_related("state__device")
    serializer_class = VetoSerializer
    filterset_class = VetoFilter
