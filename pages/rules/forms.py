"""The form of a rule: when these conditions hold, do this; otherwise, do that. No JSON in sight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from django import forms
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy

from pages.rules import choices, times
from pages.rules.choices import Choice, Choices
from pages.rules.rows import ActionForm, ConditionForm, action_initial, condition_initial
from rules.authoring import editing, validation
from rules.authoring.when_then import OTHERWISE, THEN, WHEN, Place, WhenThen
from rules.engine.exceptions import Problem
from rules.models import RuleChain, RuleNode
from rules.processing import schedules

MAXIMUM_ROWS = 50
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
    "type": "kind",
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

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        data["cron"] = ""
        if data.get("execution_type") != RuleChain.ExecutionType.EVENT_TRIGGERED:
            try:
                data["cron"] = times.as_cron(data.get("times", ""), data.get("weekdays", []))
            except ValueError as error:
                self.add_error("times", str(error))
        return data


class RuleForm:
    """The head, the conditions and the actions of one rule, as one form."""

    def __init__(
        self, offered: Choices, chain: RuleChain, *, data: Any = None, initial: Mapping[str, Any] | None = None
    ) -> None:
        self.chain = chain
        self.problems: list[str] = []
        initial = initial or {}
        self.head = HeadForm(data, initial=initial.get("head"))
        options = {"form_kwargs": {"offered": offered}}
        self.conditions = _Conditions(data, prefix=WHEN, initial=initial.get(WHEN, []), **options)
        self.then = _Actions(data, prefix=THEN, initial=initial.get(THEN, []), **options)
        self.otherwise = _Actions(data, prefix=OTHERWISE, initial=initial.get(OTHERWISE, []), **options)

    def build(self, before: Sequence[RuleNode] = ()) -> list[RuleNode] | None:
        """The nodes, with the chain's fields set; None, and the fields say why, when something is wrong. Nothing is saved."""
        parts = (self.conditions, self.then, self.otherwise)
        if not all([self.head.is_valid(), *(part.is_valid() for part in parts)]):
            return None
        rule = self._rule()
        if not rule.then and not rule.otherwise:
            self.problems.append(_("Say what is to be done: add an action."))
            return None
        if not rule.groups and self.chain.execution_type == RuleChain.ExecutionType.EVENT_TRIGGERED:
            self.problems.append(_("Say when it is to be done: add a condition, or choose times."))
            return None
        if not rule.groups and rule.otherwise:
            self.problems.append(
                _("Without a condition there is no otherwise: take those actions away, or add a condition.")
            )
            return None
        nodes = rule.nodes(before)
        problems = validation.problems_of(self.chain, nodes)
        self.explain(rule, [*schedules.problems_of(self.chain), *problems])
        return None if problems or self.head.errors else nodes

    def explain(self, rule: WhenThen, problems: Iterable[Problem]) -> None:
        """Puts each problem where it belongs."""
        for problem in problems:
            place = rule.place_of(problem.path)
            if place is None or not self._put(place, problem.message):
                field = {"name": "name", "cron": "times", "timezone": "timezone"}.get(problem.path)
                if field:
                    self.head.add_error(field, problem.message)
                else:
                    self.problems.append(f"{problem.path}: {problem.message}")

    def in_words(self, problems: Iterable[Problem]) -> list[str]:
        """Each with the row that it is about; only after `build`."""
        rule = self._rule()
        rows = {WHEN: _("Condition"), THEN: _("Then"), OTHERWISE: _("Otherwise")}
        found = [(rule.place_of(problem.path), problem.message) for problem in problems]
        texts = (f"{rows[place.part]} {place.position + 1}: {text}" if place else text for place, text in found)
        return list(dict.fromkeys(texts))

    def _put(self, place: Place, message: str) -> bool:
        rows = {WHEN: self.conditions, THEN: self.then, OTHERWISE: self.otherwise}[place.part].rows
        if place.position >= len(rows):
            return False
        row = rows[place.position]
        field = _FIELDS.get(place.key, place.key)
        row.add_error(field if field in row.fields else None, message)
        return True

    def _rule(self) -> WhenThen:
        head = self.head.cleaned_data
        chain = self.chain
        chain.name, chain.execution_type, chain.cron = head["name"], head["execution_type"], head["cron"]
        if head["timezone"]:
            chain.timezone = head["timezone"]
        groups: list[list[dict[str, Any]]] = []
        for row in self.conditions.rows:
            if row.cleaned_data["together"] and groups:
                groups[-1].append(row.config)
            else:
                groups.append([row.config])
        return WhenThen(
            groups=groups,
            any_group=head["needed"] == ANY,
            then=[row.config for row in self.then.rows],
            otherwise=[row.config for row in self.otherwise.rows],
        )

    def next_runs(self, count: int = 5) -> list[datetime]:
        """Of a valid form with a schedule."""
        schedule, at = self.chain.schedule, timezone.now()
        found: list[datetime] = []
        while schedule and len(found) < count and (at_next := schedule.next_after(at)):
            at = at_next
            found.append(at)
        return found


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
    "validate_max": True,
}
_Conditions: Any = forms.formset_factory(ConditionForm, **_OPTIONS)
_Actions: Any = forms.formset_factory(ActionForm, **_OPTIONS)


def initial_of(chain: RuleChain, rule: WhenThen, offered: Choices | None = None) -> dict[str, Any] | None:
    """What the form shows of a chain; None when it says more than the form has fields for. `offered` has the units."""
    sources: Mapping[str, Choice] = offered.sources if offered else {}
    shown, weekdays = times.as_times(chain.cron)
    conditions = [
        condition_initial(leaf, together=number > 0, sources=sources)
        for group in rule.groups
        for number, leaf in enumerate(group)
    ]
    then, otherwise = ([action_initial(each) for each in actions] for actions in (rule.then, rule.otherwise))
    if None in (*conditions, *then, *otherwise):
        return None
    head = {
        "name": chain.name,
        "execution_type": chain.execution_type,
        "times": shown,
        "weekdays": weekdays,
        "timezone": chain.timezone,
        "needed": ANY if rule.any_group else ALL,
    }
    return {"head": head, WHEN: conditions, THEN: then, OTHERWISE: otherwise}
