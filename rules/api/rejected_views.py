"""The REST API of rejected events, dead letters and their replays."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from django.contrib.auth.models import AbstractBaseUser
from django.core.exceptions import ValidationError as DjangoValidationError
from django.core.paginator import Paginator
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework import status
from rest_framework.decorators import action
from rest_framework.exceptions import ValidationError
from rest_framework.request import Request
from rest_framework.response import Response

from aemos.lib.problems import Conflict
from devices.models import Organization
from devices.pagination import Pagination
from devices.permissions import Access
from devices.scoped_admin import BoundedPaginator
from devices.viewsets import ReadViewSet, Row
from rules.admission import filtersets, replay
from rules.admission.filtersets import DeadLetterFilter, RejectedEventFilter
from rules.admission.replay import CannotReplay, ReplayRequest
from rules.api.rejected_serializers import (
    DeadLetterSerializer,
    DeadReplayWishSerializer,
    RejectedEventSerializer,
    RejectedReplayWishSerializer,
    ReplaySerializer,
)
from rules.models import DeadLetter, RejectedEvent, Replay


class BoundedPagination(Pagination):
    """`count` goes no further than 10,000: under overload these tables grow to millions. Narrow the time instead."""

    django_paginator_class: type[Paginator[Any]] = BoundedPaginator


class DecidableViewSet(ReadViewSet[Row]):
    """What people decide about: replay it, or discard it."""

    kind: ClassVar[str]
    verbs: ClassVar = dict.fromkeys(("discard", "replay"), "change")
    wish_serializer: ClassVar[type[Any]]
    pagination_class = BoundedPagination

    @extend_schema(request=None)
    @action(detail=True, methods=["post"])
    def discard(self, request: Request, **_: Any) -> Response:
        """Decides that nobody wants it. 409 when it was decided about before."""
        row: Any = self.get_object()
        if not replay.discard(type(row).objects.filter(pk=row.pk), actor=_name(request)):
            raise Conflict(f"It is {row.status} already.")
        return Response(self.get_serializer(self.get_queryset().get(pk=row.pk)).data)

    @action(detail=False, methods=["post"])
    def replay(self, request: Request, **_: Any) -> Response:
        """Starts a replay of everything that the filters choose and nobody has decided about; GET /replays/{uuid} follows it.

        Whoever may replay in several organizations names one.
        """
        form = self.wish_serializer(data=request.data)
        form.is_valid(raise_exception=True)
        named = dict(form.validated_data)
        organization = self._organization(named.pop("organization", None))
        rate, with_commands = named.pop("rate"), named.pop("withCommands")
        try:
            wanted = ReplayRequest(
                kind=self.kind,
                criteria=filtersets.criteria(self.kind, named),
                organization=organization,
                rate=rate,
                with_commands=with_commands,
                actor=_name(request),
            )
            started = replay.start(wanted)
        except DjangoValidationError as error:
            raise ValidationError(error.message_dict) from error
        except CannotReplay as error:
            raise ValidationError({"detail": [str(error)]}) from error
        answer = ReplaySerializer(started, context=self.get_serializer_context())
        return Response(answer.data, status=status.HTTP_202_ACCEPTED)

    def _organization(self, uuid: Any) -> Organization | None:
        return organization_for(self.access, self.resource, uuid)


def organization_for(access: Access, resource: str, uuid: Any) -> Organization | None:
    """The one organization that a replay is for, None meaning all. Raises PermissionDenied or ValidationError."""
    if uuid is not None:
        visible = access.limit(Organization.objects.all(), "pk", resource=resource)
        found = visible.filter(uuid=uuid).first()
        if found is None:
            raise ValidationError({"organization": [f"There is none with the uuid {uuid}."]})
        access.demand("change", resource, found.pk)
        return found
    if access.superuser:
        return None
    own = access.organizations("change", resource)
    if not own:
        access.demand("change", resource, next(iter(access.roles), None))
    if len(own) > 1:
        raise ValidationError({"organization": ["Name the organization: you may replay in more than one."]})
    return Organization.objects.get(pk=own[0])


@extend_schema_view(replay=extend_schema(request=RejectedReplayWishSerializer, responses={202: ReplaySerializer}))
class RejectedEventViewSet(DecidableViewSet[RejectedEvent]):
    """What was sent and not accepted, newest first. Requests whose organization is unknown are shown to superusers."""

    kind = Replay.Kind.REJECTED
    resource = "rejected-events"
    queryset = RejectedEvent.objects.select_related("organization")
    serializer_class = RejectedEventSerializer
    filterset_class = RejectedEventFilter
    wish_serializer = RejectedReplayWishSerializer


@extend_schema_view(replay=extend_schema(request=DeadReplayWishSerializer, responses={202: ReplaySerializer}))
class DeadLetterViewSet(DecidableViewSet[DeadLetter]):
    """Accepted events that failed at every attempt, newest first."""

    kind = Replay.Kind.DEAD
    resource = "dead-letters"
    queryset = DeadLetter.objects.select_related("organization", "chain").defer("traceback")
    serializer_class = DeadLetterSerializer
    filterset_class = DeadLetterFilter
    wish_serializer = DeadReplayWishSerializer


class ReplayViewSet(ReadViewSet[Replay]):
    """Replays and how far they are, newest first. One over all organizations is shown to superusers."""

    resource = "replays"
    verbs: ClassVar = {"stop": "change"}
    queryset = Replay.objects.select_related("organization")
    serializer_class = ReplaySerializer

    @extend_schema(request=None)
    @action(detail=True, methods=["post"])
    def stop(self, request: Request, **_: Any) -> Response:
        """Ends it; what was sent stays sent. 409 when it had ended before."""
        row = self.get_object()
        if not replay.stop(row, actor=_name(request)):
            raise Conflict(f"It is {row.state} already.")
        return Response(self.get_serializer(self.get_queryset().get(pk=row.pk)).data)


def _name(request: Request) -> str:
    return cast("AbstractBaseUser", request.user).get_username()
