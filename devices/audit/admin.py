"""The audit log in the admin: to look at."""

from __future__ import annotations

from django.contrib import admin

from devices.audit.models import AuditEntry
from devices.scoped_admin import OrganizationListFilter, RecordAdmin


@admin.register(AuditEntry)
class AuditEntryAdmin(RecordAdmin):
    """Who did what. Admins see their organization's entries, superusers all."""

    resource = "audit-log"
    organization_path = "organization"
    list_display = ("at", "actor", "action", "target", "status", "kind", "position")
    list_filter = ("kind", OrganizationListFilter)
    search_fields = ("actor", "action", "target")
    search_help_text = "A part of who, what or where"
    fields = (
        "at", "kind", "actor", "action", "target", "status", "detail", "address", "request_id", "organization_uuid", "position",
        "hash", "uuid",
    )  # fmt: skip
