"""Areas in the admin."""

from __future__ import annotations

from django.contrib import admin

from devices.areas.models import Area
from devices.scoped_admin import OrganizationListFilter, ScopedAdmin


@admin.register(Area)
class AreaAdmin(ScopedAdmin):
    resource = "areas"
    list_display = ("name", "parent", "organization", "uuid")
    list_filter = (OrganizationListFilter,)
    list_select_related = ("organization", "parent")
    autocomplete_fields = ("organization", "parent")
