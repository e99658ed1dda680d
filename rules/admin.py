"""The admin's page of rule chains with their nodes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.forms.models import BaseInlineFormSet
from django.http import HttpRequest

from devices.permissions import access_of
from devices.scoped_admin import OrganizationListFilter, ScopedAdmin, StackedInline
from rules import alarm_admin, editing, rejected_admin, validation
from rules.exceptions import InvalidChain, Problem
from rules.models import RuleChain, RuleNode

if TYPE_CHECKING:
    _NodeForm = forms.ModelForm[RuleNode]
    _NodeFormSet = BaseInlineFormSet[RuleNode, RuleChain, "NodeForm"]
else:
    _NodeForm, _NodeFormSet = forms.ModelForm, BaseInlineFormSet

__all__ = ["RuleChainAdmin", "alarm_admin", "rejected_admin"]  # Django looks for pages in this module
_NODE_PATH = re.compile(r"nodes\[(\d+)\]\.?(\w*)\.?")
_FORM_FIELDS = {"name": "name", "type": "type", "config": "config", "next": "next", "onFalse": "on_false"}


class NodeForm(_NodeForm):
    # Named here, or Django would compare it with what the page showed instead of with what is stored.
    config = forms.JSONField(widget=forms.Textarea(attrs={"rows": 5, "cols": 80, "class": "vLargeTextField"}))

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
        return self.has_changed() or self.instance.pk is None or self._is_switched_on()

    def _is_switched_on(self) -> bool:
        return self.instance.enabled and RuleChain.objects.filter(pk=self.instance.pk, enabled=False).exists()

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


class NodeInline(StackedInline):
    model = RuleNode
    form = NodeForm
    formset = NodeFormSet  # type: ignore[assignment]
    extra = 1
    fields = (("name", "type"), ("next", "on_false"), "config")


@admin.register(RuleChain)
class RuleChainAdmin(ScopedAdmin):
    """Saved through rules.editing, like every change of a chain: nodes and chain together, one version further."""

    resource = "rule-chains"
    readonly_fields = ("uuid", "version", "created_at", "updated_at")
    list_display = ("name", "organization", "enabled", "execution_type", "priority", "version", "updated_at", "uuid")
    list_filter = ("enabled", "execution_type", OrganizationListFilter)
    list_select_related = ("organization",)
    autocomplete_fields = ("organization",)
    exclude = ("cron", "timezone", "missed_runs")  # nothing runs by schedule yet
    inlines = (NodeInline,)
    actions = ("switch_on", "switch_off")

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """Nothing yet: the chain is written together with its nodes, in save_related."""

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        (formset,) = formsets
        formset.save(commit=False)  # fills in what the admin's log tells of
        nodes = [node_form.instance for node_form in formset.kept_forms()] if formset.must_be_judged() else None
        editing.save(form.instance, nodes)

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        editing.delete(obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        for chain in queryset:
            editing.delete(chain)

    @admin.action(description="Switch selected chains on", permissions=["change"])
    def switch_on(self, request: HttpRequest, queryset: QuerySet[RuleChain]) -> None:
        self._switch(request, queryset, enabled=True)

    @admin.action(description="Switch selected chains off", permissions=["change"])
    def switch_off(self, request: HttpRequest, queryset: QuerySet[RuleChain]) -> None:
        self._switch(request, queryset, enabled=False)

    def _switch(self, request: HttpRequest, queryset: QuerySet[RuleChain], *, enabled: bool) -> None:
        for chain in access_of(request).limit(queryset, "organization", resource=self.resource, verb="change"):
            chain.enabled = enabled
            try:
                editing.save(chain)
            except InvalidChain as error:
                messages.error(request, f"{chain} stays off: {error}")
            else:
                messages.success(request, f"{chain} is {'on' if enabled else 'off'}.")
