"""The form of a rule: when these conditions hold, do this; otherwise, do that. No JSON in sight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from django import forms
from django.utils import timezone

from pages.rules import choices, times
from pages.rules.choices import Choices
from rules.authoring import editing, validation
from rules.authoring.when_then import OTHERWISE, THEN, WHEN, Place, WhenThen
from rules.engine.actions import ROLES, SEVERITIES
from rules.engine.exceptions import Problem
from rules.models import RuleChain, RuleNode
from rules.processing import schedules

MAXIMUM_ROWS = 50
ALL, ANY = "all", "any"
MEASURES = (
    ("", "the value"),
    ("per", "its change in"),
    ("increase", "its growth in"),
    ("median", "the median of its newest"),
)
KINDS = (
    ("device_command", "switch a device"),
    ("notify", "notify people"),
    ("raise_alarm", "raise an alarm"),
    ("clear_alarm", "end an alarm"),
)
EXECUTION_TYPES = (
    (RuleChain.ExecutionType.EVENT_TRIGGERED, "whenever a new value is reported"),
    (RuleChain.ExecutionType.SCHEDULE_ONLY, "at certain times"),
    (RuleChain.ExecutionType.HYBRID, "both"),
)
# Key of a configuration -> field of the form that shows it, where they differ.
_FIELDS = {
    "UUID": "source", "sourceType": "source", "key": "source", "for": "lasting", "per": "measure_of", "increase": "measure_of",
    "median": "measure_of", "releaseAt": "release", "off": "release", "deviceUuid": "target", "stateName": "target",
    "type": "kind",
}  # fmt: skip
_LEAF_KEYS = frozenset(
    ("sourceType", "UUID", "key", "operator", "value", "duration", "for", "times", "within", "releaseAt", "off", "per",
     "increase", "median")
)  # fmt: skip
_ACTION_KEYS: Mapping[str, frozenset[str]] = {
    "device_command": frozenset(("type", "deviceUuid", "stateName", "value", "force", "cooldown")),
    "notify": frozenset(("type", "title", "message", "severity", "audience", "cooldown")),
    "raise_alarm": frozenset(("type", "alarm", "severity", "message", "cooldown")),
    "clear_alarm": frozenset(("type", "alarm", "cooldown")),
}


def _offered_in(name: str) -> forms.TextInput:
    """The script of the page makes a list of it: once on the page, not once a row, because a farm may have thousands."""
    return forms.TextInput(attrs={"data-list": name})


class ConditionForm(forms.Form):
    """One comparison; `together` with the one above it, or on its own."""

    together = forms.BooleanField(required=False)
    source = forms.CharField(
        widget=_offered_in("sources"), label="Which value", error_messages={"required": "choose a value"}
    )
    measure = forms.ChoiceField(choices=MEASURES, required=False, label="What of it")
    measure_of = forms.CharField(required=False, max_length=20, label="In what time, or of how many")
    operator = forms.ChoiceField(choices=choices.operators, label="Comparison")
    value = forms.CharField(required=False, max_length=500, label="Value")
    upper = forms.CharField(required=False, max_length=50, label="and")
    duration = forms.CharField(required=False, max_length=20, label="Time")
    lasting = forms.CharField(required=False, max_length=20, label="for at least")
    release = forms.CharField(required=False, max_length=20, label="until it is beyond")
    times = forms.CharField(required=False, max_length=5, label="times")
    within = forms.CharField(required=False, max_length=20, label="within")

    def __init__(self, *args: Any, offered: Choices, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offered = offered

    def clean_source(self) -> str:
        key: str = self.cleaned_data["source"]
        if key not in self._offered.sources:
            raise forms.ValidationError("is no value of this farm any more: choose another")
        return key

    @property
    def config(self) -> dict[str, Any]:
        """The leaf; only of a valid form."""
        data = self.cleaned_data
        source_type, uuid, key = data["source"].split("|", 2)
        operator = data["operator"]
        leaf: dict[str, Any] = {"sourceType": source_type, "UUID": uuid, "key": key, "operator": operator}
        needed = choices.operands()[operator]
        if "value" in needed:
            source = self._offered.sources[data["source"]]
            leaf["value"] = choices.operand_of(operator, source, data["value"], data["upper"])
        if "duration" in needed:
            leaf["duration"] = choices.as_duration(data["duration"])
        if measure := data["measure"]:
            of = data["measure_of"]
            leaf[measure] = choices.as_number(of) if measure == "median" else choices.as_duration(of)
        for name, field, read in (
            ("for", "lasting", choices.as_duration),
            ("releaseAt", "release", choices.as_number),
            ("times", "times", choices.as_number),
            ("within", "within", choices.as_duration),
        ):
            if data[field]:
                leaf[name] = read(data[field])
        return leaf


def condition_initial(leaf: Mapping[str, Any], *, together: bool) -> dict[str, Any] | None:
    """What the form shows of a leaf; None when it says more than the form has fields for."""
    if leaf.keys() - _LEAF_KEYS:
        return None
    value, upper = leaf.get("value"), None
    if leaf.get("operator") == "between" and isinstance(value, list) and len(value) == 2:
        value, upper = value
    measure = next((key for key in ("per", "increase", "median") if key in leaf), "")
    texts = {"value": value, "upper": upper, "measure_of": leaf.get(measure), "duration": leaf.get("duration")}
    texts |= {"lasting": leaf.get("for"), "release": leaf.get("releaseAt", leaf.get("off"))}
    texts |= {"times": leaf.get("times"), "within": leaf.get("within")}
    return {
        "together": together,
        "source": f"{leaf.get('sourceType')}|{str(leaf.get('UUID')).lower()}|{leaf.get('key')}",
        "operator": leaf.get("operator"),
        "measure": measure,
        **{name: choices.as_text(each) for name, each in texts.items()},
    }


class ActionForm(forms.Form):
    """One thing to do."""

    kind = forms.ChoiceField(choices=KINDS, label="What to do")
    target = forms.CharField(required=False, widget=_offered_in("states"), label="Device")
    value = forms.CharField(required=False, max_length=200, label="to")
    force = forms.BooleanField(required=False, label="also when it is so already")
    title = forms.CharField(required=False, max_length=200, label="Title")
    alarm = forms.CharField(required=False, max_length=100, label="Name of the alarm")
    message = forms.CharField(required=False, max_length=500, label="Text")
    severity = forms.ChoiceField(choices=[(each, each) for each in SEVERITIES], required=False, label="How urgent")
    audience = forms.MultipleChoiceField(
        choices=[(each, each + "s") for each in ROLES],
        required=False,
        widget=forms.CheckboxSelectMultiple,
        label="Only for",
    )
    cooldown = forms.CharField(required=False, max_length=20, label="at most once in")

    def __init__(self, *args: Any, offered: Choices, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offered = offered

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        kind = data.get("kind")
        if kind == "device_command" and data.get("target") not in self._offered.states:
            self.add_error("target", "choose a device")
        if kind in ("raise_alarm", "clear_alarm") and not data.get("alarm"):
            self.add_error("alarm", "give the alarm a name")
        if kind == "notify" and not (data.get("title") or data.get("message")):
            self.add_error("message", "say what people are told")
        return data

    @property
    def config(self) -> dict[str, Any]:
        """The action; only of a valid form."""
        data = self.cleaned_data
        kind = data["kind"]
        found: dict[str, Any] = {"type": kind}
        if kind == "device_command":
            _, device, state = data["target"].split("|", 2)
            value = self._offered.states[data["target"]].typed(data["value"])
            found |= {"deviceUuid": device, "stateName": state, "value": value}
            if data["force"]:
                found["force"] = True
        for name in _ACTION_KEYS[kind] & {"title", "message", "severity", "audience", "alarm"}:
            if data[name]:
                found[name] = data[name]
        if kind == "notify":
            found.setdefault("title", self._short(found["message"]))
            found.setdefault("message", found["title"])
        if data["cooldown"]:
            found["cooldown"] = choices.as_duration(data["cooldown"])
        return found

    @staticmethod
    def _short(message: str) -> str:
        return message if len(message) <= 200 else message[:199] + "…"


def action_initial(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the form shows of an action; None when it says more than the form has fields for."""
    kind = config.get("type")
    if not isinstance(kind, str) or kind not in _ACTION_KEYS or config.keys() - _ACTION_KEYS[kind]:
        return None
    texts = {name: choices.as_text(config.get(name)) for name in ("title", "alarm", "message", "severity", "cooldown")}
    return {
        "kind": kind,
        "target": f"device|{str(config['deviceUuid']).lower()}|{config.get('stateName')}"
        if "deviceUuid" in config
        else "",
        "value": choices.as_text(config.get("value")),
        "force": bool(config.get("force")),
        "audience": config.get("audience", []),
        **texts,
    }


class HeadForm(forms.Form):
    """The name of the rule, and when it runs."""

    name = forms.CharField(max_length=editing.MAXIMUM_NAME_LENGTH, label="Name of the rule")
    execution_type = forms.ChoiceField(choices=EXECUTION_TYPES, widget=forms.RadioSelect, label="Check")
    times = forms.CharField(required=False, max_length=100, label="Times", help_text=f"such as {times.EXAMPLE}")
    weekdays = forms.MultipleChoiceField(
        choices=choices.WEEKDAYS, required=False, widget=forms.CheckboxSelectMultiple, label="Days (none: every day)"
    )
    timezone = forms.CharField(required=False, max_length=63, label="Time zone")
    needed = forms.ChoiceField(
        choices=((ALL, "all of these"), (ANY, "any of these")), required=False, label="How many must be true"
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
            self.problems.append("Say what is to be done: add an action.")
            return None
        if not rule.groups and self.chain.execution_type == RuleChain.ExecutionType.EVENT_TRIGGERED:
            self.problems.append("Say when it is to be done: add a condition, or choose times.")
            return None
        if not rule.groups and rule.otherwise:
            self.problems.append(
                "Without a condition there is no otherwise: take those actions away, or add a condition."
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
        rows = {WHEN: "Condition", THEN: "Then", OTHERWISE: "Otherwise"}
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


def initial_of(chain: RuleChain, rule: WhenThen) -> dict[str, Any] | None:
    """What the form shows of a chain; None when it says more than the form has fields for."""
    shown, weekdays = times.as_times(chain.cron)
    conditions = [
        condition_initial(leaf, together=number > 0) for group in rule.groups for number, leaf in enumerate(group)
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
