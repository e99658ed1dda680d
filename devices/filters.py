"""Filters of the REST API's lists: query parameters under the names that growers type in, fewer rows out."""

from __future__ import annotations

from typing import Any, ClassVar

import django_filters  # type: ignore[import-untyped]
from django_filters import BooleanFilter, CharFilter, ChoiceFilter, IsoDateTimeFilter, UUIDFilter

__all__ = ["BooleanFilter", "CharFilter", "ChoiceFilter", "FilterSet", "IsoDateTimeFilter", "UUIDFilter", "by_uuid"]


class FilterSet(django_filters.FilterSet):
    """Knows `from` and `to` (inclusive) if `span` names the column of the time."""

    span: ClassVar[str] = ""

    @classmethod
    def get_filters(cls) -> dict[str, Any]:
        filters: dict[str, Any] = super().get_filters()
        if cls.span:
            # "from" is no name that a class body can assign to.
            filters["from"] = IsoDateTimeFilter(field_name=cls.span, lookup_expr="gte")
            filters["to"] = IsoDateTimeFilter(field_name=cls.span, lookup_expr="lte")
        return filters


def by_uuid(path: str) -> Any:
    """A filter by the uuid of a related row."""
    return UUIDFilter(field_name=f"{path}__uuid")
