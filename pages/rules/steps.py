"""The form of any chain, step by step: each asks something, calculates or does something, and names the step that follows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from django import forms
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy

from pages.rules import choices
from pages.rules.choices import Choice, Choices
from pages.rules.forms import ChainForm, head_initial, put_error
from pages.rules.groups import GROUPS, Group, tree_of
from pages.rules.rows import ActionForm, ConditionForm, action_initial, condition_initial
from rules.engine.conditions import MAX_DEPTH
from rules.engine.exceptions import Problem
from rules.models import RuleChain, RuleNode

PREFIX = "steps"
MAXIMUM_STEPS = 100
FILTER, TRANSFORM, ACTION = (
    kind.value for kind in (RuleNode.Type.FILTER, RuleNode.Type.TRANSFORM, RuleNode.Type.ACTION)
)
KINDS = (
    (FILTER, lazy("ask whether something is so")),
    (TRANSFORM, lazy("calculate")),
    (ACTION, lazy("do something")),
)
OPERATIONS = (
    ("add", lazy("plus")), ("subtract", lazy("minus")), ("multiply", lazy("times the number")), ("divide", lazy("divided by")),
    ("scale", lazy("times a factor, plus an offset")), ("rename", lazy("call it something else")),
    ("set", lazy("take a fixed value")),
)  # fmt: skip
# Operation -> the fields of the form that it has, by the key of the configuration.
OPERANDS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("add", "subtract", "multiply", "divide"), ("key", "value", "target")),
    "scale": ("key", "factor", "offset", "target"),
    "rename": ("key", "target"),
    "set": ("target", "value"),
}
_PATH = re.compile(r"nodes\[(\d+)\](?:\.(.*))?")
_LINKS = {
    "next": "next",
    "onFalse": "on_false",
    "on_false": "on_false",
    "onFailure": "on_failure",
    "on_failure": "on_failure",
}


class TransformForm(forms.Form):
    """One calculation with a value of the event."""

    operation = forms.ChoiceField(choices=OPERATIONS, label=lazy("What to calculate"))
    key = forms.CharField(required=False, max_length=100, label=lazy("Value that was reported, such as ph"))
    value = forms.CharField(required=False, max_length=200, label=lazy("Number, or fixed value"))
    factor = forms.CharField(required=False, max_length=50, label=lazy("Factor"))
    offset = forms.CharField(required=False, max_length=50, label=lazy("Offset"))
    target = forms.CharField(required=False, max_length=100, label=lazy("What the result is called"))

    @property
    def config(self) -> dict[str, Any]:
        data = self.cleaned_data
        found: dict[str, Any] = {"operation": data["operation"]}
        for name in OPERANDS[data["operation"]]:
            if data[name]:
                found[name] = data[name] if name in ("key", "target") else _scalar(data[name])
        return found


def _scalar(text: str) -> Any:
    return {"true": True, "false": False}.get(text.strip().lower(), choices.as_number(text))


def transform_initial(config: Mapping[str, Any]) -> dict[str, Any] | None:
    operation = config.get("operation")
    if not isinstance(operation, str) or config.keys() - {"operation", *OPERANDS.get(operation, ())}:
        return None
    texts = {name: str(each).lower() if isinstance(each, bool) else str(each) for name, each in config.items()}
    kept = all(_scalar(texts[name]) == config[name] for name in ("value", "factor", "offset") if name in config)
    return texts if kept else None


class StepForm(forms.Form):
    """One node: its name, what it does, and where it goes from there."""

    name = forms.CharField(max_length=100, label=lazy("Name of the step"))
    kind = forms.ChoiceField(choices=KINDS, label=lazy("What it does"))
    structure = forms.CharField(required=False, widget=forms.HiddenInput)
    next = forms.CharField(required=False, max_length=100, label=lazy("Then go to"))
    on_false = forms.CharField(required=False, max_length=100, label=lazy("If it is not so, go to"))
    on_failure = forms.CharField(required=False, max_length=100, label=lazy("If it fails, go to"))

    def __init__(
        self, data: Any = None, *, offered: Choices, prefix: str, initial: Mapping[str, Any] | None = None
    ) -> None:
        initial = dict(initial or {})
        super().__init__(data, prefix=prefix, initial=initial)
        self._offered = offered
        for name in ("next", "on_false", "on_failure"):
            self.fields[name].widget.attrs["data-list"] = "steps"
        self.action = ActionForm(data, prefix=f"{prefix}-action", initial=initial.get(ACTION), offered=offered)
        self.transform = TransformForm(data, prefix=f"{prefix}-transform", initial=initial.get(TRANSFORM))
        self.is_readable = True
        self.group = (
            self._sent() if data is not None else self._shown(initial.get(FILTER, {"type": "AND", "expressions": [{}]}))
        )
        if data is None:
            self.initial["structure"] = json.dumps(self.group.structure)

    def _row(self, number: int | str, **options: Any) -> ConditionForm:
        return ConditionForm(prefix=f"{self.prefix}-row-{number}", offered=self._offered, **options)

    def _sent(self) -> Group:
        try:
            structure = json.loads(self.data.get(f"{self.prefix}-structure") or "{}")
            return tree_of(structure, lambda number: self._row(number, data=self.data))
        except (ValueError, RecursionError):
            self.is_readable = False
            return Group()

    def _shown(self, tree: Mapping[str, Any], numbers: Iterator[int] | None = None) -> Group:
        """From initial values of conditions in groups."""
        numbers = numbers or iter(range(10_000))
        found = Group(tree.get("type", "AND"))
        for part in tree["expressions"]:
            is_group = "expressions" in part
            found.parts.append(self._shown(part, numbers) if is_group else self._row(next(numbers), initial=part))
        return found

    @property
    def empty_row(self) -> ConditionForm:
        """For the script, which puts a number in the place of __row__."""
        return self._row("__row__")

    @property
    def parts(self) -> Sequence[forms.Form]:
        """The forms of what it does."""
        kind = self["kind"].value()
        if kind == FILTER:
            return tuple(self.group.rows)
        return (self.transform,) if kind == TRANSFORM else (self.action,)

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        if data.get("kind") == FILTER and not self.group.parts:
            text = (
                _("add a condition") if self.is_readable else _("the conditions did not come whole: load the page anew")
            )
            self.add_error("kind", text)
        return data

    def node(self) -> RuleNode:
        """Only of valid forms."""
        data = self.cleaned_data
        kind = data["kind"]
        made: Any = {FILTER: self.group, TRANSFORM: self.transform, ACTION: self.action}[kind]
        node = RuleNode(name=data["name"].strip(), type=kind, config=made.config, next=data["next"].strip())
        if kind == FILTER:
            node.on_false = data["on_false"].strip()
        else:
            node.on_failure = data["on_failure"].strip()
        return node

    def put(self, where: str, message: str) -> None:
        """A problem with the rest of its path: name, next, config.factor, config.expressions[0].value."""
        if where in _LINKS or where == "name":
            self.add_error(_LINKS.get(where, where), message)
            return
        inside = [int(each) for each in re.findall(r"expressions\[(\d+)\]", where)]
        key = where.rsplit(".", 1)[-1].split("[", maxsplit=1)[0]
        part: Any = self.group.at(inside) if self["kind"].value() == FILTER else self.parts[0]
        if isinstance(part, forms.Form):
            put_error(part, key, message)
        else:
            self.add_error("kind", message)


class StepsForm(ChainForm):
    """The head and all steps of a chain."""

    template = "pages/rules/steps.html"

    def __init__(
        self, offered: Choices, chain: RuleChain, *, data: Any = None, initial: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(chain, data=data, initial=initial)
        self._offered = offered
        if data is None:
            shown = (initial or {}).get(PREFIX) or [{"name": _("first step"), "kind": FILTER}]
            self.steps = [self._step(number, initial=each) for number, each in enumerate(shown)]
        else:
            count = choices.as_number(data.get(f"{PREFIX}-count", ""))
            total = min(count, MAXIMUM_STEPS) if isinstance(count, int) else 0
            gone = {number for number in range(total) if data.get(f"{PREFIX}-{number}-gone")}
            self.steps = [self._step(number, data=data) for number in range(total) if number not in gone]
        self.count = len(self.steps) if data is None else total

    def _step(self, number: int | str, **options: Any) -> StepForm:
        return StepForm(prefix=f"{PREFIX}-{number}", offered=self._offered, **options)

    @property
    def empty_step(self) -> StepForm:
        return self._step("__step__", initial={"kind": ACTION})

    @property
    def parts(self) -> Sequence[Any]:
        return (self.head, *(part for step in self.steps for part in (step, *step.parts)))

    def _nodes(self, before: Sequence[RuleNode]) -> list[RuleNode] | None:
        nodes = [step.node() for step in self.steps]
        if not nodes:
            self.problems.append(_("Add a step."))
            return None
        known = {node.name: node.uuid for node in before}
        for node in nodes:
            node.uuid = known.get(node.name, node.uuid)
        return nodes

    def in_words(self, warnings: Iterable[Problem]) -> list[str]:
        found = []
        for problem in warnings:
            step, _where = self._place(problem.path)
            found.append(f"{step.cleaned_data['name']}: {problem.message}" if step else problem.message)
        return list(dict.fromkeys(found))

    def _put(self, problem: Problem) -> bool:
        step, where = self._place(problem.path)
        if step is not None:
            step.put(where, problem.message)
        return step is not None

    def _place(self, path: str) -> tuple[StepForm | None, str]:
        match = _PATH.fullmatch(path)
        number = int(match[1]) if match else len(self.steps)
        return (self.steps[number], match[2] or "") if match and number < len(self.steps) else (None, "")


def initial_of(chain: RuleChain, nodes: Sequence[RuleNode], offered: Choices | None = None) -> dict[str, Any] | None:
    """What the form shows of a chain; None when a node says something that it has no field for, or there are too many.

    `offered` has the units.
    """
    sources: Mapping[str, Choice] = offered.sources if offered else {}
    steps = [_step_initial(node, sources) for node in nodes]
    if not nodes or len(nodes) > MAXIMUM_STEPS or None in steps:
        return None
    return {"head": head_initial(chain), PREFIX: steps}


def _step_initial(node: RuleNode, sources: Mapping[str, Choice]) -> dict[str, Any] | None:
    if not isinstance(node.config, dict) or (node.type == FILTER and node.on_failure):
        return None
    made: Any
    if node.type == FILTER:
        made = _tree_initial(node.config, sources)
        made = made if made is None or "expressions" in made else {"type": "AND", "expressions": [made]}
    else:
        made = transform_initial(node.config) if node.type == TRANSFORM else action_initial(node.config)
    if made is None:
        return None
    links = {"next": node.next, "on_false": node.on_false, "on_failure": node.on_failure}
    return {"name": node.name, "kind": node.type, node.type: made, **links}


def _tree_initial(config: object, sources: Mapping[str, Choice], depth: int = 0) -> dict[str, Any] | None:
    if not isinstance(config, dict) or depth > MAX_DEPTH:
        return None
    parts = config.get("expressions")
    if parts is None:
        return condition_initial(config, together=False, sources=sources)
    if not isinstance(parts, list) or config.get("type") not in dict(GROUPS):
        return None
    found = [_tree_initial(part, sources, depth + 1) for part in parts]
    return None if None in found else {"type": config["type"], "expressions": found}
