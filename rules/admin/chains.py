"""The admin's page of rule chains with their nodes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.forms.models import BaseInlineFormSet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.shortcuts import get_object_or_404
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils import timezone
from django.utils.html import format_html_join
from django.utils.safestring import mark_safe
from django.views.decorators.http import require_POST
from redis.exceptions import RedisError

from aemos.lib import redis
from devices.exceptions import Overloaded
from devices.forgiving import ShallowDecoder
from devices.scoped_admin import FixedParentForm, OrganizationListFilter, ScopedAdmin, ScopedStackedInline
from rules.admin.trial import TrialForm
from rules.authoring import describe, editing, import_export, lint, validation
from rules.effects import chain_ends
from rules.engine.exceptions import InvalidChain, Problem
from rules.models import ChainStatistics, RuleChain, RuleNode
from rules.processing import schedules

if TYPE_CHECKING:
    _NodeForm = forms.ModelForm[RuleNode]
    _NodeFormSet = BaseInlineFormSet[RuleNode, RuleChain, "NodeForm"]
else:
    _NodeForm, _NodeFormSet = forms.ModelForm, BaseInlineFormSet

_NODE_PATH = re.compile(r"nodes\[(\d+)\]\.?(\w*)\.?")
_FORM_FIELDS = {
    "name": "name",
    "type": "type",
    "config": "config",
    "next": "next",
    "onFalse": "on_false",
    "onFailure": "on_failure",
}
HELP_TEXTS = {
    "enabled": "An enabled chain runs, and switches devices, as soon as it is saved. Save it unticked first and try it "
    'with "Try with values", then tick this.'
}


class NodeForm(_NodeForm):
    # Named here, or Django would compare it with what the page showed instead of with what is stored.
    config = forms.JSONField(
        decoder=ShallowDecoder, widget=forms.Textarea(attrs={"rows": 5, "cols": 80, "class": "vLargeTextField"})
    )

    def validate_unique(self) -> None:
        """Left to the chain's judge: two nodes that swap their names are no doubles."""

    def validate_constraints(self) -> None:
        """As above."""


class NodeFormSet(_NodeFormSet):
    """The nodes of one chain, judged together as the REST API judges them; every problem goes to its form and field."""

    def clean(self) -> None:
        super().clean()
        if any(self.errors) or not self.must_be_judged() or self.instance.organization_id is None:
            return
        kept = self.kept_forms()
        for problem in validation.problems_of(self.instance, [form.instance for form in kept]):
            self._tell(problem, kept)

    def validate_unique(self) -> None:
        """Left to the chain's judge, like the forms' own."""

    def must_be_judged(self) -> bool:
        """A chain that only changes its name, or is switched off, may be broken: its sensor may be gone."""
        if self.has_changed() or self.instance.pk is None:
            return True
        return editing.must_be_judged(self.instance, RuleChain.objects.filter(pk=self.instance.pk).first())

    def kept_forms(self) -> list[NodeForm]:
        """Those that are not deleted and not left empty, in the order of the page."""
        return [
            form for form in self.forms if form not in self.deleted_forms and (form.instance.pk or form.has_changed())
        ]

    def _tell(self, problem: Problem, kept: list[NodeForm]) -> None:
        place = _NODE_PATH.match(problem.path)
        if place is None:
            self._non_form_errors.append(f"{problem.path}: {problem.message}")  # type: ignore[attr-defined]
            return
        form, text = kept[int(place[1])], f"{problem.path.removeprefix(place[0])} {problem.message}".strip()
        form.add_error(_FORM_FIELDS.get(place[2]), text)


class NodeInline(ScopedStackedInline):
    model = RuleNode
    resource = "rule-chains"
    form = NodeForm
    formset = NodeFormSet  # type: ignore[assignment]
    extra = 1
    fields = (("name", "type"), ("next", "on_false", "on_failure"), "config")


class ChainForm(FixedParentForm):
    """Asks before a chain is switched off that has left something on."""

    end_confirmed = forms.BooleanField(
        required=False,
        label="End it all the same",
        help_text="To be ticked to switch off a chain that has left something on.",
    )

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        was_on = (
            self.instance.pk is not None and "enabled" in self.changed_data and not self.cleaned_data.get("enabled")
        )
        left = chain_ends.left_on(self.instance) if was_on else []
        if left and not self.cleaned_data.get("end_confirmed"):
            said = "; ".join(map(str, left))
            self.add_error("enabled", f"{said}. Tick “End it all the same” to switch the chain off.")
        return cleaned


@admin.register(RuleChain)
class RuleChainAdmin(ScopedAdmin):
    """Saved through rules.authoring.editing, like every change of a chain: nodes and chain together, one version further."""

    resource = "rule-chains"
    form = ChainForm
    change_form_template = "admin/rules/chain_form.html"
    readonly_fields = (
        *("sentence", "graph", "left_on", "next_run_at", "last_run_at", "suspended_at"),
        *("executions", "failures", "average", "last_executed", "last_error"),
        *("uuid", "version", "created_at", "updated_at"),
    )
    list_display = (
        *("name", "organization", "runs", "execution_type", "next_run", "executions", "failures", "average"),
        *("last_executed", "last_error"),
    )
    list_filter = ("enabled", ("suspended_at", admin.EmptyFieldListFilter), "execution_type", OrganizationListFilter)
    list_select_related = ("organization", "statistics")
    autocomplete_fields = ("organization",)
    fieldsets = (
        (None, {"fields": ("name", "organization", "enabled", "end_confirmed", "left_on", "sentence", "graph")}),
        (
            "When",
            {
                "fields": (
                    "execution_type",
                    ("cron", "timezone"),
                    "missed_runs",
                    "late_events",
                    ("next_run_at", "last_run_at"),
                )
            },
        ),
        ("Order and attempts", {"fields": (("priority", "max_retries"),)}),
        (
            "So far",
            {"fields": (("executions", "failures", "average"), "last_executed", "last_error", "suspended_at")},
        ),
        ("Record", {"fields": (("version", "created_at", "updated_at"), "uuid"), "classes": ("collapse",)}),
    )
    inlines = (NodeInline,)
    actions = ("switch_on", "switch_off", "duplicate_selected")

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        """A chain that nobody has tried yet switches no pump: whoever writes it enables it afterwards."""
        return {"enabled": False, **super().get_changeform_initial_data(request)}

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        return super().get_form(request, obj, change, **{"help_texts": HELP_TEXTS, **kwargs})

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """What a chain that does not exist yet cannot have is left out."""
        found = super().get_fieldsets(request, obj)
        if obj is not None and chain_ends.left_on(obj):
            return found
        unknown = {"end_confirmed", "left_on"} if obj is not None else {"end_confirmed", *self.readonly_fields}
        asked = [(title, {**options, "fields": _without(options["fields"], unknown)}) for title, options in found]
        return [(title, options) for title, options in asked if options["fields"]]

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """Nothing yet: the chain is written together with its nodes, in save_related."""

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        (formset,) = formsets
        formset.save(commit=False)  # fills in what the admin's log shows
        nodes = [node_form.instance for node_form in formset.kept_forms()] if formset.must_be_judged() else None
        editing.save(form.instance, nodes, by=request.user.get_username())
        for warning in lint.warnings_of(form.instance, list(form.instance.nodes.all())):
            messages.warning(request, f"{_placed(warning, nodes or [])} {warning.message}")

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        editing.delete(obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        for chain in queryset:
            editing.delete(chain)

    @admin.display(description="has left on")
    def left_on(self, chain: RuleChain) -> str:
        return format_html_join("", "{}<br>", ((str(each),) for each in chain_ends.left_on(chain)))

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[Any], list[Any]]:
        """Says what the chains have left on, too."""
        chains = list(objs)
        names, counts, denied, protected = super().get_deleted_objects(chains, request)
        return (
            [*names, *(str(left) for chain in chains for left in chain_ends.left_on(chain))],
            counts,
            denied,
            protected,
        )

    @admin.display(description="runs", ordering="enabled")
    def runs(self, chain: RuleChain) -> str:
        return {"": "yes", "switched off": "no"}.get(chain.stopped, chain.stopped)

    @admin.display(description="next run", ordering="next_run_at")
    def next_run(self, chain: RuleChain) -> str:
        return _short(chain.next_run_at)

    @admin.display(description="in words")
    def sentence(self, chain: RuleChain) -> str:
        return describe.sentence_of(chain, chain.nodes.all())

    @admin.display(description="graph")
    def graph(self, chain: RuleChain) -> str:
        return mark_safe(describe.graph_of(chain, chain.nodes.all()))  # noqa: S308  rules.authoring.graph escapes every text

    @admin.display(description="executions", ordering="statistics__executions")
    def executions(self, chain: RuleChain) -> int:
        return _statistics(chain).executions

    @admin.display(description="failures", ordering="statistics__failures")
    def failures(self, chain: RuleChain) -> int:
        return _statistics(chain).failures

    @admin.display(description="average time")
    def average(self, chain: RuleChain) -> str:
        so_far = _statistics(chain)
        return f"{1_000 * so_far.seconds / so_far.executions:.2f} ms" if so_far.executions else "-"

    @admin.display(description="last executed", ordering="statistics__last_executed_at")
    def last_executed(self, chain: RuleChain) -> str:
        return _short(_statistics(chain).last_executed_at)

    @admin.display(description="last error", ordering="statistics__last_failed_at")
    def last_error(self, chain: RuleChain) -> str:
        so_far = _statistics(chain)
        return f"{_short(so_far.last_failed_at)}: {so_far.last_error}" if so_far.last_failed_at else "-"

    @admin.action(description="Switch selected chains on; a suspended one runs again", permissions=["change"])
    def switch_on(self, request: HttpRequest, queryset: QuerySet[RuleChain]) -> None:
        self._switch(request, queryset, enabled=True)

    @admin.action(description="Switch selected chains off", permissions=["change"])
    def switch_off(self, request: HttpRequest, queryset: QuerySet[RuleChain]) -> None:
        self._switch(request, queryset, enabled=False)

    @admin.action(description="Duplicate selected chains", permissions=["change"])
    def duplicate_selected(self, request: HttpRequest, queryset: QuerySet[RuleChain]) -> None:
        for chain in self.changeable(request, queryset):
            self._duplicate(request, chain)

    def _switch(self, request: HttpRequest, queryset: QuerySet[RuleChain], *, enabled: bool) -> None:
        for chain in self.changeable(request, queryset):
            try:
                editing.switch(chain, enabled=enabled, by=request.user.get_username())
            except InvalidChain as error:
                messages.error(request, f"{chain} stays off: {error}")
            else:
                messages.success(request, f"{chain} is {'on' if enabled else 'off'}.")
                for left in [] if enabled else chain_ends.left_on(chain):
                    messages.warning(request, f"{left}.")

    def _duplicate(self, request: HttpRequest, chain: RuleChain) -> RuleChain | None:
        try:
            copy = editing.duplicate(chain)
        except InvalidChain as error:
            messages.error(request, f"{chain} cannot be copied: {error}")
            return None
        messages.success(request, f"{copy} was made; it is switched off.")
        return copy

    # Pages of one chain

    def get_urls(self) -> list[Any]:
        pages = [
            ("run", require_POST(self.run_view)),
            ("duplicate", require_POST(self.duplicate_view)),
            ("try", self.try_view),
            ("export", self.export_view),
        ]
        own = [
            path(f"<int:pk>/{name}/", self.admin_site.admin_view(view), name=f"rules_rulechain_{name}")
            for name, view in pages
        ]
        return [*own, *super().get_urls()]

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> HttpResponse:
        chain = kwargs.get("obj")
        if chain is not None:
            may = self.has_change_permission(request, chain)
            context |= {f"{name}_url": _url(name, chain) for name in ("run", "try", "export")}
            context |= {"copy_url": _url("duplicate", chain), "may_copy": may}
            context["may_run"] = may and not chain.stopped
        return super().render_change_form(request, context, *args, **kwargs)

    def run_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Runs the chain for real, as an event."""
        chain = self._chain(request, pk, to_change=True)
        if chain.stopped:
            messages.error(request, f"{chain} is not switched on.")
        else:
            try:
                event = schedules.trigger(chain, protocol="admin")
            except Overloaded as refusal:
                messages.error(request, f"{chain} was not run. {refusal.detail} Try again in {refusal.retry_after} s.")
            else:
                messages.success(request, f"{chain} runs now, as event {event.id}.")
        return HttpResponseRedirect(_url("change", chain))

    def duplicate_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        chain = self._chain(request, pk, to_change=True)
        return HttpResponseRedirect(_url("change", self._duplicate(request, chain) or chain))

    def export_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        chain = self._chain(request, pk)
        answer = JsonResponse(import_export.exported(chain), json_dumps_params={"indent": 2, "ensure_ascii": False})
        answer["Content-Disposition"] = f'attachment; filename="rule-chain-{chain.uuid}.json"'
        return answer

    def try_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """A form with what the chain reads; a POST shows what would happen."""
        chain = self._chain(request, pk)
        form, report = None, None
        try:
            form = TrialForm(chain, request.POST or None)
            report = form.report() if form.is_valid() else None
        except InvalidChain as error:
            messages.error(request, f"{chain} cannot be tried: {error}")
        except RedisError as error:
            messages.error(request, f"The latest values are not known now. {redis.explain(error)}")
        context = {
            **self.admin_site.each_context(request),
            "title": f"Try {chain}",
            "opts": self.opts,
            "chain": chain,
            "sentence": self.sentence(chain),
            "form": form,
            "report": report,
            "list_url": reverse("admin:rules_rulechain_changelist"),
            "chain_url": _url("change", chain),
        }
        return TemplateResponse(request, "admin/rules/chain_trial.html", context)

    def _chain(self, request: HttpRequest, pk: int, *, to_change: bool = False) -> RuleChain:
        chain: RuleChain = get_object_or_404(self.get_queryset(request), pk=pk)
        if not (self.has_change_permission if to_change else self.has_view_permission)(request, chain):
            raise PermissionDenied
        return chain


def _url(page: str, chain: RuleChain) -> str:
    return reverse(f"admin:rules_rulechain_{page}", args=[chain.pk])


def _short(moment: datetime | None) -> str:
    return f"{timezone.localtime(moment):%Y-%m-%d %H:%M}" if moment else "-"


def _statistics(chain: RuleChain) -> ChainStatistics:
    """Of a chain that never ran there is no row."""
    return getattr(chain, "statistics", None) or ChainStatistics()


def _placed(problem: Problem, nodes: Sequence[RuleNode]) -> str:
    """The place of a problem as people know it: by the name of the node."""
    place = _NODE_PATH.match(problem.path)
    if place is None or int(place[1]) >= len(nodes):
        return problem.path
    return f"{nodes[int(place[1])].name}: {problem.path.removeprefix(place[0]) or place[2]} {problem.value!r}"


def _without(fields: Sequence[Any], unknown: Collection[str]) -> list[Any]:
    """The fields that are known, rows of several among them."""
    left = [
        tuple(each for each in field if each not in unknown) if isinstance(field, tuple) else field for field in fields
    ]
    return [field for field in left if field and (isinstance(field, tuple) or field not in unknown)]
