"""What the views of the REST API share: rows of the organizations that the person who asks belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar, TypeVar

import msgspec
from django.db import transaction
from django.db.models import Model, QuerySet
from django.http import StreamingHttpResponse
from rest_framework import mixins, viewsets
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request
from rest_framework.serializers import BaseSerializer

from aemos.lib.csv_lines import csv_lines
from devices.models import Organization
from devices.parsers import BoundedJSONParser
from devices.permissions import Access, access_of, id_at

Row = TypeVar("Row", bound=Model)
CHUNK_ROWS = 500


class ScopedViewSet(viewsets.GenericViewSet[Row]):
    """Rows of the organizations that the person who asks belongs to; all others do not exist."""

    resource: ClassVar[str]
    organization_path: ClassVar[str] = "organization"
    area_path: ClassVar[str] = ""
    lookup_field = "uuid"
    lookup_value_converter = "uuid"
    parser_classes = [BoundedJSONParser]

    @property
    def access(self) -> Access:
        return access_of(self.request)

    def get_queryset(self) -> QuerySet[Row]:
        return self.access.limit(super().get_queryset(), self.organization_path, resource=self.resource)

    def place_of(self, row: Model) -> tuple[int | None, int | None]:
        """The ids of a row's organization, and of the area that it stands in."""
        return id_at(row, self.organization_path), id_at(row, self.area_path) if self.area_path else None


class CsvRenderer(BaseRenderer):
    """The whole list, all pages of it, as a file for spreadsheets: `?format=csv`, or `Accept: text/csv`."""

    media_type = "text/csv"
    format = "csv"

    def render(self, data: Any, accepted_media_type: Any = None, renderer_context: Any = None) -> bytes:
        """Only refusals come here: the list itself is streamed."""
        return msgspec.json.encode(data)


class NdjsonRenderer(CsvRenderer):
    """One JSON object a line: `?format=ndjson`, or `Accept: application/x-ndjson`."""

    media_type = "application/x-ndjson"
    format = "ndjson"


class ListModelMixin(mixins.ListModelMixin):
    """Lists rows page by page as JSON, and whole as CSV or NDJSON."""

    def get_renderers(self: Any) -> list[BaseRenderer]:
        renderers: list[BaseRenderer] = super().get_renderers()  # type: ignore[misc]
        return [*renderers, CsvRenderer(), NdjsonRenderer()] if self.action == "list" else renderers

    def _rows(self: Any, rows: Iterator[Any]) -> Iterator[dict[str, Any]]:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            yield from self.get_serializer(chunk, many=True).data

    def list(self: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
        renderer = request.accepted_renderer
        if not isinstance(renderer, CsvRenderer):
            return super().list(request, *args, **kwargs)
        self.paginator.check(request)
        rows = self._rows(self.filter_queryset(self.get_queryset()).iterator(chunk_size=CHUNK_ROWS))
        if isinstance(renderer, NdjsonRenderer):
            lines: Iterator[Any] = (msgspec.json.encode(row, enc_hook=str) + b"\n" for row in rows)
            content_type = renderer.media_type
        else:
            lines = csv_lines(list(self.get_serializer().fields), (list(row.values()) for row in rows))
            content_type = "text/csv; charset=utf-8"
        name = self.queryset.model._meta.verbose_name_plural.replace(" ", "-")
        return StreamingHttpResponse(
            lines,
            content_type=content_type,
            headers={"Content-Disposition": f'attachment; filename="{name}.{renderer.format}"'},
        )


class ReadViewSet(ListModelMixin, mixins.RetrieveModelMixin, ScopedViewSet[Row]):
    """Lists and shows rows."""


class EditViewSet(mixins.CreateModelMixin, mixins.UpdateModelMixin, mixins.DestroyModelMixin, ReadViewSet[Row]):
    """Also creates, changes and deletes rows, each in one transaction."""

    parent: ClassVar[str] = "organization"
    parent_path: ClassVar[str] = "organization"

    def perform_create(self, serializer: BaseSerializer[Any]) -> None:
        """A new row's organization is that of the parent it names, to which `parent_path` leads from the parent."""
        parent = serializer.validated_data[self.parent]
        organization_id = parent.pk if isinstance(parent, Organization) else id_at(parent, self.parent_path)
        self.access.demand("add", self.resource, organization_id)
        with transaction.atomic():
            serializer.save()

    def perform_update(self, serializer: BaseSerializer[Any]) -> None:
        with transaction.atomic():
            serializer.save()

    def perform_destroy(self, instance: Row) -> None:
        with transaction.atomic():
            instance.delete()
