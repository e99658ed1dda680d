"""The admin's pages of rejected events, dead letters and replays: to look, to decide, and to follow a replay."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import IntegerField, QuerySet, Value
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404
from django.urls import path, reverse
from django.utils.html import format_html
from django.views.decorators.http import require_POST

from devices.scoped_admin import OrganizationListFilter, RecordAdmin, ScopedAdmin
from rules.admin.decidable import (
    DecidableAdmin,
    LaneFilter,
    PriorityFilter,
    ProtocolFilter,
    ReasonFilter,
    SpanFilter,
    StatusFilter,
)
from rules.admission import replay
from rules.models import DeadLetter, RejectedEvent, Replay


@admin.register(RejectedEvent)
class RejectedEventAdmin(DecidableAdmin):
    resource = "rejected-events"
    kind = Replay.Kind.REJECTED
    text_path = "detail"
    source_paths = ("source_type", "originator_uuid", "organization", Value(None, output_field=IntegerField()))
    uuid_paths = ("uuid", "event_id", "originator_uuid")
    search_fields = ("detail",)
    list_display = (
        "received_at",
        "reason",
        "priority",
        "lane",
        "protocol",
        "organization",
        "originator_uuid",
        "status",
    )
    list_filter = (
        StatusFilter,
        ReasonFilter,
        SpanFilter,
        PriorityFilter,
        LaneFilter,
        ProtocolFilter,
        OrganizationListFilter,
    )
    exported = (
        "uuid",
        "received_at",
        "reason",
        "detail",
        "organization__name",
        "protocol",
        "source_type",
        "originator_uuid",
        "event_id",
        "type",
        "priority",
        "lane",
        "timestamp",
        "queue_depth",
        "threshold",
        "circuit_state",
        "status",
        "decided_at",
        "decided_by",
        "payload",
    )
    fieldsets = (
        (None, {"fields": ("received_at", "reason", "detail", ("queue_depth", "threshold", "circuit_state"))}),
        ("Event", {"fields": ("event_id", "type", ("priority", "lane"), "timestamp", "pretty_payload")}),
        ("Sender", {"fields": ("organization", "protocol", "source_type", "originator_uuid")}),
        ("Decision", {"fields": ("status", "decided_at", "decided_by", "uuid")}),
    )
    readonly_fields: ClassVar[tuple[str, ...]] = ("pretty_payload",)

    @admin.display(description="payload")
    def pretty_payload(self, row: RejectedEvent) -> str:
        return _pretty(row.payload)


@admin.register(DeadLetter)
class DeadLetterAdmin(DecidableAdmin):
    resource = "dead-letters"
    kind = Replay.Kind.DEAD
    text_path = "error"
    source_paths = ("event__source_type", "originator_uuid", "organization", "chain")
    uuid_paths = ("uuid", "event_id", "originator_uuid", "chain__uuid")
    search_fields = ("error",)
    list_display = ("created_at", "event_id", "organization", "lane", "chain", "node", "error", "attempts", "status")
    list_filter = (StatusFilter, SpanFilter, LaneFilter, OrganizationListFilter)
    list_select_related: ClassVar[tuple[str, ...]] = ("organization", "chain")
    exported = (
        "uuid",
        "created_at",
        "error",
        "chain__name",
        "node",
        "attempts",
        "organization__name",
        "lane",
        "originator_uuid",
        "event_id",
        "status",
        "decided_at",
        "decided_by",
        "event",
    )
    fieldsets = (
        (None, {"fields": ("created_at", "error", ("chain", "node", "attempts"), "shown_traceback")}),
        ("Event", {"fields": ("event_id", "lane", "organization", "originator_uuid", "pretty_event")}),
        ("Decision", {"fields": ("status", "decided_at", "decided_by", "uuid")}),
    )
    readonly_fields: ClassVar[tuple[str, ...]] = ("pretty_event", "shown_traceback")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).defer("traceback")

    @admin.display(description="event")
    def pretty_event(self, row: DeadLetter) -> str:
        return _pretty(json.dumps(row.event))

    @admin.display(description="traceback")
    def shown_traceback(self, row: DeadLetter) -> str:
        return format_html("<pre>{}</pre>", row.traceback or "none")


@admin.register(Replay)
class ReplayAdmin(RecordAdmin):
    """A running replay's page shows itself again every two seconds."""

    resource = "replays"
    change_form_template = "admin/rules/replay_progress.html"
    show_facets = admin.ShowFacets.NEVER
    list_display = ("created_at", "kind", "organization", "state", "progress", "rate", "created_by", "note")
    list_filter = ("state", OrganizationListFilter)
    list_select_related: ClassVar[tuple[str, ...]] = ("organization",)
    search_fields = ("created_by",)
    fields = (
        *("state", "progress", "note", "kind", "organization", "rate", "with_commands", "chosen"),
        *("created_at", "created_by", "ended_at", "uuid"),
    )
    readonly_fields: ClassVar[tuple[str, ...]] = ("progress", "chosen")

    def get_urls(self) -> list[Any]:
        view = self.admin_site.admin_view(require_POST(self.stop_view))
        return [path("<int:pk>/stop/", view, name="rules_replay_stop"), *super().get_urls()]

    def stop_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        row = get_object_or_404(self.get_queryset(request), pk=pk)
        if not ScopedAdmin.has_change_permission(self, request, row):
            raise PermissionDenied
        if replay.stop(row, actor=request.user.get_username()):
            messages.success(request, "The replay was stopped; what was sent stays sent.")
        return HttpResponseRedirect(reverse("admin:rules_replay_change", args=[pk]))

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> HttpResponse:
        row = kwargs.get("obj")
        may = row is not None and row.state == Replay.State.RUNNING
        context["may_stop"] = may and ScopedAdmin.has_change_permission(self, request, row)
        context["stop_url"] = reverse("admin:rules_replay_stop", args=[row.pk]) if row else ""
        return super().render_change_form(request, context, *args, **kwargs)

    @admin.display(description="progress")
    def progress(self, row: Replay) -> str:
        done = row.replayed + row.failed
        bar = '<progress max="{}" value="{}"></progress> {} replayed, {} could not be, of {}'
        return format_html(bar, max(row.total, done, 1), done, row.replayed, row.failed, max(row.total, done))

    @admin.display(description="chosen by")
    def chosen(self, row: Replay) -> str:
        return ", ".join(f"{name} {value}" for name, value in row.criteria.items())[:1_000]


def _pretty(text: str) -> str:
    try:
        shown = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        shown = text
    return format_html("<pre>{}</pre>", shown)
