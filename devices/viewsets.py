"""What every view of the REST API shares: scoping by organization, and answers to a database in trouble."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, TypeVar

from django.db import DataError, IntegrityError, OperationalError, transaction
from django.db.models import Model, QuerySet
from rest_framework import mixins, status, viewsets
from rest_framework.exceptions import APIException, ValidationError
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer

from devices.models import Organization
from devices.parsers import BoundedJSONParser
from devices.permissions import Access, access_of, organization_of

log = logging.getLogger(__name__)
Row = TypeVar("Row", bound=Model)


class Conflict(APIException):
    status_code = status.HTTP_409_CONFLICT
    default_detail = "Someone else changed the same thing at the same time; look again and repeat."
    default_code = "conflict"


class Unavailable(APIException):
    """Something that the request needs does not answer; by default the database."""

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_detail = "The database is busy or cannot be reached; try again."
    default_code = "database-unavailable"
    wait = 5  # seconds; REST framework sends it as Retry-After


class ScopedViewSet(viewsets.GenericViewSet[Row]):
    """Rows of the organizations that the person who asks belongs to; all others do not exist."""

    resource: ClassVar[str]
    organization_path: ClassVar[str] = "organization"
    lookup_field = "uuid"
    lookup_value_converter = "uuid"
    parser_classes = [BoundedJSONParser]

    @property
    def access(self) -> Access:
        return access_of(self.request)

    def get_queryset(self) -> QuerySet[Row]:
        return self.access.limit(super().get_queryset(), self.organization_path, resource=self.resource)

    def organization_of(self, row: Model) -> int | None:
        return organization_of(row, self.organization_path)

    def handle_exception(self, exc: Exception) -> Response:
        return super().handle_exception(_translated(exc))


def _translated(error: Exception) -> Exception:
    if isinstance(error, IntegrityError):
        return Conflict()
    if isinstance(error, DataError):
        return ValidationError({"detail": ["A value lies outside of what can be stored."]})
    if isinstance(error, OperationalError):
        log.error("A request fails because of the database: %s", error)
        return Unavailable()
    return error


class ReadViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, ScopedViewSet[Row]):
    """Lists and shows rows."""


class EditViewSet(mixins.CreateModelMixin, mixins.UpdateModelMixin, mixins.DestroyModelMixin, ReadViewSet[Row]):
    """Also creates, changes and deletes rows, each in one transaction."""

    parent: ClassVar[str] = "organization"
    parent_path: ClassVar[str] = "organization"

    def perform_create(self, serializer: BaseSerializer[Any]) -> None:
        """A new row's organization is that of the parent it names, to which `parent_path` leads from the parent."""
        parent = serializer.validated_data[self.parent]
        organization_id = parent.pk if isinstance(parent, Organization) else organization_of(parent, self.parent_path)
        self.access.demand("add", self.resource, organization_id)
        with transaction.atomic():
            serializer.save()

    def perform_update(self, serializer: BaseSerializer[Any]) -> None:
        with transaction.atomic():
            serializer.save()

    def perform_destroy(self, instance: Row) -> None:
        with transaction.atomic():
            instance.delete()
