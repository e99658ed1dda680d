"""The admin's page of notifications and how far each has come."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from devices.scoped_admin import OrganizationListFilter, RecordAdmin, TabularInline
from notifications.models import Delivery, Notification


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


@admin.register(Notification)
class NotificationAdmin(RecordAdmin):
    resource = "notifications"
    uuid_paths = ("uuid", "device__uuid")
    list_display = ("created_at", "event", "device", "organization", "priority", "published_at", "uuid")
    list_filter = (("published_at", admin.EmptyFieldListFilter), OrganizationListFilter)
    list_select_related = ("device", "organization")
    search_fields = ("event", "device__name")
    inlines = (DeliveryInline,)
