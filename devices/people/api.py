"""The REST API of invitations and of people's own tokens."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError as DjangoValidationError
from django.db.models import QuerySet
from django.utils import timezone
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework import mixins, serializers, status
from rest_framework.exceptions import PermissionDenied, Throttled, ValidationError
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.viewsets import GenericViewSet

from aemos.lib.problems import Conflict
from devices.filters import FilterSet, by_uuid
from devices.models import ApiToken, Invitation, Role
from devices.parsers import BoundedJSONParser
from devices.people import failures
from devices.people.joining import join
from devices.people.links import page_of
from devices.people.models import CannotJoin
from devices.serializers import CamelCaseSerializer, StrictMixin, area_field, organization_field
from devices.viewsets import ReadViewSet


class ApiTokenScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """Tells OpenAPI of the class; found by its target."""

    target_class = "devices.people.authentication.ApiTokenAuthentication"
    name = "apiToken"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {
            "type": "http",
            "scheme": "bearer",
            "description": "A person's own token, from POST /api/v1/api-tokens.",
        }


class InvitationSerializer(CamelCaseSerializer[Invitation]):
    """An invitation to join an organization."""

    organization = organization_field()
    role = serializers.ChoiceField(choices=Role.choices, default=Role.VIEWER)
    area = area_field("uuid of the area that an operator is limited to; null for no limit.")

    class Meta:
        model = Invitation
        fields = [
            "uuid", "organization", "role", "area", "note", "created_by", "created_at", "expires_at", "accepted_at",
            "accepted_by",
        ]  # fmt: skip
        read_only_fields = ["created_by", "created_at", "accepted_at", "accepted_by"]


class IssuedInvitationSerializer(InvitationSerializer):
    """The answer to the one request that makes an invitation."""

    token = serializers.CharField(read_only=True, help_text="Shown this once; whoever has it may join.")
    url = serializers.CharField(read_only=True, help_text="The page to send to the person who is invited.")

    class Meta(InvitationSerializer.Meta):
        fields = [*InvitationSerializer.Meta.fields, "token", "url"]


class InvitationFilter(FilterSet):
    ordered_by = {"created_at": "createdAt", "expires_at": "expiresAt"}
    searched = ("note", "accepted_by")
    organization = by_uuid("organization")


@extend_schema_view(
    create=extend_schema(request=InvitationSerializer, responses={201: IssuedInvitationSerializer}),
    destroy=extend_schema(summary="Withdraw the invitation"),
)
class InvitationViewSet(
    mixins.CreateModelMixin,
    mixins.DestroyModelMixin,
    ReadViewSet[Invitation],
):
    """Invitations to organizations, the newest first. Each is for one person, once; a member is removed under /memberships."""

    resource = "invitations"
    queryset = Invitation.objects.select_related("organization", "area")
    serializer_class = InvitationSerializer
    filterset_class = InvitationFilter

    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        form = self.get_serializer(data=request.data)
        form.is_valid(raise_exception=True)
        self.access.demand("add", self.resource, form.validated_data["organization"].pk)
        row, token = Invitation.objects.issue(**form.validated_data, created_by=request.user.get_username())
        row.token, row.url = token, page_of(request, token)  # type: ignore[attr-defined]
        shown = IssuedInvitationSerializer(row, context=self.get_serializer_context())
        return Response(shown.data, status=status.HTTP_201_CREATED)


class JoinSerializer(StrictMixin):
    """The token of an invitation; and a name and a password for who has no account yet, or does not say who it is."""

    token = serializers.CharField(max_length=200)
    username = serializers.CharField(max_length=150, required=False, help_text="Of the account to create.")
    password = serializers.CharField(max_length=200, required=False)


class JoinedSerializer(serializers.Serializer[Any]):
    """The new membership."""

    organization = serializers.UUIDField()
    organizationName = serializers.CharField()  # noqa: N815  the API speaks camelCase
    user = serializers.CharField()
    role = serializers.ChoiceField(choices=Role.choices)


class JoinView(APIView):
    """Accept an invitation. Who sends an access token joins with that account; who does not, names one to create."""

    permission_classes = (AllowAny,)
    parser_classes = (BoundedJSONParser,)

    @extend_schema(tags=["invitations"], request=JoinSerializer, responses={201: JoinedSerializer})
    def post(self, request: Request) -> Response:
        form = JoinSerializer(data=request.data)
        form.is_valid(raise_exception=True)
        attempt = {failures.ADDRESS: failures.address_of(request.META)}
        if closed := failures.seconds_closed(attempt):
            raise Throttled(wait=closed)
        try:
            membership = join(request.user, **form.validated_data)
        except CannotJoin as error:
            failures.count(attempt)
            raise Conflict(str(error), code="cannot-join") from error
        except DjangoValidationError as error:
            raise ValidationError(error.message_dict) from error
        organization = membership.organization
        answer = {"organization": organization.uuid, "organizationName": organization.name}
        answer |= {"user": membership.user.get_username(), "role": membership.role}
        return Response(answer, status=status.HTTP_201_CREATED)


class ApiTokenSerializer(CamelCaseSerializer[ApiToken]):
    """A person's own token for scripts."""

    role = serializers.ChoiceField(choices=Role.choices, default=Role.VIEWER, help_text="The most that it allows.")

    class Meta:
        model = ApiToken
        fields = ["uuid", "name", "role", "prefix", "created_at", "expires_at", "revoked_at", "last_used_at"]
        read_only_fields = ["prefix", "created_at", "revoked_at", "last_used_at"]
        extra_kwargs = {"name": {"trim_whitespace": False}}


class IssuedApiTokenSerializer(ApiTokenSerializer):
    """The answer to the one request that issues a token."""

    token = serializers.CharField(read_only=True, help_text="Shown this once; it cannot be had again.")

    class Meta(ApiTokenSerializer.Meta):
        fields = [*ApiTokenSerializer.Meta.fields, "token"]


@extend_schema_view(
    create=extend_schema(request=ApiTokenSerializer, responses={201: IssuedApiTokenSerializer}),
    destroy=extend_schema(summary="Revoke the token; its row stays"),
)
class ApiTokenViewSet(
    mixins.CreateModelMixin,
    mixins.ListModelMixin,
    mixins.RetrieveModelMixin,
    mixins.DestroyModelMixin,
    GenericViewSet[ApiToken],
):
    """One's own tokens for scripts and programs, the newest first. A token cannot make or revoke tokens."""

    queryset = ApiToken.objects.all()
    serializer_class = ApiTokenSerializer
    parser_classes = [BoundedJSONParser]
    lookup_field = "uuid"
    lookup_value_converter = "uuid"

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        if isinstance(request.auth, ApiToken):
            raise PermissionDenied("An API token cannot see or make tokens: log in.")

    def get_queryset(self) -> QuerySet[ApiToken]:
        return super().get_queryset().filter(user=self.request.user.pk)

    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        form = self.get_serializer(data=request.data)
        form.is_valid(raise_exception=True)
        row, token = ApiToken.objects.issue(**form.validated_data, user=request.user)
        row.token = token  # type: ignore[attr-defined]
        shown = IssuedApiTokenSerializer(row, context=self.get_serializer_context())
        return Response(shown.data, status=status.HTTP_201_CREATED)

    def perform_destroy(self, instance: ApiToken) -> None:
        ApiToken.objects.filter(pk=instance.pk, revoked_at=None).update(revoked_at=timezone.now())
