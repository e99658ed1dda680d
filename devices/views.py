"""The REST API of organizations, members, sensors, devices, tokens and readings."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db.models import Q, QuerySet
from django.shortcuts import get_object_or_404
from django.utils import timezone
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework.decorators import action
from rest_framework.exceptions import ValidationError
from rest_framework.mixins import DestroyModelMixin
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer

from aemos.lib.problems import Conflict
from devices.areas.api import StandsInFilter
from devices.filters import BooleanFilter, CharFilter, ChoiceFilter, FilterSet, UUIDFilter, by_uuid
from devices.history.api import HistoryMixin
from devices.interlocks.api import LockSerializer
from devices.models import (
    DataProblem,
    Device,
    DeviceState,
    DeviceToken,
    Membership,
    Organization,
    Reading,
    Role,
    Sensor,
    StateChange,
    Variable,
)
from devices.serializers import (
    DataProblemSerializer,
    DeviceSerializer,
    DeviceStateSerializer,
    DeviceTokenSerializer,
    IssuedTokenSerializer,
    MembershipSerializer,
    OrganizationSerializer,
    ReadingSerializer,
    SensorSerializer,
    StateChangeSerializer,
    VariableSerializer,
)
from devices.viewsets import EditViewSet, ListModelMixin, ReadViewSet, ScopedViewSet


class OrganizationViewSet(EditViewSet[Organization]):
    """Organizations that one belongs to. Superusers create and delete them."""

    resource = "organizations"
    organization_path = "pk"
    queryset = Organization.objects.all()
    serializer_class = OrganizationSerializer

    def perform_create(self, serializer: BaseSerializer[Any]) -> None:
        serializer.save()


class MembershipFilter(FilterSet):
    ordered_by = {"user__username": "user", "role": "role"}
    searched = ("user__username",)
    organization = by_uuid("organization")
    user = CharFilter(field_name="user__username")
    role = ChoiceFilter(choices=Role.choices)


class MembershipViewSet(EditViewSet[Membership]):
    """Who belongs to an organization, and as what. A membership is addressed by organization and user name."""

    resource = "memberships"
    queryset = Membership.objects.select_related("organization", "user", "area")
    serializer_class = MembershipSerializer
    filterset_class = MembershipFilter

    def get_object(self) -> Membership:
        rows = self.filter_queryset(self.get_queryset())
        found = get_object_or_404(rows, organization__uuid=self.kwargs["uuid"], user__username=self.kwargs["username"])
        self.check_object_permissions(self.request, found)
        return found

    def perform_destroy(self, instance: Membership) -> None:
        if instance.is_last_admin:
            raise Conflict("It is that of the only admin: make somebody else one first.")
        super().perform_destroy(instance)


class OrganizationFilter(StandsInFilter):
    """Of rows that have a name in an organization."""

    ordered_by = {"name": "name", "created_at": "createdAt"}
    searched = ("name",)
    organization = by_uuid("organization")
    name = CharFilter(lookup_expr="icontains")


class SensorViewSet(HistoryMixin, EditViewSet[Sensor]):
    """What measures."""

    resource = "sensors"
    queryset = Sensor.objects.select_related("organization", "measured_clock")
    serializer_class = SensorSerializer
    filterset_class = OrganizationFilter


class VariableFilter(FilterSet):
    ordered_by = {"name": "name", "created_at": "createdAt"}
    searched = ("name",)
    sensor = by_uuid("sensor")
    name = CharFilter()


class VariableViewSet(EditViewSet[Variable]):
    """The quantities that sensors measure; a sensor can only send what is listed here."""

    resource = "variables"
    organization_path = "sensor__organization"
    parent = "sensor"
    queryset = Variable.objects.select_related("sensor__organization")
    serializer_class = VariableSerializer
    filterset_class = VariableFilter


class DeviceFilter(OrganizationFilter):
    ordered_by = {"name": "name", "created_at": "createdAt", "last_seen_at": "lastSeenAt"}
    connected = BooleanFilter()


class DeviceViewSet(EditViewSet[Device]):
    """What acts."""

    resource = "devices"
    queryset = Device.objects.select_related("organization")
    serializer_class = DeviceSerializer
    filterset_class = DeviceFilter


class DeviceStateFilter(FilterSet):
    ordered_by = {"name": "name", "created_at": "createdAt", "changed_at": "changedAt"}
    searched = ("name",)
    device = by_uuid("device")
    name = CharFilter()
    differs = BooleanFilter(
        field_name="differs_since", lookup_expr="isnull", exclude=True, label="another value reported"
    )


class DeviceStateViewSet(EditViewSet[DeviceState]):
    """What can be switched on a device. Its value is set through /device-state-instances."""

    resource = "device-states"
    verbs: ClassVar = {"lock": "change", "unlock": "change"}
    organization_path = "device__organization"
    area_path = "device__area"
    parent = "device"
    queryset = DeviceState.objects.select_related("device__organization", "device__area")
    serializer_class = DeviceStateSerializer
    filterset_class = DeviceStateFilter

    @extend_schema(request=LockSerializer, responses=DeviceStateSerializer)
    @action(detail=True, methods=["post"])
    def lock(self, request: Request, uuid: str) -> Response:
        """Holds the state as it is: until then no rule, schedule or person changes it. An interlock that must switch it off
        does so all the same."""
        state, wish = self.get_object(), LockSerializer(data=request.data)
        wish.is_valid(raise_exception=True)
        state.lock(wish.validated_data["until"], by=request.user.get_username(), reason=wish.validated_data["reason"])
        return Response(self.get_serializer(state).data)

    @extend_schema(request=None, responses=DeviceStateSerializer)
    @action(detail=True, methods=["post"])
    def unlock(self, request: Request, uuid: str) -> Response:
        """Ends a lock before its time."""
        state = self.get_object()
        state.unlock()
        return Response(self.get_serializer(state).data)


class DeviceTokenFilter(FilterSet):
    ordered_by = {"created_at": "createdAt", "expires_at": "expiresAt"}
    searched = ("name", "prefix")
    organization = by_uuid("organization")
    sensor = by_uuid("sensor")
    device = by_uuid("device")
    live = BooleanFilter(method="filter_live", label="neither revoked nor expired")

    def filter_live(self, rows: QuerySet[DeviceToken], _name: str, value: bool) -> QuerySet[DeviceToken]:
        expired = Q(revoked_at__isnull=False) | Q(expires_at__lte=timezone.now())
        return rows.exclude(expired) if value else rows.filter(expired)


@extend_schema_view(
    create=extend_schema(responses={201: IssuedTokenSerializer}),
    destroy=extend_schema(summary="Revoke the token; its row stays"),
)
class DeviceTokenViewSet(EditViewSet[DeviceToken]):
    """Tokens of sensors and devices. A token is shown once, in the answer to the POST that issues it."""

    resource = "device-tokens"
    verbs: ClassVar = {"revoke": "change"}
    queryset = DeviceToken.objects.select_related("organization", "sensor", "device")
    serializer_class = DeviceTokenSerializer
    filterset_class = DeviceTokenFilter

    def get_serializer_class(self) -> type[DeviceTokenSerializer]:
        return IssuedTokenSerializer if self.action == "create" else DeviceTokenSerializer

    def perform_create(self, serializer: BaseSerializer[Any]) -> None:
        owner: Sensor | Device = serializer.validated_data.get("sensor") or serializer.validated_data["device"]
        self.access.demand("add", self.resource, owner.organization_id)
        serializer.save()

    @extend_schema(request=None, responses=DeviceTokenSerializer)
    @action(detail=True, methods=["post"])
    def revoke(self, request: Request, uuid: str) -> Response:
        token = self.get_object()
        self.perform_destroy(token)
        token.refresh_from_db()
        return Response(self.get_serializer(token).data)

    def perform_destroy(self, instance: DeviceToken) -> None:
        DeviceToken.objects.filter(pk=instance.pk).revoke()


class ReadingFilter(FilterSet):
    ordered_by = {"timestamp": "timestamp"}
    span = "timestamp"
    variable = UUIDFilter(method="filter_variable")
    sensor = UUIDFilter(method="filter_sensor")

    # The rows of Variable are looked up first: with their ids in hand the database reads the readings in the order of
    # the index on (variable, timestamp), and none that do not belong to the answer.
    def filter_variable(self, rows: QuerySet[Reading], _name: str, value: Any) -> QuerySet[Reading]:
        return rows.filter(variable__in=list(Variable.objects.filter(uuid=value).values_list("pk", flat=True)))

    def filter_sensor(self, rows: QuerySet[Reading], _name: str, value: Any) -> QuerySet[Reading]:
        return rows.filter(variable__in=list(Variable.objects.filter(sensor__uuid=value).values_list("pk", flat=True)))


class ReadingViewSet(ListModelMixin, ScopedViewSet[Reading]):
    """What was measured, newest first. Takes a `variable` or a `sensor`."""

    resource = "readings"
    organization_path = "variable__sensor__organization"
    queryset = Reading.objects.select_related("variable__sensor").order_by("-timestamp", "-variable_id")
    serializer_class = ReadingSerializer
    filterset_class = ReadingFilter

    def filter_queryset(self, queryset: QuerySet[Reading, Any]) -> QuerySet[Reading, Any]:
        """Refuses to sort the readings of everything that an organization ever measured."""
        if not {"variable", "sensor"} & self.request.query_params.keys():
            raise ValidationError({"variable": ["Say which variable, or which sensor."]})
        return super().filter_queryset(queryset)


class DataProblemFilter(FilterSet):
    ordered_by = {"last_seen_at": "lastSeenAt", "count": "count"}
    searched = ("name", "detail")
    span = "last_seen_at"
    organization = by_uuid("organization")
    originator = UUIDFilter(field_name="originator_uuid")
    name = CharFilter()
    kind = ChoiceFilter(choices=DataProblem.Kind.choices)


class DataProblemViewSet(ListModelMixin, DestroyModelMixin, ScopedViewSet[DataProblem]):
    """What sensors and devices send that cannot be used or is not believed, the newest first: one row for each kind of problem of
    each value. Delete one to begin to count anew.
    """

    resource = "data-problems"
    queryset = DataProblem.objects.select_related("organization")
    serializer_class = DataProblemSerializer
    filterset_class = DataProblemFilter


class StateChangeFilter(FilterSet):
    ordered_by = {"timestamp": "timestamp"}
    searched = ("actor", "state__name")
    span = "timestamp"
    device = by_uuid("state__device")
    state = by_uuid("state")
    source = ChoiceFilter(choices=StateChange.Source.choices)
    commandState = ChoiceFilter(field_name="command_state", choices=StateChange.CommandState.choices)  # noqa: N815


class StateChangeViewSet(ReadViewSet[StateChange]):
    """Who or what switched which state, newest first, and how far each command to the device has come."""

    resource = "state-changes"
    organization_path = "state__device__organization"
    queryset = StateChange.objects.select_related("state__device")
    serializer_class = StateChangeSerializer
    filterset_class = StateChangeFilter
