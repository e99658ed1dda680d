"""Filters of the lists of the REST API, under the names of the JSON fields; an unknown parameter is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, ClassVar

import django_filters  # type: ignore[import-untyped]
from django import forms
from django.core.exceptions import ValidationError
from django.db.models import Q, QuerySet
from django_filters import CharFilter, ChoiceFilter, UUIDFilter
from django_filters.fields import IsoDateTimeField  # type: ignore[import-untyped]
from django_filters.rest_framework import DjangoFilterBackend  # type: ignore[import-untyped]
from django_filters.widgets import BooleanWidget  # type: ignore[import-untyped]
from rest_framework.exceptions import ValidationError as BadRequest
from rest_framework.request import Request

if TYPE_CHECKING:
    from rest_framework.generics import GenericAPIView  # which imports this module by its name in the settings

__all__ = [
    "BooleanFilter",
    "CharFilter",
    "ChoiceFilter",
    "FilterSet",
    "IsoDateTimeFilter",
    "StrictFilterBackend",
    "UUIDFilter",
    "by_uuid",
]


class _StorableTime(IsoDateTimeField):
    def clean(self, value: Any) -> datetime | None:
        """A time that is none any more in UTC, as in the first hours of the year 1 or the last ones of 9999, is refused."""
        moment: datetime | None = super().clean(value)
        try:
            return moment.astimezone(UTC) if moment else None
        except OverflowError:
            raise ValidationError("This time is out of range.", code="out-of-range") from None


class IsoDateTimeFilter(django_filters.IsoDateTimeFilter):
    """A time with its zone."""

    field_class = _StorableTime


class _StrictWidget(BooleanWidget):
    def value_from_datadict(self, data: Any, files: Any, name: str) -> Any:
        """What is neither true nor false comes as it was written; django-filter would take it for nothing said."""
        value = super().value_from_datadict(data, files, name)
        return data.get(name) or None if value is None else value


class _StrictBoolean(forms.NullBooleanField):
    widget = _StrictWidget

    def clean(self, value: Any) -> Any:
        if isinstance(value, str):
            raise ValidationError("Must be true or false.", code="invalid")
        return super().clean(value)


class BooleanFilter(django_filters.BooleanFilter):
    """true or false; a typo would otherwise return everything."""

    field_class = _StrictBoolean


class FilterSet(django_filters.FilterSet):
    """Knows `from` and `to` (inclusive) if `span` names the column of the time, `ordering` by the columns of `ordered_by`, which
    maps them to names of fields, and `search` for a part of what stands in the columns of `searched`.
    """

    span: ClassVar[str] = ""
    ordered_by: ClassVar[Mapping[str, str]] = {}
    searched: ClassVar[Sequence[str]] = ()

    @classmethod
    def get_filters(cls) -> dict[str, Any]:
        filters: dict[str, Any] = super().get_filters()
        if cls.span:
            # "from" is no name that a class body can assign to.
            filters["from"] = IsoDateTimeFilter(field_name=cls.span, lookup_expr="gte")
            filters["to"] = IsoDateTimeFilter(field_name=cls.span, lookup_expr="lte")
        if cls.ordered_by:
            filters["ordering"] = django_filters.OrderingFilter(fields=cls.ordered_by)
        if cls.searched:
            filters["search"] = CharFilter(method="filter_search", label="A part of the text.")
        return filters

    def filter_search(self, rows: QuerySet[Any], _name: str, value: str) -> QuerySet[Any]:
        return rows.filter(reduce(or_, (Q(**{f"{column}__icontains": value}) for column in self.searched)))


def by_uuid(path: str) -> Any:
    """A filter by the uuid of a related row."""
    return UUIDFilter(field_name=f"{path}__uuid")


class StrictFilterBackend(DjangoFilterBackend):
    """Refuses query parameters that do not exist: a filter with a typo would otherwise return everything."""

    def filter_queryset(self, request: Request, queryset: QuerySet[Any], view: GenericAPIView[Any]) -> QuerySet[Any]:
        if request.method == "GET":
            _refuse_unknown(request, view)
        filtered: QuerySet[Any] = super().filter_queryset(request, queryset, view)
        return filtered


def _refuse_unknown(request: Request, view: GenericAPIView[Any]) -> None:
    filterset, paginator = getattr(view, "filterset_class", None), view.paginator
    known = {*(filterset.get_filters() if filterset else ())}
    known |= {getattr(paginator, name) for name in ("page_query_param", "page_size_query_param") if paginator}
    unknown = sorted(request.query_params.keys() - known - {"format"})
    empty = sorted(name for name, value in request.query_params.items() if not value and name not in unknown)
    if empty:
        raise BadRequest({name: ["This parameter is empty; give it a value or leave it out."] for name in empty})
    if unknown:
        text = f"There is no such parameter; there are: {', '.join(sorted(known))}."
        raise BadRequest({name: [text] for name in unknown})
