"""Areas over REST."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.db.models import QuerySet

from aemos.lib.problems import Conflict
from devices.areas.models import Area, people_of, within
from devices.filters import CharFilter, FilterSet, UUIDFilter, by_uuid
from devices.history.api import AreaHistoryMixin
from devices.serializers import CamelCaseSerializer, ScopedField, organization_field
from devices.viewsets import EditViewSet


class AreaSerializer(CamelCaseSerializer[Area]):
    """A place of a farm, which may be a part of another."""

    organization = organization_field()
    # The metaclass takes it away, before it could hide the attribute of that name.
    parent = ScopedField[Area](  # type: ignore[assignment]
        queryset=Area.objects.all(), allow_null=True, required=False, help_text="The area that it is a part of."
    )

    class Meta:
        model = Area
        fields = ["uuid", "organization", "parent", "name", "created_at"]
        immutable = ["organization"]


class AreaFilter(FilterSet):
    ordered_by = {"name": "name", "created_at": "createdAt"}
    searched = ("name",)
    organization = by_uuid("organization")
    parent = by_uuid("parent")
    name = CharFilter(lookup_expr="icontains")


class AreaViewSet(AreaHistoryMixin, EditViewSet[Area]):
    """The places of a farm. What stands in an area that is deleted stands in none."""

    resource = "areas"
    queryset = Area.objects.select_related("organization", "parent")
    serializer_class = AreaSerializer
    filterset_class = AreaFilter

    def perform_destroy(self, instance: Area) -> None:
        if people := people_of(instance):
            raise Conflict(f"{', '.join(people)}: limited to it or to a part of it. Change their memberships first.")
        super().perform_destroy(instance)


class StandsInFilter(FilterSet):
    """Of rows that stand in areas: `area` takes those of its parts too."""

    area = UUIDFilter(method="filter_area", label="uuid of an area; what stands in a part of it belongs to it.")

    def filter_area(self, rows: QuerySet[Any], _name: str, value: UUID) -> QuerySet[Any]:
        found = Area.objects.filter(uuid=value).first()
        return rows.filter(area__in=within(found)) if found else rows.none()
