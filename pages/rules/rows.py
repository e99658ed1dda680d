"""The rows of a rule's form: a condition, and something to do; each to and from its configuration in a chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django import forms
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy

from devices.units import Scale
from pages.rules import choices
from pages.rules.choices import Choice, Choices
from rules.engine.actions import ROLES, SEVERITIES

MEASURES = (
    ("", lazy("the value")),
    ("per", lazy("its change in")),
    ("increase", lazy("its growth in")),
    ("median", lazy("the median of its newest")),
)
KINDS = (
    ("device_command", lazy("switch a device")),
    ("notify", lazy("notify people")),
    ("raise_alarm", lazy("raise an alarm")),
    ("clear_alarm", lazy("end an alarm")),
)
_DIFFERENCES = frozenset({"per", "increase"})
_LEAF_KEYS = frozenset(
    ("sourceType", "UUID", "key", "operator", "value", "duration", "for", "times", "within", "releaseAt", "off", "per",
     "increase", "median")
)  # fmt: skip
_ACTION_KEYS: Mapping[str, frozenset[str]] = {
    "device_command": frozenset(("type", "deviceUuid", "stateName", "value", "valueFrom", "force", "cooldown")),
    "notify": frozenset(("type", "title", "message", "severity", "audience", "deviceUuid", "cooldown")),
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
        widget=_offered_in("sources"),
        label=lazy("Which value"),
        error_messages={"required": lazy("choose a value")},
    )
    measure = forms.ChoiceField(choices=MEASURES, required=False, label=lazy("What of it"))
    measure_of = forms.CharField(required=False, max_length=20, label=lazy("In what time, or of how many"))
    operator = forms.ChoiceField(choices=choices.operators, label=lazy("Comparison"))
    value = forms.CharField(required=False, max_length=500, label=lazy("Value"))
    upper = forms.CharField(required=False, max_length=50, label=lazy("and"))
    duration = forms.CharField(required=False, max_length=20, label=lazy("Time"))
    lasting = forms.CharField(required=False, max_length=20, label=lazy("for at least"))
    release = forms.CharField(required=False, max_length=20, label=lazy("until it is beyond"))
    times = forms.CharField(required=False, max_length=5, label=lazy("times"))
    within = forms.CharField(required=False, max_length=20, label=lazy("within"))

    def __init__(self, *args: Any, offered: Choices, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offered = offered

    def clean_source(self) -> str:
        key: str = self.cleaned_data["source"]
        if key not in self._offered.sources:
            raise forms.ValidationError(_("is no value of this farm any more: choose another"))
        return key

    @property
    def config(self) -> dict[str, Any]:
        """The leaf; only of a valid form."""
        data = self.cleaned_data
        source_type, uuid, key = data["source"].split("|", 2)
        operator = data["operator"]
        leaf: dict[str, Any] = {"sourceType": source_type, "UUID": uuid, "key": key, "operator": operator}
        needed, source = choices.operands()[operator], self._offered.sources[data["source"]]
        scale = scale_of(source, data["measure"])
        if "value" in needed:
            leaf["value"] = choices.operand_of(operator, source, data["value"], data["upper"], scale)
        if "duration" in needed:
            leaf["duration"] = choices.as_duration(data["duration"])
        if measure := data["measure"]:
            of = data["measure_of"]
            leaf[measure] = choices.as_number(of) if measure == "median" else choices.as_duration(of)
        for name, field, read in (
            ("for", "lasting", choices.as_duration),
            ("releaseAt", "release", lambda text: choices.as_number(text, scale)),
            ("times", "times", choices.as_number),
            ("within", "within", choices.as_duration),
        ):
            if data[field]:
                leaf[name] = read(data[field])
        return leaf


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def scale_of(source: Choice | None, measure: str) -> Scale:
    """Of what is compared: the value of a source, or how much it changed."""
    scale = source.scale if source else choices.AS_IT_IS
    return scale.of_differences if measure in _DIFFERENCES else scale


def condition_initial(
    leaf: Mapping[str, Any], *, together: bool, sources: Mapping[str, Choice]
) -> dict[str, Any] | None:
    """What the form shows of a leaf; None when it says more than the form has fields for."""
    if leaf.keys() - _LEAF_KEYS or any("," in str(each) for each in _listed(leaf.get("value"))):
        return None
    value, upper = leaf.get("value"), None
    if leaf.get("operator") == "between" and isinstance(value, list) and len(value) == 2:
        value, upper = value
    measure = next((key for key in ("per", "increase", "median") if key in leaf), "")
    source = f"{leaf.get('sourceType')}|{str(leaf.get('UUID')).lower()}|{leaf.get('key')}"
    scale = scale_of(sources.get(source), measure)
    scaled = {"value": value, "upper": upper, "release": leaf.get("releaseAt", leaf.get("off"))}
    texts = {"measure_of": leaf.get(measure), "duration": leaf.get("duration"), "lasting": leaf.get("for")}
    texts |= {"times": leaf.get("times"), "within": leaf.get("within")}
    return {
        "together": together,
        "source": source,
        "operator": leaf.get("operator"),
        "measure": measure,
        **{name: choices.as_text(each) for name, each in texts.items()},
        **{name: choices.as_text(each, scale) for name, each in scaled.items()},
    }


class ActionForm(forms.Form):
    """One thing to do."""

    kind = forms.ChoiceField(choices=KINDS, label=lazy("What to do"))
    target = forms.CharField(required=False, widget=_offered_in("states"), label=lazy("Device"))
    value = forms.CharField(required=False, max_length=200, label=lazy("set it to"))
    value_from = forms.CharField(required=False, max_length=100, label=lazy("or to the value that is called"))
    force = forms.BooleanField(required=False, label=lazy("also when it is so already"))
    about = forms.CharField(required=False, widget=_offered_in("devices"), label=lazy("About which device"))
    title = forms.CharField(required=False, max_length=200, label=lazy("Title"))
    alarm = forms.CharField(required=False, max_length=100, label=lazy("Name of the alarm"))
    message = forms.CharField(required=False, max_length=500, label=lazy("Text"))
    severity = forms.ChoiceField(
        choices=lambda: [(each, _(each)) for each in SEVERITIES], required=False, label=lazy("How urgent")
    )
    audience = forms.MultipleChoiceField(
        choices=lambda: [(each, _(each + "s")) for each in ROLES],
        required=False,
        widget=forms.CheckboxSelectMultiple,
        label=lazy("Only for"),
    )
    cooldown = forms.CharField(required=False, max_length=20, label=lazy("at most once in"))

    def __init__(self, *args: Any, offered: Choices, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offered = offered

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        kind = data.get("kind")
        if kind == "device_command" and data.get("target") not in self._offered.states:
            self.add_error("target", _("choose a device"))
        if kind in ("raise_alarm", "clear_alarm") and not data.get("alarm"):
            self.add_error("alarm", _("give the alarm a name"))
        if kind == "notify" and not (data.get("title") or data.get("message")):
            self.add_error("message", _("say what people are told"))
        if data.get("about") and data["about"] not in self._offered.devices:
            self.add_error("about", _("choose a device"))
        return data

    @property
    def config(self) -> dict[str, Any]:
        """The action; only of a valid form."""
        data = self.cleaned_data
        kind = data["kind"]
        found: dict[str, Any] = {"type": kind}
        if kind == "device_command":
            _, device, state = data["target"].split("|", 2)
            found |= {"deviceUuid": device, "stateName": state}
            if data["value_from"]:
                found["valueFrom"] = data["value_from"]
            else:
                found["value"] = self._offered.states[data["target"]].typed(data["value"])
            if data["force"]:
                found["force"] = True
        for name in _ACTION_KEYS[kind] & {"title", "message", "severity", "audience", "alarm"}:
            if data[name]:
                found[name] = data[name]
        if kind == "notify":
            found.setdefault("title", self._short(found["message"]))
            found.setdefault("message", found["title"])
            if data["about"]:
                found["deviceUuid"] = data["about"]
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
    device = str(config.get("deviceUuid", "")).lower()
    return {
        "kind": kind,
        "target": f"device|{device}|{config.get('stateName')}" if kind == "device_command" else "",
        "about": device if kind == "notify" else "",
        "value": choices.as_text(config.get("value")),
        "value_from": choices.as_text(config.get("valueFrom")),
        "force": bool(config.get("force")),
        "audience": config.get("audience", []),
        **texts,
    }
