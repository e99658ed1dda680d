"""JSON of notifications and their deliveries: rows in, camelCase out."""

from __future__ import annotations

from rest_framework import serializers

from devices.models import Device, Organization
from devices.serializers import CamelCaseSerializer, ScopedField
from notifications.models import Delivery, Notification


class DeliverySerializer(CamelCaseSerializer[Delivery]):
    """How far a notification has come on one protocol."""

    class Meta:
        model = Delivery
        fields = ["protocol", "state", "attempts", "last_error", "updated_at"]


class NotificationSerializer(CamelCaseSerializer[Notification]):
    """One message to devices and people."""

    organization = ScopedField[Organization](read_only=True)
    device = ScopedField[Device](read_only=True)
    payload = serializers.DictField()
    deliveries = DeliverySerializer(many=True, read_only=True)

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
            "deliveries",
        ]
