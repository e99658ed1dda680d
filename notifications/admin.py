"""The admin's pages of notifications: what was sent, how far each protocol has come, and sending it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib import admin, messages
from django.db.models import Exists, OuterRef, QuerySet
from django.http import HttpRequest

from devices.permissions import access_of
from devices.scoped_admin import OrganizationListFilter, RecordAdmin, TabularInline
from notifications import outbox
from notifications.messages import EVENTS, Protocol
from notifications.models import Delivery, Notification

State = Delivery.State


class DeliveryInline(TabularInline):
    model = Delivery
    can_delete = False
    fields = readonly_fields = ("protocol", "state", "attempts", "last_error", "updated_at")

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return True  # who may see the notification may see what became of it


class DeliveryFilter(admin.SimpleListFilter):
    """Dead letters and what else did not arrive, over any protocol or over one."""

    title = parameter_name = "delivery"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        troubled = (State.FAILED, State.EXPIRED, State.PENDING)
        over_any = [(state.value, state.value) for state in troubled]
        return over_any + [
            (f"{state}.{protocol}", f"{state} over {protocol}") for state in troubled for protocol in Protocol
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Notification]) -> QuerySet[Notification]:
        if not self.value():
            return queryset
        state, _, protocol = str(self.value()).partition(".")
        wanted = {"state": state} | ({"protocol": protocol} if protocol else {})
        return queryset.filter(Exists(Delivery.objects.filter(notification=OuterRef("pk"), **wanted)))


class UnpublishedFilter(admin.SimpleListFilter):
    """What waits in the outbox, as while Redis is away."""

    title = parameter_name = "published"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("yes", "yes"), ("no", "not yet")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Notification]) -> QuerySet[Notification]:
        if self.value() not in {"yes", "no"}:
            return queryset
        return queryset.filter(unpublished__isnull=self.value() == "yes")


class EventFilter(admin.SimpleListFilter):
    """Known beforehand: asking the table which events occur in it would read all of it."""

    title = parameter_name = "event"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(event, event) for event in EVENTS]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Notification]) -> QuerySet[Notification]:
        return queryset.filter(event=self.value()) if self.value() else queryset


def _column(protocol: Protocol) -> Callable[[Notification], str]:
    @admin.display(description=protocol.value)
    def state_of(row: Notification) -> str:
        found = next((delivery for delivery in row.deliveries.all() if delivery.protocol == protocol), None)
        return str(State(found.state).value) if found else "-"

    return state_of


@admin.register(Notification)
class NotificationAdmin(RecordAdmin):
    resource = "notifications"
    uuid_paths = ("uuid", "device__uuid")
    list_display = ("created_at", "event", "device", "organization", "priority", *map(_column, Protocol), "uuid")
    list_filter = (
        DeliveryFilter,
        EventFilter,
        "priority",
        UnpublishedFilter,
        OrganizationListFilter,
    )
    list_select_related = ("device", "organization")
    search_fields = ("event", "device__name")
    inlines = (DeliveryInline,)
    actions = ("resend",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows, access = super().get_queryset(request).prefetch_related("deliveries"), access_of(request)
        return rows if access.superuser else rows & Notification.objects.meant_for(access.roles)

    def has_resend_permission(self, request: HttpRequest) -> bool:
        return access_of(request).may_somewhere("change", self.resource)

    @admin.action(description="Send selected again", permissions=["resend"])
    def resend(self, request: HttpRequest, queryset: QuerySet[Notification]) -> None:
        rows = self.changeable(request, queryset)
        selected = list(rows.select_related("device", "organization").order_by("pk")[: outbox.RESEND_MAXIMUM + 1])
        if len(selected) > outbox.RESEND_MAXIMUM:
            messages.error(request, f"Select at most {outbox.RESEND_MAXIMUM}; nothing was sent.")
            return
        messages.success(request, f"{outbox.send_again(selected)} sent again.")
