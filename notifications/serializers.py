"""Notifications and their deliveries as JSON."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import uuid4

from rest_framework import serializers
from rest_framework.exceptions import ValidationError

from devices.models import Device, Organization
from devices.serializers import CamelCaseMixin, CamelCaseSerializer, ScopedField, organization_field
from notifications.messages import PRIORITY_BY_SEVERITY, Protocol, protocols_for
from notifications.models import PROTOCOL_CHOICES, Delivery, Notification


class DeliverySerializer(CamelCaseSerializer[Delivery]):
    """How far a notification has come on one protocol."""

    class Meta:
        model = Delivery
        fields = ["protocol", "state", "attempts", "last_error", "updated_at"]


class NotificationSerializer(CamelCaseSerializer[Notification]):
    """One message to devices and people."""

    organization = ScopedField[Organization](read_only=True)
    device = ScopedField[Device](read_only=True, allow_null=True)
    payload = serializers.DictField()
    deliveries = DeliverySerializer(many=True, read_only=True)
    published_at = serializers.SerializerMethodField("get_published_at", help_text="Null until it is published.")

    class Meta:
        model = Notification
        fields = [
            "uuid",
            "organization",
            "device",
            "event",
            "priority",
            "payload",
            "timestamp",
            "created_at",
            "published_at",
            "expires_at",
            "deliveries",
        ]

    def get_published_at(self, row: Notification) -> datetime | None:
        return None if hasattr(row, "unpublished") else row.published_at


class NewNotificationSerializer(CamelCaseMixin):
    """A notification that a person sends. Without `device` it is for the whole organization."""

    organization = organization_field()
    device = ScopedField[Device](queryset=Device.objects.all(), required=False, allow_null=True, default=None)
    title = serializers.CharField(max_length=200)
    message = serializers.CharField(max_length=2_000, required=False, allow_blank=True, default="")
    severity = serializers.ChoiceField(choices=list(PRIORITY_BY_SEVERITY), default="info")
    type = serializers.CharField(
        max_length=50,
        required=False,
        default="multi-protocol",
        help_text="socket, mqtt, coap or multi-protocol; any other goes out on all three. `protocols` is asked first.",
    )
    protocols = serializers.ListField(
        child=serializers.ChoiceField(choices=PROTOCOL_CHOICES),
        required=False,
        allow_empty=False,
        max_length=10,
    )
    event_id = serializers.UUIDField(
        required=False, help_text="Your own; sending the same again notifies nobody twice.", default=uuid4
    )

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        device: Device | None = attrs["device"]
        if device is not None and device.organization_id != attrs["organization"].pk:
            raise ValidationError({"device": ["It belongs to another organization."]})
        named = attrs.pop("protocols", None)
        inferred = protocols_for(attrs.pop("type"))
        return {**attrs, "protocols": [Protocol(name) for name in named] if named else list(inferred)}
