"""The admin's pages of alarms, to look at, acknowledge and clear, and of actions that rest, to look at."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest

from devices.permissions import access_of
from devices.scoped_admin import OrganizationListFilter, RecordAdmin, ScopedAdmin
from rules.effects import alarms
from rules.models import ActionCooldown, Alarm


@admin.register(Alarm)
class AlarmAdmin(RecordAdmin):
    resource = "alarms"
    uuid_paths = ("uuid", "originator_uuid", "chain__uuid")
    search_fields = ("type", "message")
    search_help_text = "A part of the type or the message, or a whole uuid (alarm, sensor, device, chain)"
    show_facets = admin.ShowFacets.NEVER  # they count the table once for each choice
    list_display = (
        *("raised_at", "type", "severity", "condition", "originator", "organization", "message"),
        *("times_raised", "acknowledged_by"),
    )
    list_filter = ("state", "severity", "is_flapping", "raised_at", OrganizationListFilter)
    list_select_related = ("organization",)
    fields = (
        *("type", ("severity", "condition"), "message", "originator", "organization", ("chain", "node")),
        *(("raised_at", "last_raised_at", "times_raised"), ("acknowledged_at", "acknowledged_by")),
        *(("cleared_at", "cleared_by"), "uuid"),
    )
    readonly_fields: ClassVar[tuple[str, ...]] = ("condition", "originator")
    area_path = "area"
    actions = ("acknowledge_selected", "clear_selected")

    def has_decide_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """The right to change alarms, although nobody edits them."""
        return ScopedAdmin.has_change_permission(self, request, obj)

    @admin.action(description="Acknowledge selected: somebody knows", permissions=["decide"])
    def acknowledge_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        number = alarms.acknowledge(self._mine(request, queryset), by=request.user.get_username())
        messages.success(request, f"{number} acknowledged.")

    @admin.action(description="Clear selected: they are over", permissions=["decide"])
    def clear_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        number = alarms.clear(self._mine(request, queryset), by=request.user.get_username())
        messages.success(request, f"{number} cleared.")

    def _mine(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Alarm]:
        rows = alarms.changeable(queryset, access_of(request))
        return Alarm.objects.filter(pk__in=rows.order_by().values("pk"))

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        found = super().get_changelist_instance(request)
        alarms.name_originators(found.result_list)
        return found

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Alarm | None:
        row: Alarm | None = super().get_object(request, object_id, from_field)
        alarms.name_originators([row] if row else [])
        return row

    @admin.display(description="state", ordering="state")
    def condition(self, row: Alarm) -> str:
        return f"{row.state}, flapping" if row.is_flapping else row.state

    @admin.display(description="originator")
    def originator(self, row: Alarm) -> str:
        return f"{row.source_type} {row.originator_name or row.originator_uuid}"


@admin.register(ActionCooldown)
class ActionCooldownAdmin(RecordAdmin):
    resource = "rule-chains"
    organization_path = "chain__organization"
    uuid_paths = ("originator_uuid", "chain__uuid")
    search_fields = ("node", "chain__name")
    search_help_text = "A part of the chain's or the node's name, or a whole uuid (sensor, device, chain)"
    show_facets = admin.ShowFacets.NEVER
    list_display = ("chain", "node", "originator_uuid", "done_at", "suppressed")
    list_filter = (OrganizationListFilter,)
    list_select_related = ("chain",)
