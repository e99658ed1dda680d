"""The form of a rule: when these conditions hold, do this; otherwise, do that. No JSON in sight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from django import forms
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy

from pages.rules import choices, problems, times
from pages.rules.choices import Choice, Choices
from pages.rules.rows import ActionForm, ConditionForm, action_initial, condition_initial
from rules.authoring import editing, validation
from rules.authoring.when_then import OTHERWISE, THEN, WHEN, WhenThen
from rules.engine.exceptions import Problem
from rules.models import RuleChain, RuleNode
from rules.processing import schedules

MAXIMUM_ROWS = 50
# Fields of the chain that the head shows under their own names.
_OF_CHAIN = ("priority", "max_retries", "late_events", "missed_runs")
ALL, ANY = "all", "any"
EXECUTION_TYPES = (
    (RuleChain.ExecutionType.EVENT_TRIGGERED, lazy("whenever a new value is reported")),
    (RuleChain.ExecutionType.SCHEDULE_ONLY, lazy("at certain times")),
    (RuleChain.ExecutionType.HYBRID, lazy("both")),
)
# Key of a configuration -> field of the form that shows it, where they differ.
_FIELDS = {
    "UUID": "source", "sourceType": "source", "key": "source", "for": "lasting", "per": "measure_of", "increase": "measure_of",
    "median": "measure_of", "releaseAt": "release", "off": "release", "deviceUuid": "target", "stateName": "target",
    "type": "kind", "valueFrom": "value_from",
}  # fmt: skip


class HeadForm(forms.Form):
    """The name of the rule, and when it runs."""

    name = forms.CharField(max_length=editing.MAXIMUM_NAME_LENGTH, label=lazy("Name of the rule"))
    execution_type = forms.ChoiceField(choices=EXECUTION_TYPES, widget=forms.RadioSelect, label=lazy("Check"))
    times = forms.CharField(required=False, max_length=100, label=lazy("Times"), help_text=times.EXAMPLE_TEXT)
    weekdays = forms.MultipleChoiceField(
        choices=choices.WEEKDAYS,
        required=False,
        widget=forms.CheckboxSelectMultiple,
        label=lazy("Days (none: every day)"),
    )
    timezone = forms.CharField(required=False, max_length=63, label=lazy("Time zone"))
    needed = forms.ChoiceField(
        choices=((ALL, lazy("all of these")), (ANY, lazy("any of these"))),
        required=False,
        label=lazy("How many must be true"),
    )

    priority = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=1_000,
        label=lazy("Priority: of rules that one value triggers, 1 runs first"),
    )
    max_retries = forms.IntegerField(
        required=False, min_value=0, max_value=100, label=lazy("More attempts after a failure")
    )
    late_events = forms.ChoiceField(
        required=False,
        choices=(
            (RuleChain.LateEvents.HISTORY, lazy("do not run")),
            (RuleChain.LateEvents.RUN, lazy("run all the same")),
        ),
        label=lazy("When a reading comes late"),
    )
    missed_runs = forms.ChoiceField(
        required=False,
        choices=((RuleChain.MissedRuns.ONCE, lazy("run once, late")), (RuleChain.MissedRuns.SKIP, lazy("leave out"))),
        label=lazy("Times at which the system was away"),
    )

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        data["cron"] = ""
        if data.get("execution_type") != RuleChain.ExecutionType.EVENT_TRIGGERED:
            try:
                data["cron"] = times.as_cron(data.get("times", ""), data.get("weekdays", []))
            except ValueError as error:
                self.add_error("times", str(error))
        return data


class ChainForm(ABC):
    """What every form of a chain has: its head, problems that belong to no field, and how nodes come of it."""

    # Which template shows it.
    template = ""

    def __init__(self, chain: RuleChain, *, data: Any, initial: Mapping[str, Any] | None) -> None:
        self.chain = chain
        self.problems: list[str] = []
        own = {name: getattr(chain, name) for name in _OF_CHAIN}
        self.head = HeadForm(data, initial={**own, **(initial or {}).get("head", {})})

    def build(self, before: Sequence[RuleNode] = ()) -> list[RuleNode] | None:
        """The nodes, with the chain's fields set; None, and the fields say why, when something is wrong. Nothing is saved."""
        valid = [part.is_valid() for part in self.parts]  # each of them, so that all that is wrong is shown at once
        if not all(valid):
            return None
        self._fill_chain()
        nodes = self._nodes(before)
        if nodes is None:
            return None
        found = [*schedules.problems_of(self.chain), *validation.problems_of(self.chain, nodes)]
        for problem in found:
            self._explain(problem)
        return None if found or self.head.errors else nodes

    @property
    @abstractmethod
    def parts(self) -> Sequence[Any]:
        """All forms that make it up, as far as they count."""

    @abstractmethod
    def _nodes(self, before: Sequence[RuleNode]) -> list[RuleNode] | None:
        """Of valid forms; None, and `problems` say why, when something is missing."""

    @abstractmethod
    def _put(self, problem: Problem) -> bool:
        """At the field that it is about, if there is one."""

    @abstractmethod
    def in_words(self, warnings: Iterable[Problem]) -> list[str]:
        """Each with the part that it is about; only after `build`."""

    def _explain(self, problem: Problem) -> None:
        told = replace(problem, message=problems.translated(problem.message))
        field = {"name": "name", "cron": "times", "timezone": "timezone"}.get(told.path)
        if field:
            self.head.add_error(field, told.message)
        elif not self._put(told):
            self.problems.append(problems.with_place(problem))

    def _fill_chain(self) -> None:
        head, chain = self.head.cleaned_data, self.chain
        chain.name, chain.execution_type, chain.cron = head["name"], head["execution_type"], head["cron"]
        for name in ("timezone", *_OF_CHAIN):
            if head[name] not in (None, ""):
                setattr(chain, name, head[name])

    def next_runs(self, count: int = 5) -> list[datetime]:
        """Of a valid form with a schedule."""
        schedule, at = self.chain.schedule, timezone.now()
        found: list[datetime] = []
        while schedule and len(found) < count and (at_next := schedule.next_after(at)):
            at = at_next
            found.append(at)
        return found


def put_error(form: forms.Form, key: str, message: str) -> None:
    """At the field that shows this key of a configuration, or at the form."""
    field = _FIELDS.get(key, key)
    form.add_error(field if field in form.fields else None, message)


class RuleForm(ChainForm):
    """The head, the conditions and the actions of one rule, as one form."""

    template = "pages/rules/when_then.html"

    def __init__(
        self, offered: Choices, chain: RuleChain, *, data: Any = None, initial: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(chain, data=data, initial=initial)
        initial = initial or {}
        options = {"form_kwargs": {"offered": offered}}
        self.conditions = _Conditions(data, prefix=WHEN, initial=initial.get(WHEN, []), **options)
        self.then = _Actions(data, prefix=THEN, initial=initial.get(THEN, []), **options)
        self.otherwise = _Actions(data, prefix=OTHERWISE, initial=initial.get(OTHERWISE, []), **options)
        self._rule: WhenThen | None = None

    @property
    def parts(self) -> Sequence[Any]:
        rows = (*self.conditions.rows, *self.then.rows, *self.otherwise.rows)
        return (self.head, self.conditions, self.then, self.otherwise, *rows)

    def _nodes(self, before: Sequence[RuleNode]) -> list[RuleNode] | None:
        self._rule = rule = self._read()
        if not rule.then and not rule.otherwise:
            self.problems.append(_("Say what is to be done: add an action."))
        elif not rule.groups and self.chain.execution_type == RuleChain.ExecutionType.EVENT_TRIGGERED:
            self.problems.append(_("Say when it is to be done: add a condition, or choose times."))
        elif not rule.groups and rule.otherwise:
            self.problems.append(
                _("Without a condition there is no otherwise: take those actions away, or add a condition.")
            )
        return None if self.problems else rule.nodes(before)

    def in_words(self, warnings: Iterable[Problem]) -> list[str]:
        rows = {WHEN: _("Condition"), THEN: _("Then"), OTHERWISE: _("Otherwise")}
        found = [(self._rule and self._rule.place_of(problem.path), problem.message) for problem in warnings]
        texts = (f"{rows[place.part]} {place.position + 1}: {text}" if place else text for place, text in found)
        return list(dict.fromkeys(texts))

    def _put(self, problem: Problem) -> bool:
        place = self._rule and self._rule.place_of(problem.path)
        if not place:
            return False
        rows = {WHEN: self.conditions, THEN: self.then, OTHERWISE: self.otherwise}[place.part].rows
        if place.position >= len(rows):
            return False
        put_error(rows[place.position], place.key, problem.message)
        return True

    def _read(self) -> WhenThen:
        groups: list[list[dict[str, Any]]] = []
        for row in self.conditions.rows:
            if row.cleaned_data["together"] and groups:
                groups[-1].append(row.config)
            else:
                groups.append([row.config])
        return WhenThen(
            groups=groups,
            any_group=self.head.cleaned_data["needed"] == ANY,
            then=[row.config for row in self.then.rows],
            otherwise=[row.config for row in self.otherwise.rows],
        )


class _Rows(forms.BaseFormSet):  # type: ignore[type-arg]  # not subscriptable at run time
    """Rows without those that were taken away."""

    def add_fields(self, form: forms.Form, index: int | None) -> None:
        super().add_fields(form, index)
        form.empty_permitted = False

    @property
    def rows(self) -> list[Any]:
        deleted = self.deleted_forms if self.is_bound else []
        return [form for form in self.forms if form not in deleted]


_OPTIONS: dict[str, Any] = {
    "formset": _Rows,
    "extra": 0,
    "can_delete": True,
    "max_num": MAXIMUM_ROWS,
    "absolute_max": MAXIMUM_ROWS,
    "validate_max": True,
}
_Conditions: Any = forms.formset_factory(ConditionForm, **_OPTIONS)
_Actions: Any = forms.formset_factory(ActionForm, **_OPTIONS)


def initial_of(chain: RuleChain, rule: WhenThen, offered: Choices | None = None) -> dict[str, Any] | None:
    """What the form shows of a chain; None when it says more than the form has fields for. `offered` has the units."""
    sources: Mapping[str, Choice] = offered.sources if offered else {}
    conditions = [
        condition_initial(leaf, together=number > 0, sources=sources)
        for group in rule.groups
        for number, leaf in enumerate(group)
    ]
    then, otherwise = ([action_initial(each) for each in actions] for actions in (rule.then, rule.otherwise))
    if None in (*conditions, *then, *otherwise):
        return None
    head = {**head_initial(chain), "needed": ANY if rule.any_group else ALL}
    return {"head": head, WHEN: conditions, THEN: then, OTHERWISE: otherwise}


def head_initial(chain: RuleChain) -> dict[str, Any]:
    shown, weekdays = times.as_times(chain.cron)
    return {
        "name": chain.name,
        "execution_type": chain.execution_type,
        "times": shown,
        "weekdays": weekdays,
        "timezone": chain.timezone,
    }
