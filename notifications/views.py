"""The REST API of notifications: requests in, what was told and how far it has come out."""

from __future__ import annotations

from devices.filters import CharFilter, FilterSet, IsoDateTimeFilter, by_uuid
from devices.viewsets import ReadViewSet
from notifications.models import Notification
from notifications.serializers import NotificationSerializer


class NotificationFilter(FilterSet):
    organization = by_uuid("organization")
    device = by_uuid("device")
    event = CharFilter()
    # When it was written, not when it happened: a client that was away asks for what it has not been told.
    since = IsoDateTimeFilter(field_name="created_at", lookup_expr="gte")


class NotificationViewSet(ReadViewSet[Notification]):
    """What was told to devices and people, newest first, with how far each protocol has come."""

    resource = "notifications"
    queryset = Notification.objects.select_related("organization", "device").prefetch_related("deliveries")
    serializer_class = NotificationSerializer
    filterset_class = NotificationFilter
