"""JSON of organizations, members, sensors, devices, tokens and readings: camelCase in, rows out, and back again."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, TypeVar
from uuid import UUID

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError as DjangoValidationError
from django.db.models import Model, QuerySet, UniqueConstraint
from django.utils import timezone
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers
from rest_framework.exceptions import ValidationError
from rest_framework.relations import PKOnlyObject

from devices.models import (
    Area,
    DataProblem,
    Device,
    DeviceState,
    DeviceToken,
    Membership,
    Organization,
    Reading,
    Sensor,
    SensorClock,
    StateChange,
    Variable,
)
from devices.permissions import access_of

Row = TypeVar("Row", bound=Model)
AnyJSON = {"description": "a number, a text, true or false, or null", "nullable": True}


def camel(name: str) -> str:
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)


class StrictMixin(serializers.Serializer[Any]):
    """Refuses fields that do not exist, and read-only ones unless they say what is so already (GET, edit, PUT)."""

    def to_internal_value(self, data: Any) -> Any:
        errors = self._misplaced(data) if isinstance(data, Mapping) else {}
        try:
            value = super().to_internal_value(data)
        except ValidationError as error:
            detail = error.detail if isinstance(error.detail, dict) else {"detail": error.detail}
            raise ValidationError({**detail, **errors}) from error
        if errors:
            raise ValidationError(errors)
        return value

    def _misplaced(self, data: Mapping[str, Any]) -> dict[str, list[str]]:
        known = ", ".join(name for name, field in self.fields.items() if not field.read_only)
        errors = {
            str(name): [f"There is no such field; known here: {known}."] for name in data if name not in self.fields
        }
        # REST framework would take the number 7 for the text "7".
        texts = [name for name in data if isinstance(self.fields.get(name), serializers.CharField)]
        errors |= {name: ["Must be a text."] for name in texts if isinstance(data[name], int | float)}
        wholes = [name for name in data if isinstance(self.fields.get(name), serializers.IntegerField)]
        errors |= {name: ["Must be a whole number."] for name in wholes if isinstance(data[name], bool | float | str)}
        read_only = [name for name in data if name in self.fields and self.fields[name].read_only]
        if read_only:
            current = self.to_representation(self.instance) if isinstance(self.instance, Model) else {}
            changed = [name for name in read_only if name not in current or current[name] != data[name]]
            errors |= {name: ["This field cannot be written."] for name in changed}
        return errors


class CamelCaseMixin(StrictMixin):
    """Fields are declared under the names of the model and shown in camelCase."""

    def get_fields(self) -> dict[str, serializers.Field[Any, Any, Any, Any]]:
        renamed = {}
        for name, field in super().get_fields().items():
            if camel(name) != name and field.source is None:
                field.source = name
            renamed[camel(name)] = field
        return renamed


class CamelCaseSerializer(CamelCaseMixin, serializers.ModelSerializer[Row]):
    """Of a model. `Meta.immutable` names what is fixed after creation; the model's clean() and constraints are asked."""

    def get_unique_together_validators(self) -> list[Any]:
        return []  # _refuse_doubles names the field; REST framework's own says "non_field_errors"

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if self.instance is not None:
            self._refuse_moves(attrs)
        candidate = self.candidate(attrs)
        try:
            candidate.clean()
        except DjangoValidationError as error:
            raise ValidationError(in_camel_case(error)) from error
        self._refuse_doubles(candidate)
        return attrs

    def candidate(self, attrs: Mapping[str, Any]) -> Model:
        """The row as it would be, for the model to judge."""
        model: type[Model] = self.Meta.model
        row = copy.copy(self.instance) if isinstance(self.instance, Model) else model()
        for name, value in attrs.items():
            setattr(row, name, value)
        return row

    def _refuse_moves(self, attrs: Mapping[str, Any]) -> None:
        immutable = getattr(self.Meta, "immutable", ())
        moved = [name for name in immutable if name in attrs and attrs[name] != getattr(self.instance, name)]
        if moved:
            raise ValidationError({camel(name): ["This field cannot be changed after creation."] for name in moved})

    def _refuse_doubles(self, candidate: Model) -> None:
        for constraint in candidate._meta.constraints:
            if not isinstance(constraint, UniqueConstraint):
                continue
            try:
                constraint.validate(type(candidate), candidate)
            except DjangoValidationError as error:
                *scope, name = sorted(constraint.fields, key=lambda field: field == "name")
                kind = candidate._meta.verbose_name
                text = f"There is already a {kind} with this {name} for this {' and '.join(scope)}."
                raise ValidationError({camel(name): [text]}) from error


def in_camel_case(error: DjangoValidationError) -> dict[str, list[str]]:
    """The messages of a model's ValidationError under the names that the API knows; "detail" when it names no field."""
    if hasattr(error, "error_dict"):
        return {camel(name) if name != "__all__" else "detail": texts for name, texts in error.message_dict.items()}
    return {"detail": error.messages}


class ScopedField(serializers.SlugRelatedField[Row]):
    """A row by its uuid, found only in the organizations of the person who asks; `path` leads to the organization."""

    default_error_messages = {"does_not_exist": "There is none with the uuid {value}.", "invalid": "Must be a uuid."}

    def __init__(self, *, path: str = "organization", **options: Any) -> None:
        self.path = path
        super().__init__(slug_field="uuid", **options)

    def get_queryset(self) -> QuerySet[Row]:
        rows = super().get_queryset()
        assert rows is not None  # noqa: S101  only writable fields are asked, and those were given one
        return access_of(self.context["request"]).limit(rows, self.path, resource="organizations")

    def to_internal_value(self, data: Any) -> Row:
        try:
            UUID(data)
        except (ValueError, TypeError, AttributeError):
            self.fail("invalid")
        return super().to_internal_value(data)

    def to_representation(self, value: Row | PKOnlyObject) -> str:
        return str(super().to_representation(value))


def organization_field() -> ScopedField[Organization]:
    return ScopedField(queryset=Organization.objects.all(), path="pk")


def area_field(text: str) -> ScopedField[Area]:
    return ScopedField(queryset=Area.objects.all(), allow_null=True, required=False, help_text=text)


class OrganizationSerializer(CamelCaseSerializer[Organization]):
    """A farm or a company."""

    class Meta:
        model = Organization
        fields = ["uuid", "name", "keep_readings_days", "keep_hours_days", "created_at"]


class MembershipSerializer(CamelCaseSerializer[Membership]):
    """A person's role in an organization."""

    organization = organization_field()
    user = serializers.SlugRelatedField(slug_field="username", queryset=get_user_model()._default_manager.all())
    area = area_field("uuid of the area that an operator is limited to; null for no limit.")

    class Meta:
        model = Membership
        fields = ["organization", "user", "role", "area"]
        immutable = ["organization", "user"]


class MeasuredClockSerializer(CamelCaseSerializer[SensorClock]):
    """By how much a sensor's clock is off, and how many of its events were late or ahead."""

    class Meta:
        model = SensorClock
        fields = ["offset_ms", "late", "ahead", "updated_at"]


class SensorSerializer(CamelCaseSerializer[Sensor]):
    """Something that measures."""

    organization = organization_field()
    measured_clock = MeasuredClockSerializer(
        read_only=True, allow_null=True, help_text="null until an event has said when it happened."
    )

    area = area_field("uuid of the area that it stands in.")

    class Meta:
        model = Sensor
        fields = ["uuid", "organization", "area", "name", "clock", "late_after_seconds", "measured_clock", "created_at"]
        immutable = ["organization"]


class VariableSerializer(CamelCaseSerializer[Variable]):
    """One quantity a sensor measures."""

    sensor = ScopedField[Sensor](queryset=Sensor.objects.select_related("organization"))

    class Meta:
        model = Variable
        fields = [
            "uuid", "sensor", "name", "datatype", "unit", "target_minimum", "target_maximum", "minimum", "maximum",
            "maximum_step", "maximum_step_seconds",
            "stuck_after_seconds", "maximum_age_seconds", "keep_readings_days", "keep_hours_days", "created_at",
        ]  # fmt: skip
        immutable = ["sensor"]


class DeviceSerializer(CamelCaseSerializer[Device]):
    """Something that acts."""

    organization = organization_field()

    area = area_field("uuid of the area that it stands in.")

    class Meta:
        model = Device
        fields = [
            "uuid",
            "organization",
            "area",
            "name",
            "connected",
            "connection_changed_at",
            "last_seen_at",
            "created_at",
        ]
        read_only_fields = ["connected", "connection_changed_at", "last_seen_at"]
        immutable = ["organization"]


@extend_schema_field({"type": "array", "items": AnyJSON, "description": "Empty allows any value of the datatype."})
class ValueListField(serializers.JSONField):
    """Judged by DeviceState.clean, which knows the datatype."""


@extend_schema_field(AnyJSON)
class ValueField(serializers.JSONField):
    """One value of any of the three datatypes."""


class DeviceStateSerializer(CamelCaseSerializer[DeviceState]):
    """One switchable property of a device. `value` is what it should be, set by POST /device-state-instances and by rules;
    `reportedValue` is what the device says. `differs` is null while one of the two is not known.
    """

    device = ScopedField[Device](queryset=Device.objects.select_related("organization"))
    allowed_values = ValueListField(required=False)
    safe_value = ValueField(required=False, allow_null=True)
    value = ValueField(read_only=True)
    reported_value = ValueField(read_only=True)
    differs = serializers.BooleanField(read_only=True, allow_null=True)

    class Meta:
        model = DeviceState
        fields = [
            "uuid",
            "device",
            "name",
            "kind",
            "datatype",
            "allowed_values",
            "safe_value",
            "locked_until",
            "locked_by",
            "lock_reason",
            "value",
            "changed_at",
            "reported_value",
            "reported_at",
            "differs",
            "differs_since",
            "created_at",
        ]
        read_only_fields = ["reported_at", "differs_since", "locked_until", "locked_by", "lock_reason"]
        immutable = ["device"]


class DeviceTokenSerializer(CamelCaseSerializer[DeviceToken]):
    """The right of one sensor or one device to speak."""

    organization = ScopedField[Organization](read_only=True)
    sensor = ScopedField[Sensor](queryset=Sensor.objects.all(), required=False, allow_null=True)
    device = ScopedField[Device](queryset=Device.objects.all(), required=False, allow_null=True)

    class Meta:
        model = DeviceToken
        fields = [
            "uuid",
            "organization",
            "sensor",
            "device",
            "name",
            "prefix",
            "highest_priority",
            "expires_at",
            "revoked_at",
            "created_at",
        ]
        immutable = ["sensor", "device"]
        extra_kwargs = {"highest_priority": {"min_value": 1, "max_value": 10}}

    issued = ""

    def candidate(self, attrs: Mapping[str, Any]) -> Model:
        row = super().candidate(attrs)
        assert isinstance(row, DeviceToken)  # noqa: S101  Meta.model
        owner = row.sensor or row.device
        row.organization_id = owner.organization_id if owner else None  # type: ignore[assignment]
        return row

    def validate_expiresAt(self, value: Any) -> Any:  # noqa: N802  REST framework finds it by the field's name
        current = self.instance.expires_at if isinstance(self.instance, DeviceToken) else None
        if value is not None and value != current and value <= timezone.now():
            raise ValidationError("Must be in the future.")
        return value

    def create(self, validated_data: dict[str, Any]) -> DeviceToken:
        """The new row; `issued` holds the token itself, here and never again."""
        sensor, device = validated_data.pop("sensor", None), validated_data.pop("device", None)
        row, token = DeviceToken.objects.issue(sensor or device, **validated_data)
        self.issued = token
        return row


class IssuedTokenSerializer(DeviceTokenSerializer):
    """The answer to the one request that issues a token."""

    token = serializers.SerializerMethodField(help_text="Shown this once; it cannot be had again.")

    def get_token(self, _row: Any) -> str:
        return self.issued

    class Meta(DeviceTokenSerializer.Meta):
        fields = [*DeviceTokenSerializer.Meta.fields, "token"]


class ReadingSerializer(serializers.ModelSerializer[Reading]):
    """One measured value."""

    sensor = serializers.UUIDField(source="variable.sensor.uuid")
    variable = serializers.UUIDField(source="variable.uuid")
    name = serializers.CharField(source="variable.name")
    value = serializers.SerializerMethodField(method_name="get_measured")
    quality = serializers.SerializerMethodField(help_text="`suspect` of what rules do not believe, else `good`.")
    reason = serializers.CharField(source="suspect", allow_null=True, help_text="Why it is suspect.")

    class Meta:
        model = Reading
        fields = ["sensor", "variable", "name", "timestamp", "value", "quality", "reason"]

    def get_quality(self, row: Reading) -> str:
        return "suspect" if row.suspect else "good"

    @extend_schema_field(AnyJSON)
    def get_measured(self, row: Reading) -> float | str | bool | None:
        return row.value


class DataProblemSerializer(CamelCaseSerializer[DataProblem]):
    """One kind of problem with one value of a sensor or device: how often it came, and the newest."""

    organization = serializers.UUIDField(source="organization.uuid")
    originator = serializers.UUIDField(source="originator_uuid")

    class Meta:
        model = DataProblem
        fields = [
            "uuid", "organization", "source_type", "originator", "name", "kind", "count", "detail", "payload", "first_seen_at",
            "last_seen_at",
        ]  # fmt: skip


class CommandSerializer(CamelCaseSerializer[StateChange]):
    """How far a command to a device has come, and when it got there."""

    class Meta:
        model = StateChange
        fields = ["state", "deadline", "sent_at", "acknowledged_at", "settled_at", "error"]

    state = serializers.ChoiceField(source="command_state", choices=StateChange.CommandState.choices)
    error = serializers.CharField(source="command_error")


@extend_schema_field(CommandSerializer(allow_null=True))
class CommandField(serializers.Field[Any, Any, Any, Any]):
    """Null for what the device itself reported, which commands nothing."""

    def to_representation(self, row: StateChange) -> dict[str, Any] | None:
        return CommandSerializer(row).data if row.command_state else None


class StateChangeSerializer(serializers.ModelSerializer[StateChange]):
    """One change of a device's state, and how far its command has come."""

    device = serializers.UUIDField(source="state.device.uuid")
    state = serializers.UUIDField(source="state.uuid")
    stateName = serializers.CharField(source="state.name")  # noqa: N815  the API speaks camelCase
    value = ValueField()
    previous = ValueField()
    command = CommandField(source="*")

    class Meta:
        model = StateChange
        fields = [
            "uuid",
            "device",
            "state",
            "stateName",
            "value",
            "previous",
            "source",
            "actor",
            "timestamp",
            "command",
        ]
