"""The admin's pages of organizations, members, sensors, devices, tokens and readings."""

from __future__ import annotations

from typing import Any, ClassVar

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import JSONField, QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.timesince import timesince

from devices import catalogue
from devices.areas import admin as _areas  # noqa: F401  has a page of its own
from devices.audit import admin as _audit_log  # noqa: F401  has a page of its own
from devices.interlocks.admin import lock_for, unlock
from devices.models import (
    DataProblem,
    Device,
    DeviceState,
    DeviceToken,
    Invitation,
    Membership,
    Organization,
    Reading,
    Role,
    Sensor,
    SensorClock,
    StateChange,
    Variable,
)
from devices.people.links import page_of
from devices.permissions import access_of
from devices.scoped_admin import (
    DisposableRecordAdmin,
    FixedParentForm,
    OrganizationListFilter,
    RecordAdmin,
    ScopedAdmin,
    ScopedTabularInline,
)


@admin.register(Organization)
class OrganizationAdmin(ScopedAdmin):
    resource = "organizations"
    organization_path = "pk"
    fixed = ()
    list_display = ("name", "uuid", "created_at")


@admin.register(Membership)
class MembershipAdmin(ScopedAdmin):
    resource = "memberships"
    uuid_paths = ("organization__uuid",)
    fixed = ("organization", "user")
    readonly_fields = ()
    list_display = ("user", "organization", "role", "area")
    list_filter = ("role", OrganizationListFilter)
    list_select_related = ("user", "organization", "area")
    search_fields = ("user__username", "organization__name")
    search_help_text = "A part of the user's or organization's name"
    autocomplete_fields = ("organization", "area")
    raw_id_fields = ("user",)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A farm keeps an admin; whoever deletes whole farms may delete that one too."""
        is_kept = isinstance(obj, Membership) and obj.is_last_admin and not access_of(request).superuser
        return super().has_delete_permission(request, obj) and not is_kept


class VariableInline(ScopedTabularInline):
    model = Variable
    resource = "variables"
    extra = 1
    fields = ("name", "datatype", "unit", "uuid")
    readonly_fields = ("uuid",)
    show_change_link = True


@admin.register(Invitation)
class InvitationAdmin(ScopedAdmin):
    """The link of an invitation is shown once, after it is made. Delete an invitation to withdraw it."""

    resource = "invitations"
    fixed = ("organization", "role", "area", "note", "expires_at")
    readonly_fields = ("uuid", "created_by", "created_at", "accepted_at", "accepted_by")
    list_display = ("note", "role", "area", "organization", "created_by", "created_at", "expires_at", "accepted_by")
    list_filter = (("accepted_at", admin.EmptyFieldListFilter), "role", OrganizationListFilter)
    list_select_related = ("organization", "area")
    search_fields = ("note", "accepted_by")
    search_help_text = "A part of the note, or of the name of who accepted"
    autocomplete_fields = ("organization", "area")

    def formfield_for_dbfield(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        if db_field.name == "role":
            return forms.ChoiceField(choices=Role.choices, initial=Role.VIEWER, help_text=db_field.help_text)
        return super().formfield_for_dbfield(db_field, request, **kwargs)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        given = self.fixed
        return given if obj is None else (*given, *self.readonly_fields)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        values = {name: form.cleaned_data[name] for name in self.fixed}
        issued, token = Invitation.objects.issue(**values, created_by=request.user.get_username())
        obj.__dict__.update(issued.__dict__)
        text = "Send this link to the person, who can use it once. It is shown now and never again: <code>{}</code>"
        messages.success(request, format_html(text, page_of(request, token)))


@admin.register(Sensor)
class SensorAdmin(ScopedAdmin):
    resource = "sensors"
    list_display = ("name", "organization", "area", "clock_is", "data_problems", "uuid", "created_at")
    readonly_fields = ("uuid", "clock_is", "data_problems", "created_at")
    list_filter = (OrganizationListFilter,)
    list_select_related = ("organization", "area", "measured_clock")
    autocomplete_fields = ("organization", "area")
    inlines = (VariableInline,)

    @admin.display(description="its clock is", empty_value="not known yet")
    def clock_is(self, row: Sensor) -> str | None:
        clock = getattr(row, "measured_clock", None)
        return describe_clock(clock) if clock else None

    @admin.display(description="data problems")
    def data_problems(self, row: Sensor) -> str:
        url = reverse("admin:devices_dataproblem_changelist")
        return format_html('<a href="{}?q={}">show</a>', url, row.uuid)


def describe_clock(clock: SensorClock) -> str:
    """In words: "90 s slow, 12 late events"."""
    counts = [f"{number} {what}" for number, what in ((clock.late, "late"), (clock.ahead, "ahead")) if number]
    if clock.offset_ms is None:
        return ", ".join(counts) or "no event says when it happened"
    seconds = abs(clock.offset_ms) / 1_000
    how = "right" if seconds < 1 else f"{seconds:,.0f} s {'slow' if clock.offset_ms > 0 else 'fast'}"
    return ", ".join([how, *counts])


@admin.register(Variable)
class VariableAdmin(ScopedAdmin):
    resource = "variables"
    organization_path = "sensor__organization"
    uuid_paths = ("uuid", "sensor__uuid")
    fixed = ("sensor",)
    list_display = ("name", "sensor", "datatype", "unit", "uuid", "readings")
    list_filter = ("datatype", OrganizationListFilter)
    list_select_related = ("sensor__organization",)
    search_fields = ("name", "sensor__name")
    autocomplete_fields = ("sensor",)
    fieldsets = (
        (None, {"fields": ("sensor", "name", "datatype", "unit", "uuid", "created_at")}),
        (
            "What is believed",
            {
                "description": "A reading outside these limits is suspect: it is kept and shown, and rules go on with the last "
                "good one.",
                "fields": (
                    ("minimum", "maximum"),
                    ("target_minimum", "target_maximum"),
                    ("maximum_step", "maximum_step_seconds"),
                    "stuck_after_seconds",
                    "maximum_age_seconds",
                ),
            },
        ),
        (
            "How long it is kept",
            {
                "description": "Where it differs from what the organization says.",
                "fields": (("keep_readings_days", "keep_hours_days"),),
            },
        ),
    )

    def readings(self, row: Variable) -> str:
        url = reverse("admin:devices_reading_changelist")
        return format_html('<a href="{}?variable__id__exact={}">readings</a>', url, row.pk)


@admin.display(description="differs for", empty_value="-")
def differs_for(row: DeviceState) -> str | None:
    """How long the device has said something else than it should."""
    return timesince(row.differs_since) if row.differs_since else None


STATE_VALUES: tuple[Any, ...] = ("value", "changed_at", "reported_value", "reported_at", differs_for)


class DeviceStateInline(ScopedTabularInline):
    model = DeviceState
    resource = "device-states"
    extra = 1
    fields = ("name", "kind", "datatype", "allowed_values", "safe_value", *STATE_VALUES, "uuid")
    readonly_fields = (*STATE_VALUES, "uuid")
    show_change_link = True
    formfield_overrides: ClassVar[dict[Any, Any]] = {JSONField: {"widget": forms.Textarea(attrs={"rows": 2})}}


@admin.register(Device)
class DeviceAdmin(ScopedAdmin):
    resource = "devices"
    readonly_fields = ("uuid", "connected", "connection_changed_at", "last_seen_at", "created_at")
    list_display = ("name", "organization", "area", "connected", "connection_changed_at", "last_seen_at", "uuid")
    list_filter = ("connected", OrganizationListFilter)
    list_select_related = ("organization", "area")
    autocomplete_fields = ("organization",)
    inlines = (DeviceStateInline,)


@admin.register(DeviceState)
class DeviceStateAdmin(ScopedAdmin):
    resource = "device-states"
    organization_path = "device__organization"
    area_path = "device__area"
    uuid_paths = ("uuid", "device__uuid")
    fixed = ("device",)
    readonly_fields = ("uuid", "created_at", *STATE_VALUES, "locked", "interlocked")
    list_display = ("name", "device", "kind", *STATE_VALUES, "locked", "interlocked", "uuid")
    list_filter = ("kind", "datatype", ("differs_since", admin.EmptyFieldListFilter), OrganizationListFilter)
    list_select_related = ("device__organization", "interlock")
    search_fields = ("name", "device__name")
    autocomplete_fields = ("device",)
    actions = ("lock_for_an_hour", "lock_for_a_day", "unlock")
    lock_for_an_hour = admin.action(description="Lock selected for an hour", permissions=["change"])(lock_for(hours=1))
    lock_for_a_day = admin.action(description="Lock selected for a day", permissions=["change"])(lock_for(days=1))
    unlock = admin.action(description="Unlock selected", permissions=["change"])(unlock)

    @admin.display(description="locked", empty_value="-")
    def locked(self, row: DeviceState) -> str | None:
        if row.locked_until is None or row.locked_until <= timezone.now():
            return None
        return f"by {row.locked_by} until {row.locked_until:%Y-%m-%d %H:%M} UTC"

    @admin.display(description="interlock")
    def interlocked(self, row: DeviceState) -> str:
        interlock = getattr(row, "interlock", None)
        if row._state.adding:
            return "save the state first"
        if interlock is None:
            return format_html('<a href="{}?state={}">add</a>', reverse("admin:devices_interlock_add"), row.pk)
        return format_html(
            '<a href="{}">{}</a>',
            reverse("admin:devices_interlock_change", args=[interlock.pk]),
            "show",
        )


class DeviceTokenForm(FixedParentForm):
    class Meta:
        model = DeviceToken
        fields = ("sensor", "device", "name", "highest_priority", "expires_at")

    highest_priority = forms.IntegerField(
        min_value=1, max_value=10, initial=5, help_text=DeviceToken._meta.get_field("highest_priority").help_text
    )

    def clean_expires_at(self) -> Any:
        moment = self.cleaned_data["expires_at"]
        if moment is not None and moment != self.instance.expires_at and moment <= timezone.now():
            raise ValidationError("Must be in the future.")
        return moment

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        owner = self.cleaned_data.get("sensor") or self.cleaned_data.get("device")
        if owner is not None:
            self.instance.organization_id = owner.organization_id
        return cleaned


@admin.register(DeviceToken)
class DeviceTokenAdmin(ScopedAdmin):
    """A token is shown once, after it is issued. It is revoked, not deleted, so that what it did can still be explained."""

    resource = "device-tokens"
    form = DeviceTokenForm
    uuid_paths = ("uuid", "sensor__uuid", "device__uuid")
    fixed = ("organization", "sensor", "device")
    readonly_fields = ("uuid", "prefix", "created_at", "revoked_at")
    list_display = ("prefix", "owner", "name", "organization", "highest_priority", "expires_at", "revoked_at")
    list_filter = (("revoked_at", admin.EmptyFieldListFilter), OrganizationListFilter)
    list_select_related = ("sensor", "device", "organization")
    search_fields = ("prefix", "name", "sensor__name", "device__name")
    autocomplete_fields = ("sensor", "device")
    actions = ("revoke",)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        editable = ("sensor", "device", "name", "highest_priority", "expires_at")
        return editable if obj is None else ("organization", *editable, *self.readonly_fields)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if change:
            super().save_model(request, obj, form, change)
            return
        values = {name: form.cleaned_data[name] for name in ("name", "highest_priority", "expires_at")}
        issued, token = DeviceToken.objects.issue(obj.owner, **values)
        obj.__dict__.update(issued.__dict__)
        messages.success(request, format_html("The token, shown this once: <code>{}</code>", token))

    @admin.action(description="Revoke selected tokens", permissions=["change"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[DeviceToken]) -> None:
        allowed = self.changeable(request, queryset)
        count = DeviceToken.objects.filter(pk__in=list(allowed.values_list("pk", flat=True))).revoke()
        messages.success(request, f"Revoked: {count}. Devices that use them are refused within a second or two.")


@admin.register(Reading)
class ReadingAdmin(RecordAdmin):
    """The newest readings to arrive; of one variable, from its page, the newest by their own time."""

    resource = "readings"
    organization_path = "variable__sensor__organization"
    uuid_paths = ("variable__uuid", "variable__sensor__uuid")
    list_display = ("variable", "timestamp", "value", "suspect")
    list_filter = (OrganizationListFilter,)
    list_select_related = ("variable__sensor",)
    fields = ("variable", "timestamp", "received_at", "value", "suspect")
    search_fields = ("=variable__name",)
    search_help_text = "The whole name of a variable, or the uuid of a variable or sensor"

    def get_ordering(self, request: HttpRequest) -> tuple[str, ...]:
        # Each order has its index; by time over all variables would sort the whole table.
        return ("-timestamp",) if "variable__id__exact" in request.GET else ("-id",)

    def value(self, row: Reading) -> str:
        return str(row.value)


@admin.register(DataProblem)
class DataProblemAdmin(DisposableRecordAdmin):
    """What cannot be used or is not believed, counted by kind. Whoever has mended the cause deletes the row."""

    resource = "data-problems"
    uuid_paths = ("uuid", "originator_uuid")
    list_display = ("last_seen_at", "originator", "name", "kind", "count")
    list_filter = ("kind", "source_type", OrganizationListFilter)
    list_select_related = ("organization",)
    fields = (
        "organization", "source_type", "originator", "originator_uuid", "name", "kind", "count", "detail", "payload",
        "first_seen_at", "last_seen_at",
    )  # fmt: skip
    readonly_fields = ("originator",)
    search_fields = ("=name",)
    search_help_text = "The name of a variable, or the uuid of a sensor or device"

    @admin.display(description="sensor or device")
    def originator(self, row: DataProblem) -> str:
        key = (row.source_type, str(row.originator_uuid))
        known = catalogue.shared().originators([key]).get(key)
        return known.name if known else f"{row.source_type} {row.originator_uuid}, which was deleted"


@admin.register(StateChange)
class StateChangeAdmin(RecordAdmin):
    resource = "state-changes"
    organization_path = "state__device__organization"
    uuid_paths = ("uuid", "state__uuid", "state__device__uuid")
    list_display = ("timestamp", "state", "previous", "value", "source", "actor", "command_state", "settled_at")
    list_filter = ("source", "command_state", OrganizationListFilter)
    list_select_related = ("state__device",)
    search_fields = ("state__name", "state__device__name", "actor")
