"""What the views of the REST API share: rows of the organizations that the person who asks belongs to."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from django.db import transaction
from django.db.models import Model, QuerySet
from rest_framework import mixins, viewsets
from rest_framework.serializers import BaseSerializer

from devices.models import Organization
from devices.parsers import BoundedJSONParser
from devices.permissions import Access, access_of, organization_of

Row = TypeVar("Row", bound=Model)


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
