"""The REST API of notifications: what was sent and how far it has come; and sending by hand."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from django.contrib.auth.models import AbstractBaseUser
from django.db.models import Exists, OuterRef, QuerySet
from drf_spectacular.utils import extend_schema
from rest_framework import status
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from devices.filters import CharFilter, ChoiceFilter, FilterSet, by_uuid
from devices.viewsets import ReadViewSet
from notifications import outbox
from notifications.announcements import Announcement, announce
from notifications.models import PROTOCOL_CHOICES, Delivery, Notification
from notifications.serializers import NewNotificationSerializer, NotificationSerializer


class NotificationFilter(FilterSet):
    """`state` and `protocol` together ask for one delivery that is both, such as failed over mqtt."""

    ordered_by = {"published_at": "publishedAt", "timestamp": "timestamp", "priority": "priority"}
    searched = ("event",)
    # When it was published, not when it happened: a client that was disconnected asks for what it has not received.
    span = "published_at"
    organization = by_uuid("organization")
    device = by_uuid("device")
    event = CharFilter()
    kind = CharFilter(field_name="event")
    state = ChoiceFilter(choices=Delivery.State.choices, method="leave")
    protocol = ChoiceFilter(choices=PROTOCOL_CHOICES, method="leave")

    def leave(self, rows: QuerySet[Notification], _name: str, _value: str) -> QuerySet[Notification]:
        """`filter_queryset` looks at both at once."""
        return rows

    def filter_queryset(self, queryset: QuerySet[Notification]) -> QuerySet[Notification]:
        rows: QuerySet[Notification] = super().filter_queryset(queryset)
        wanted = {name: self.form.cleaned_data[name] for name in ("state", "protocol") if self.form.cleaned_data[name]}
        return rows.filter(Exists(Delivery.objects.filter(notification=OuterRef("pk"), **wanted))) if wanted else rows


class NotificationViewSet(ReadViewSet[Notification]):
    """Notifications to devices and people, newest first, with how far each protocol has come."""

    resource = "notifications"
    queryset = Notification.objects.select_related("organization", "device", "unpublished").prefetch_related(
        "deliveries"
    )
    serializer_class = NotificationSerializer
    filterset_class = NotificationFilter
    verbs: ClassVar = {"create": "add", "resend": "change"}

    def get_queryset(self) -> QuerySet[Notification]:
        """What is for certain roles is shown to nobody else, as over Socket.IO."""
        rows = super().get_queryset()
        return rows if self.access.superuser else rows & Notification.objects.meant_for(self.access.roles)

    @extend_schema(request=NewNotificationSerializer, responses={201: NotificationSerializer})
    def create(self, request: Request, **_: Any) -> Response:
        """Tells an organization, or those who watch one of its devices, something by hand."""
        serializer = NewNotificationSerializer(data=request.data, context=self.get_serializer_context())
        serializer.is_valid(raise_exception=True)
        wish = serializer.validated_data
        self.access.demand("add", self.resource, wish["organization"].pk)
        row = announce(Announcement(**wish, actor=cast(AbstractBaseUser, request.user).get_username()))
        shown = self.get_serializer(self.get_queryset().get(pk=row.pk))
        return Response(shown.data, status=status.HTTP_201_CREATED)

    @extend_schema(request=None)
    @action(detail=True, methods=["post"])
    def resend(self, request: Request, **_: Any) -> Response:
        """Tells it again, now, on every protocol it was for; a device is not sent back to a state that was changed since."""
        row = self.get_object()
        outbox.send_again([row])
        return Response(self.get_serializer(self.get_queryset().get(pk=row.pk)).data)
