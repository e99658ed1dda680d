"""Templates of rules: what a grower picks, filled in with the farm's own sensors and devices as far as their names tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop as noop

from devices.units import CELSIUS, MILLISIEMENS, Units
from devices.values import Datatype
from pages.rules.choices import Choice, Choices
from rules.authoring.when_then import OTHERWISE, THEN, WHEN
from rules.models import RuleChain

EVENT, SCHEDULE = RuleChain.ExecutionType.EVENT_TRIGGERED, RuleChain.ExecutionType.SCHEDULE_ONLY


@dataclass(frozen=True, slots=True, kw_only=True)
class Starter:
    """One template. `fill` gives the rows of the form from what the farm has."""

    key: str
    name: str
    text: str
    fill: Callable[[_Farm], dict[str, Any]]

    def initial(self, offered: Choices) -> dict[str, Any]:
        """What the form shows at first. What is not found in the farm is left for the grower to choose."""
        filled = self.fill(_Farm(offered))
        head = {"name": _(self.name), "execution_type": EVENT, "needed": "all", **filled.pop("head", {})}
        return {"head": head, WHEN: [], THEN: [], OTHERWISE: [], **filled}


class _Farm:
    """Finds variables and states by words in their names."""

    def __init__(self, offered: Choices) -> None:
        self._offered = offered

    def value(self, *words: str) -> str:
        """The key of the first variable with one of the words in its name or its sensor's; empty without one."""
        return _first(list(self._offered.variables.values()), words)

    def number(self, key: str, value: float, unit: str) -> str:
        """A value of a template in the unit that the form shows for what was found; as it is where that has none of its kind."""
        found = self._offered.variables.get(key)
        wanted = found.scale.unit if found else unit
        return f"{Units(wanted, wanted).scale_of(unit).shown(value):g}"

    def dose(self, *words: str, amount: str, cooldown: str) -> dict[str, Any]:
        """A row that doses, or that switches on what has no amounts."""
        row = self.state(*words)
        found = {**row, "value": amount} if row["target"] else self.state(*words, on=True)
        return {**found, "cooldown": cooldown}

    def state(self, *words: str, on: bool | None = None) -> dict[str, Any]:
        """A row that switches the first such state on or off, as its allowed values say it; without `on`, a number of it."""
        states = self._offered.states.values()
        fitting = [each for each in states if (each.datatype == Datatype.NUMBER if on is None else _switched(each, on))]
        key = _first(fitting, words)
        value = "" if on is None or not key else _switched(self._offered.states[key], on)
        return {"kind": "device_command", "target": key, "value": value}


def _first(offered: Sequence[Choice], words: Sequence[str]) -> str:
    for word in words:
        pattern = re.compile(word, re.IGNORECASE)
        for choice in offered:
            if pattern.search(choice.name):
                return choice.key
        for choice in offered:
            if pattern.search(choice.group):
                return choice.key
    return offered[0].key if len(offered) == 1 else ""


def _switched(state: Choice, on: bool) -> str:
    """Empty for a state that has no such value."""
    if state.datatype == Datatype.BOOLEAN:
        return "yes" if on else "no"
    wanted = ("on", "open", "running") if on else ("off", "closed", "stopped")
    found = next((each for each in state.allowed if str(each).lower() in wanted), "")
    # off, low, high: on is the last of them.
    return state.allowed[-1] if on and not found and _switched(state, False) else found


def _is(source: str, operator: str, value: str = "", **more: str) -> dict[str, Any]:
    return {"source": source, "operator": operator, "value": value, **more}


def _alarm(name: str, message: str, severity: str = "warning") -> dict[str, Any]:
    """In the language of who makes the rule: everybody reads the alarm."""
    return {"kind": "raise_alarm", "alarm": name, "message": message, "severity": severity}


def _end(name: str) -> dict[str, Any]:
    return {"kind": "clear_alarm", "alarm": name}


def _ph_high(farm: _Farm) -> dict[str, Any]:
    dose = farm.dose("acid", "ph.?down", "dose", "dos", amount="5", cooldown="15m")
    level = farm.value("level")
    conditions = [_is(farm.value(r"^ph\b", "ph"), ">", "6.5", lasting="5m")]
    return {WHEN: [*conditions, *([_is(level, ">=", "20")] if level else [])], THEN: [dose]}


def _ph_low(farm: _Farm) -> dict[str, Any]:
    dose = farm.dose("base", "ph.?up", "dose", "dos", amount="5", cooldown="15m")
    return {WHEN: [_is(farm.value(r"^ph\b", "ph"), "<", "5.5", lasting="5m")], THEN: [dose]}


def _ec_low(farm: _Farm) -> dict[str, Any]:
    dose = farm.dose("nutrient", "fertili", "dose", "dos", amount="10", cooldown="20m")
    ec = farm.value(r"^ec\b", "conductivity")
    return {WHEN: [_is(ec, "<", farm.number(ec, 1.4, MILLISIEMENS), lasting="10m")], THEN: [dose]}


def _dry_run(farm: _Farm) -> dict[str, Any]:
    stop = farm.state("pump", "circulation", "power", on=False)
    alarm = _alarm(_("Water too low"), _("The water level is {value}: the pump was stopped."), "critical")
    level = farm.value("level")
    if level:
        alarm["message"] = alarm["message"].replace("{value}", "{" + level.rsplit("|", 1)[1] + "}")
    return {WHEN: [_is(level, "<", "15", release="25")], THEN: [stop, alarm], OTHERWISE: [_end(_("Water too low"))]}


def _fan(farm: _Farm) -> dict[str, Any]:
    air = farm.value("air.*temp", "temp")
    conditions = [_is(air, ">", farm.number(air, 27, CELSIUS), release=farm.number(air, 25, CELSIUS))]
    on, off = farm.state("fan", "vent", on=True), farm.state("fan", "vent", on=False)
    return {WHEN: conditions, THEN: [on], OTHERWISE: [off]}


def _vpd(farm: _Farm) -> dict[str, Any]:
    conditions = [_is(farm.value("vpd", "humid"), ">", "1.4", release="1.1", lasting="10m")]
    on, off = farm.state("humidif", "fog", "mist", on=True), farm.state("humidif", "fog", "mist", on=False)
    return {WHEN: conditions, THEN: [on], OTHERWISE: [off]}


def _light(*, on: bool) -> Callable[[_Farm], dict[str, Any]]:
    def fill(farm: _Farm) -> dict[str, Any]:
        head = {"execution_type": SCHEDULE, "times": "06:00" if on else "22:00"}
        return {"head": head, THEN: [farm.state("light", "lamp", on=on)]}

    return fill


def _oxygen(farm: _Farm) -> dict[str, Any]:
    conditions = [_is(farm.value("oxygen", r"^do\b"), "<", "5", release="6", lasting="2m")]
    alarm = _alarm(_("Oxygen low"), _("There is too little oxygen in the water."), "critical")
    air = farm.state("aerat", "air.?pump", "air", on=True)
    return {
        WHEN: conditions,
        THEN: [alarm, *([air] if air["target"] else [])],
        OTHERWISE: [_end(_("Oxygen low"))],
    }


def _silent(farm: _Farm) -> dict[str, Any]:
    source = farm.value(r"^ph\b", "level", ".")
    alarm = _alarm(
        _("Sensor is silent"), _("Nothing was reported for half an hour: look at the sensor and its network.")
    )
    return {
        WHEN: [_is(source, "olderThan", duration="30m")],
        THEN: [alarm],
        OTHERWISE: [_end(_("Sensor is silent"))],
    }


STARTERS: Mapping[str, Starter] = {
    each.key: each
    for each in (
        Starter(
            key="ph-down",
            name=noop("Lower the pH"),
            text=noop("A dose of acid when the pH was too high for five minutes, at most every quarter of an hour."),
            fill=_ph_high,
        ),
        Starter(
            key="ph-up",
            name=noop("Raise the pH"),
            text=noop("A dose of base when the pH was too low for five minutes, at most every quarter of an hour."),
            fill=_ph_low,
        ),
        Starter(
            key="ec",
            name=noop("Feed nutrients"),
            text=noop("A dose of nutrients when the EC was too low for ten minutes."),
            fill=_ec_low,
        ),
        Starter(
            key="dry-run",
            name=noop("Stop the pump without water"),
            text=noop("The pump stops and an alarm is raised when the water is too low; the alarm ends by itself."),
            fill=_dry_run,
        ),
        Starter(
            key="fan",
            name=noop("Cool with the fan"),
            text=noop("On above 27 °C, off again below 25 °C."),
            fill=_fan,
        ),
        Starter(
            key="vpd",
            name=noop("Keep the VPD"),
            text=noop(
                "The humidifier runs while the air is too dry for the plants, measured as vapour pressure deficit."
            ),
            fill=_vpd,
        ),
        Starter(key="light-on", name=noop("Light on"), text=noop("Every day at six."), fill=_light(on=True)),
        Starter(
            key="light-off",
            name=noop("Light off"),
            text=noop("Every day at ten in the evening."),
            fill=_light(on=False),
        ),
        Starter(
            key="oxygen",
            name=noop("Watch the oxygen"),
            text=noop("An alarm when dissolved oxygen is low for two minutes, for the fish."),
            fill=_oxygen,
        ),
        Starter(
            key="silent",
            name=noop("Notice a silent sensor"),
            text=noop("An alarm when nothing was reported for half an hour."),
            fill=_silent,
        ),
    )
}
