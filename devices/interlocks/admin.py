"""The admin's pages of interlocks, what they require, and what they vetoed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.db.models import ManyToManyField, QuerySet
from django.http import HttpRequest
from django.utils import timezone

from devices.interlocks.api import exclusion_problem
from devices.interlocks.words import describe
from devices.models import DeviceState, Interlock, Requirement, Veto
from devices.permissions import access_of
from devices.scoped_admin import (
    DisposableRecordAdmin,
    FixedParentForm,
    OrganizationListFilter,
    ScopedAdmin,
    ScopedStackedInline,
)


class InterlockForm(FixedParentForm):
    class Meta:
        model = Interlock
        exclude = ()

    def clean_excludes(self) -> Any:
        others = self.cleaned_data["excludes"]
        state = self.instance.state if self.instance.pk else self.cleaned_data.get("state")
        problems = [problem for other in others if (problem := exclusion_problem(state, other))]
        if problems:
            raise forms.ValidationError([f"{problem[0].upper()}{problem[1:]}." for problem in problems])
        return others


class RequirementInline(ScopedStackedInline):
    model = Requirement
    resource = "interlocks"
    parent_path = "state__device__organization"
    extra = 0
    autocomplete_fields = ("variable",)
    fields = ("variable", ("minimum", "maximum", "equals"), ("fresh_seconds", "holds_while_on"))


@admin.register(Interlock)
class InterlockAdmin(ScopedAdmin):
    """What a state must never do, whoever asks. The last gate, after all rules and people."""

    resource = "interlocks"
    organization_path = "state__device__organization"
    uuid_paths = ("uuid", "state__uuid", "state__device__uuid")
    fixed = ("state",)
    form = InterlockForm
    readonly_fields = ("uuid",)
    list_display = ("state", "limits", "alarm_on_veto", "vetoes")
    list_filter = (OrganizationListFilter,)
    list_select_related = ("state__device",)
    search_fields = ("state__name", "state__device__name")
    search_help_text = "A part of the name of the state or device, or a whole uuid"
    autocomplete_fields = ("state", "excludes")
    inlines = (RequirementInline,)
    fieldsets = (
        (None, {"fields": ("state", "alarm_on_veto", "uuid")}),
        (
            "How long at a time",
            {
                "description": "A state is on while its value is another than its safe value.",
                "fields": (("minimum_on_seconds", "maximum_on_seconds"), "minimum_off_seconds"),
            },
        ),
        (
            "How often and how much",
            {
                "description": "In any 60 minutes and any 24 hours, not by the clock.",
                "fields": (
                    ("maximum_runs_per_hour", "maximum_runs_per_day"),
                    ("maximum_on_seconds_per_hour", "maximum_on_seconds_per_day"),
                    ("maximum_amount_per_hour", "maximum_amount_per_day"),
                ),
            },
        ),
        ("When", {"fields": (("allowed_from", "allowed_until"), "timezone")}),
        ("Not together with", {"fields": ("excludes",)}),
    )

    def formfield_for_manytomany(self, db_field: ManyToManyField[Any, Any], request: HttpRequest, **kwargs: Any) -> Any:
        kwargs["queryset"] = access_of(request).limit(
            DeviceState.objects.select_related("device"), "device__organization", resource=self.resource, verb="change"
        )
        return super().formfield_for_manytomany(db_field, request, **kwargs)

    @admin.display(description="limits")
    def limits(self, row: Interlock) -> str:
        return describe(row) or "none"

    @admin.display(description="vetoes")
    def vetoes(self, row: Interlock) -> int:
        return sum(row.state.vetoes.filter(overridden_reason="").values_list("count", flat=True))


@admin.register(Veto)
class VetoAdmin(DisposableRecordAdmin):
    """What interlocks did not let happen, counted by kind and who asked, and what people overrode with a reason."""

    resource = "vetoes"
    organization_path = "state__device__organization"
    uuid_paths = ("uuid", "state__uuid", "state__device__uuid")
    list_display = ("last_at", "state", "detail", "actor", "count", "overridden_reason")
    list_filter = ("kind", "source", ("overridden_reason", admin.EmptyFieldListFilter), OrganizationListFilter)
    list_select_related = ("state__device",)
    search_fields = ("state__name", "state__device__name", "actor")
    search_help_text = "A part of the name of the state, device or who asked, or a whole uuid"
    fields = (
        "state", "kind", "source", "actor", "value", "detail", "count", "overridden_reason", "first_at", "last_at", "uuid",
    )  # fmt: skip


def lock_for(**time: float) -> Any:
    """An admin action that holds states as they are for so long."""

    def lock(self: Any, request: HttpRequest, queryset: QuerySet[DeviceState]) -> None:
        until = timezone.now() + timedelta(**time)
        rows = list(self.changeable(request, queryset))
        for state in rows:
            state.lock(until, by=request.user.get_username(), reason="locked in the admin")
        messages.success(request, f"{len(rows)} locked until {until:%Y-%m-%d %H:%M} UTC.")

    return lock


def unlock(self: Any, request: HttpRequest, queryset: QuerySet[DeviceState]) -> None:
    rows = list(self.changeable(request, queryset))
    for state in rows:
        state.unlock()
    messages.success(request, f"{len(rows)} unlocked.")
