"""What the admin's pages of rejected events and dead letters share: filters, replay, discard and export of what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar
from urllib.parse import urlencode

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.core.exceptions import PermissionDenied, ValidationError
from django.db.models import QuerySet, Value
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.urls import path, reverse
from rest_framework.exceptions import APIException

from aemos.lib.csv_lines import csv_lines
from devices import exceptions
from devices.models import Organization
from devices.permissions import access_of
from devices.scoped_admin import DisposableRecordAdmin, ScopedAdmin, as_uuid
from notifications.messages import Protocol
from rules.admission import filtersets, replay
from rules.admission.circuit import Reason
from rules.admission.filtersets import Criteria
from rules.admission.replay import CannotReplay, ReplayRequest
from rules.api.rejected_views import organization_for
from rules.authoring.consequences import Movement, movements
from rules.events import Lane
from rules.models import Status

MAXIMUM_SELECTED = 1_000
# Known beforehand: asking the table which reasons occur in it would read all of it.
REASONS = (
    *(Reason.CRITICAL, Reason.OPEN, Reason.REOPENED, Reason.SHED, Reason.HARD_LIMIT, Reason.ORGANIZATION),
    Reason.ENQUEUE_ERROR,
    *(
        kind.reason
        for kind in (exceptions.BadPayload, exceptions.Unauthorized, exceptions.Forbidden, exceptions.TooLarge)
    ),
)


class _NamedFilter(admin.SimpleListFilter):
    """One of the filters that rules.admission.filtersets knows, under the same name."""

    options: ClassVar[Sequence[tuple[str, str]]]

    def __init__(self, request: HttpRequest, params: Any, model: Any, model_admin: Any) -> None:
        self._kind: str = model_admin.kind
        super().__init__(request, params, model, model_admin)

    def lookups(self, request: HttpRequest, model_admin: Any) -> Sequence[tuple[str, str]]:
        return self.options

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return _filtered(self._kind, queryset, {str(self.parameter_name): self.value()})


class ReasonFilter(_NamedFilter):
    title = parameter_name = "reason"
    options = [(str(reason), str(reason)) for reason in REASONS]


class PriorityFilter(_NamedFilter):
    title = parameter_name = "priority"
    options = [(str(number), str(number)) for number in range(1, 11)]


class LaneFilter(_NamedFilter):
    title = parameter_name = "lane"
    options = [(str(lane), str(lane)) for lane in Lane]


class ProtocolFilter(_NamedFilter):
    title = parameter_name = "protocol"
    options = [(name, name) for name in ("http", Protocol.MQTT.value, Protocol.COAP.value)]


class StatusFilter(_NamedFilter):
    title = parameter_name = "status"
    options = [(value, value) for value in Status.values]


class SpanFilter(admin.ListFilter):
    """From one moment to another, both inclusive, either left open."""

    title = "time"
    template = "admin/rules/span_filter.html"
    _names = ("from", "to")

    def __init__(self, request: HttpRequest, params: Any, model: Any, model_admin: Any) -> None:
        super().__init__(request, params, model, model_admin)
        self._kind: str = model_admin.kind
        for name in self._names:
            if name in params:
                self.used_parameters[name] = params.pop(name)[-1]

    def expected_parameters(self) -> list[str | None]:
        return list(self._names)

    def has_output(self) -> bool:
        return True

    def choices(self, changelist: Any) -> Iterator[Any]:
        given = {name: self.used_parameters.get(name, "") for name in self._names}
        others = [(name, value) for name, value in changelist.params.items() if name not in given]
        yield {**given, "others": others}

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return _filtered(self._kind, queryset, self.used_parameters)


def _filtered(kind: str, rows: QuerySet[Any], named: dict[str, Any]) -> QuerySet[Any]:
    try:
        return rows.filter(**filtersets.criteria(kind, {name: value for name, value in named.items() if value}))
    except ValidationError as error:
        raise IncorrectLookupParameters(error) from error


class ReplayForm(forms.Form):
    rate = forms.IntegerField(
        min_value=1, max_value=replay.MAXIMUM_RATE, initial=replay.DEFAULT_RATE, help_text="Events a second at most."
    )
    with_commands = forms.BooleanField(
        required=False,
        label="Switch devices",
        help_text="Unticked: no device is switched, whatever chains decide; readings are stored, alarms and notifications made. "
        "Ticked: chains also switch devices, however old the events are.",
    )


class DecidableAdmin(DisposableRecordAdmin):
    """Rows that people decide about: replay, or discard. `text_path` is what a search that is no uuid looks into."""

    kind: ClassVar[str]
    text_path: ClassVar[str]
    source_paths: ClassVar[tuple[str | Value, ...]]
    """Where a row says its source type, the uuid of the source, its organization and, if it is for one alone, its chain."""
    exported: ClassVar[Sequence[str]]
    change_list_template = "admin/rules/decidable_list.html"
    change_form_template = "admin/rules/decidable_row.html"
    show_facets = admin.ShowFacets.NEVER  # they count the table once for each choice
    list_select_related: ClassVar[tuple[str, ...]] = ("organization",)
    search_help_text = "A whole uuid (event, sensor, device), or a part of the message"
    actions = ("replay_selected", "discard_selected", "export_csv")

    def has_replay_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """The right to change rows of this kind, although nobody edits them."""
        return ScopedAdmin.has_change_permission(self, request, obj)

    def get_urls(self) -> list[Any]:
        view = self.admin_site.admin_view(self.replay_view)
        return [path("replay/", view, name=self._name("replay")), *super().get_urls()]

    def _name(self, page: str) -> str:
        return f"{self.opts.app_label}_{self.opts.model_name}_{page}"

    def _url(self, page: str) -> str:
        return reverse(f"admin:{self._name(page)}")

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        return queryset.filter(**self._searched(search_term)), False

    def _searched(self, text: str) -> Criteria:
        if not text.strip():
            return {}
        if "\0" in text:
            raise ValidationError("What is looked for holds a NUL character.")
        uuid = as_uuid(text)
        if uuid is None:
            return {f"{self.text_path}__icontains": text.strip()}
        # A uuid is that of one thing only, and one condition, unlike several joined by OR, is answered by its index.
        rows = self.model._default_manager.all()
        found = next((name for name in self.uuid_paths if rows.filter(**{name: uuid}).exists()), "uuid")
        return {found: str(uuid)}

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        query = request.GET.urlencode()
        extra = {"may_replay": self.has_replay_permission(request), "replay_url": f"{self._url('replay')}?{query}"}
        return super().changelist_view(request, {**extra, **(extra_context or {})})

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> HttpResponse:
        row = kwargs.get("obj")
        may = row is not None and row.status == Status.OPEN and self.has_replay_permission(request, row)
        context.update(may_replay=may, replay_url=f"{self._url('replay')}?ids={row.pk if row else ''}")
        return super().render_change_form(request, context, *args, **kwargs)

    @admin.action(description="Replay selected", permissions=["replay"])
    def replay_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        ids = [str(row_id) for row_id in queryset.values_list("pk", flat=True)[: MAXIMUM_SELECTED + 1]]
        if len(ids) > MAXIMUM_SELECTED:
            text = f"More than {MAXIMUM_SELECTED} are selected: filter for them and replay everything in the filter."
            messages.error(request, text)
            return None
        return HttpResponseRedirect(f"{self._url('replay')}?{urlencode({'ids': ','.join(ids)})}")

    @admin.action(description="Discard selected: nobody wants them", permissions=["replay"])
    def discard_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        rows = self.changeable(request, queryset)
        number = replay.discard(rows.order_by(), actor=request.user.get_username())
        messages.success(request, f"{number} discarded.")

    @admin.action(description="Export selected as CSV", permissions=["view"])
    def export_csv(self, request: HttpRequest, queryset: QuerySet[Any]) -> StreamingHttpResponse:
        rows = queryset.values_list(*self.exported).iterator(chunk_size=500)
        answer = StreamingHttpResponse(csv_lines(self.exported, rows), content_type="text/csv; charset=utf-8")
        answer["Content-Disposition"] = f'attachment; filename="{self.kind}.csv"'
        return answer

    def replay_view(self, request: HttpRequest) -> HttpResponse:
        """Shows what a replay of the filter, or of the selected rows, would send; a POST starts it."""
        if not self.has_replay_permission(request):
            raise PermissionDenied
        form = ReplayForm(request.POST or None)
        try:
            wanted = self._replay_request(request, form)
            if request.method == "POST" and form.is_valid():
                started = replay.start(wanted)
                return HttpResponseRedirect(reverse("admin:rules_replay_change", args=[started.pk]))
        except (CannotReplay, ValidationError, APIException) as error:
            messages.error(request, _error_text(error))
            return HttpResponseRedirect(self._url("changelist"))
        number = replay.count(wanted.rows())
        context = {
            **self.admin_site.each_context(request),
            "title": f"Replay {self.opts.verbose_name_plural}",
            "opts": self.opts,
            "form": form,
            "any": number,
            "counted": f"At least {number:,}" if number >= replay.COUNTED_ROWS else f"{number:,}",
            "organization": wanted.organization,
            "chosen": ", ".join(f"{name} {value}" for name, value in request.GET.items() if name != "ids"),
            "sample": MAXIMUM_SELECTED,
            "is_sample": number > MAXIMUM_SELECTED,
            "movements": self._movements(wanted.rows()),
            "list_url": self._url("changelist"),
        }
        return TemplateResponse(request, "admin/rules/replay_form.html", context)

    def _movements(self, rows: QuerySet[Any]) -> list[Movement]:
        """What the chosen events could switch, judged by the newest MAXIMUM_SELECTED of them."""
        found = set(rows.order_by("-pk").values_list(*self.source_paths)[:MAXIMUM_SELECTED])
        return movements(
            [(source_type, str(uuid)) for source_type, uuid, _, chain in found if chain is None],
            organization_ids={organization for _, _, organization, chain in found if organization and chain is None},
            chain_ids={chain for *_, chain in found if chain is not None},
        )

    def _replay_request(self, request: HttpRequest, form: ReplayForm) -> ReplayRequest:
        chosen = form.cleaned_data if form.is_bound and form.is_valid() else {}
        criteria, organization = self._chosen(request)
        return ReplayRequest(
            kind=self.kind,
            criteria=criteria,
            organization=organization,
            rate=chosen.get("rate", replay.DEFAULT_RATE),
            with_commands=chosen.get("with_commands", False),
            actor=request.user.get_username(),
        )

    def _chosen(self, request: HttpRequest) -> tuple[Criteria, Organization | None]:
        access = access_of(request)
        if "ids" in request.GET:
            ids = [int(text) for text in request.GET["ids"].split(",")[:MAXIMUM_SELECTED] if text.isdecimal()]
            return {"id__in": ids}, self._organization_of(request, ids)
        named = {
            name: value for name, value in request.GET.items() if name in filtersets.FILTERS[self.kind].get_filters()
        }
        organization = organization_for(access, self.resource, as_uuid(str(named.pop("organization", ""))))
        return {**filtersets.criteria(self.kind, named), **self._searched(request.GET.get("q", ""))}, organization

    def _organization_of(self, request: HttpRequest, ids: list[int]) -> Organization | None:
        access = access_of(request)
        rows = self.model._default_manager.filter(pk__in=ids)
        mine = access.limit(rows, "organization", resource=self.resource, verb="change")
        owners = set(mine.order_by().values_list("organization__uuid", flat=True))
        if len(owners) == 1:
            return organization_for(access, self.resource, owners.pop())
        if access.superuser:
            return None
        raise CannotReplay("Select events of one organization in which you may replay.")


def _error_text(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return " ".join(error.messages)
    detail = getattr(error, "detail", None)
    if isinstance(detail, dict):
        return " ".join(str(text) for texts in detail.values() for text in texts)
    return str(detail or error)
