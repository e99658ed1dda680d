"""Filters of rejected events and dead letters, one set for the API, the admin and the command."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django_filters import NumberFilter  # type: ignore[import-untyped]
from drf_spectacular.utils import extend_schema_field

from devices.filters import CharFilter, ChoiceFilter, FilterSet, UUIDFilter, by_uuid
from rules.models import DeadLetter, RejectedEvent, Replay, Status

Criteria = dict[str, Any]


class RejectedEventFilter(FilterSet):
    ordered_by = {"received_at": "receivedAt", "priority": "priority"}
    searched = ("detail", "payload")
    span = "received_at"
    organization = by_uuid("organization")
    reason = CharFilter()
    priority = extend_schema_field({"type": "integer", "minimum": 1, "maximum": 10})(
        NumberFilter(min_value=1, max_value=10)
    )
    lane = CharFilter()
    protocol = CharFilter()
    status = ChoiceFilter(choices=Status.choices)
    eventId = UUIDFilter(field_name="event_id")  # noqa: N815  the API speaks camelCase
    originator = CharFilter(field_name="originator_uuid")


class DeadLetterFilter(FilterSet):
    ordered_by = {"created_at": "createdAt", "attempts": "attempts"}
    searched = ("error", "node")
    span = "created_at"
    organization = by_uuid("organization")
    chain = by_uuid("chain")
    node = CharFilter()
    lane = CharFilter()
    status = ChoiceFilter(choices=Status.choices)
    eventId = UUIDFilter(field_name="event_id")  # noqa: N815  the API speaks camelCase
    event = UUIDFilter(field_name="event_id")
    originator = UUIDFilter(field_name="originator_uuid")


MODELS: Mapping[str, type[RejectedEvent] | type[DeadLetter]] = {
    Replay.Kind.REJECTED: RejectedEvent,
    Replay.Kind.DEAD: DeadLetter,
}
FILTERS: Mapping[str, type[FilterSet]] = {
    Replay.Kind.REJECTED: RejectedEventFilter,
    Replay.Kind.DEAD: DeadLetterFilter,
}


def criteria(kind: str, named: Mapping[str, Any]) -> Criteria:
    """The look-ups, as JSON can hold them, that filters given by name stand for.

    Raises ValidationError with a message for each name whose value cannot be used, or that is none of a filter.
    """
    filters = FILTERS[kind]
    known = {name: found for name, found in filters.get_filters().items() if name not in ("ordering", "search")}
    unknown = {
        name: [f"There is no such filter; known here: {', '.join(known)}."] for name in named if name not in known
    }
    form = filters(data=named, queryset=MODELS[kind]._default_manager.none()).form
    if unknown or not form.is_valid():
        raise ValidationError({**unknown, **{name: list(texts) for name, texts in form.errors.items()}})
    given = {name: form.cleaned_data[name] for name in named if form.cleaned_data[name] not in (None, "")}
    return {f"{known[name].field_name}__{known[name].lookup_expr}": _plain(value) for name, value in given.items()}


def rows_of(kind: str, wanted: Criteria) -> QuerySet[Any]:
    return MODELS[kind]._default_manager.filter(**wanted)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value if isinstance(value, str | int) else str(value)
