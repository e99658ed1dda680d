"""The audit log over REST, for admins: lists that can be filtered, and exported as CSV."""

from __future__ import annotations

from rest_framework import serializers

from devices.audit.models import AuditEntry
from devices.filters import CharFilter, ChoiceFilter, FilterSet
from devices.serializers import CamelCaseSerializer
from devices.viewsets import ReadViewSet


class AuditSerializer(CamelCaseSerializer[AuditEntry]):
    """One entry of the audit log."""

    organization = serializers.UUIDField(source="organization_uuid", allow_null=True)

    class Meta:
        model = AuditEntry
        fields = [
            "uuid",
            "at",
            "kind",
            "organization",
            "actor",
            "action",
            "target",
            "status",
            "detail",
            "address",
            "request_id",
            "position",
            "hash",
        ]


class AuditFilter(FilterSet):
    ordered_by = {"at": "at", "position": "position"}
    searched = ("actor", "action", "target")
    span = "at"
    kind = ChoiceFilter(choices=AuditEntry.Kind.choices)
    actor = CharFilter(label="The whole name of who did it.")


class AuditViewSet(ReadViewSet[AuditEntry]):
    """Who did what, the newest first: admins see their organization's entries, superusers all."""

    resource = "audit-log"
    queryset = AuditEntry.objects.all()
    serializer_class = AuditSerializer
    filterset_class = AuditFilter
