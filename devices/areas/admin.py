"""Areas in the admin."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from devices.areas.models import Area, people_of
from devices.scoped_admin import OrganizationListFilter, ScopedAdmin


@admin.register(Area)
class AreaAdmin(ScopedAdmin):
    resource = "areas"
    list_display = ("name", "parent", "organization", "uuid")
    list_filter = (OrganizationListFilter,)
    list_select_related = ("organization", "parent")
    autocomplete_fields = ("organization", "parent")

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[Any], list[Any]]:
        names, counts, denied, _ = super().get_deleted_objects(objs, request)
        held = [f"{area}: {person} is limited to it, or to a part of it" for area in objs for person in people_of(area)]
        return names, counts, denied, held
