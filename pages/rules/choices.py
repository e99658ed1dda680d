"""What the form of a rule offers: variables and states by name, operators in words, times of a day."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any

from django.utils.dates import WEEKDAYS_ABBR
from django.utils.translation import gettext as _

from devices.models import Device, DeviceState, Organization, Variable
from devices.units import AS_STORED, Scale, Units
from devices.values import Datatype
from rules.engine.operators import OPERATORS, RANGE

_SHOWN_FIRST = (">", ">=", "<", "<=", "between", "==", "!=", "olderThan", "valueOlderThan")
_DURATION = re.compile(r"\s*(\d+)\s*([a-z]+)\s*", re.IGNORECASE)
# Django's own words, which it has in every language.
WEEKDAYS = [(str((number + 1) % 7), name) for number, name in WEEKDAYS_ABBR.items()]
AS_IT_IS = Scale()
_LISTS = frozenset({"in", "notIn", "hasAll", "hasAny", "hasNone"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A variable of a sensor or a state of a device; `key` is "sensor|uuid|name" or "device|uuid|name"."""

    key: str
    group: str
    name: str
    scale: Scale = AS_IT_IS
    datatype: str = Datatype.NUMBER
    allowed: list[Any] = field(default_factory=list)

    @property
    def allowed_texts(self) -> list[str]:
        return [_("yes"), _("no")] if self.datatype == Datatype.BOOLEAN else [as_text(each) for each in self.allowed]

    def typed(self, text: str) -> Any:
        """The value of the choice's datatype that a person has written; the text itself where it is none of them."""
        text = text.strip()
        if self.datatype == Datatype.NUMBER:
            return as_number(text, self.scale)
        if self.datatype == Datatype.BOOLEAN:
            yes_or_no = {"yes": True, "true": True, _("yes"): True, "no": False, "false": False, _("no"): False}
            return yes_or_no.get(text.lower(), text)
        return text


class Choices:
    """All of one organization, in two queries; values in the units that somebody wants."""

    def __init__(self, organization: Organization, units: Units = AS_STORED) -> None:
        self._organization = organization
        self._units = units

    @cached_property
    def variables(self) -> Mapping[str, Choice]:
        rows = Variable.objects.filter(sensor__organization=self._organization).select_related("sensor")
        return _by_key(
            Choice(
                key=f"sensor|{row.sensor.uuid}|{row.name}",
                group=row.sensor.name,
                name=row.name,
                scale=self._units.scale_of(row.unit),
                datatype=row.datatype,
            )
            for row in rows.order_by("sensor__name", "name")
        )

    @cached_property
    def states(self) -> Mapping[str, Choice]:
        rows = DeviceState.objects.filter(device__organization=self._organization).select_related("device")
        return _by_key(
            Choice(
                key=f"device|{row.device.uuid}|{row.name}",
                group=row.device.name,
                name=row.name,
                datatype=row.datatype,
                allowed=row.allowed_values,
            )
            for row in rows.order_by("device__name", "name")
        )

    @cached_property
    def devices(self) -> Mapping[str, str]:
        """uuid -> name."""
        rows = Device.objects.filter(organization=self._organization).order_by("name")
        return {str(uuid): name for uuid, name in rows.values_list("uuid", "name")}

    @cached_property
    def sources(self) -> Mapping[str, Choice]:
        """What conditions may ask for."""
        return {**self.variables, **self.states}


def _by_key(offered: Iterable[Choice]) -> dict[str, Choice]:
    return {each.key: each for each in offered}


def as_json(offered: Iterable[Choice]) -> dict[str, Any]:
    """For the script: of each sensor or device [uuid, name, its kind]; of each kind [[name, unit, allowed values], ...].

    A farm with a thousand sensors has a few kinds of them, and the page says once what they have in common.
    """
    groups: dict[tuple[str, str], list[list[Any]]] = {}
    for choice in offered:
        uuid = choice.key.split("|", 2)[1]
        groups.setdefault((uuid, choice.group), []).append([choice.name, choice.scale.unit, choice.allowed_texts])
    kinds: dict[str, int] = {}
    numbered = [[uuid, name, kinds.setdefault(json.dumps(own), len(kinds))] for (uuid, name), own in groups.items()]
    return {"kinds": [json.loads(each) for each in kinds], "groups": numbered}


def operators() -> list[tuple[str, str]]:
    """Every operator with words for it, those that growers need most first."""
    rest = [symbol for symbol in OPERATORS if symbol not in _SHOWN_FIRST]
    return [(symbol, _words(symbol)) for symbol in (*_SHOWN_FIRST, *rest)]


def operands() -> dict[str, list[str]]:
    """Which fields go with an operator: value, upper, duration."""
    return {symbol: list(_fields(symbol)) for symbol in OPERATORS}


def _fields(symbol: str) -> Iterator[str]:
    operator = OPERATORS[symbol]
    if operator.operand is not None:
        yield "value"
    if operator.operand is RANGE:
        yield "upper"
    if operator.takes_duration:
        yield "duration"


def _words(symbol: str) -> str:
    predicate = _(OPERATORS[symbol].predicate)
    return predicate.format(value="…", duration="…")


def operand_of(symbol: str, source: Choice, value: str, upper: str, scale: Scale) -> Any:
    """What the operator compares with, from the texts of a form. `scale`: of what it compares, such as of a change."""
    if OPERATORS[symbol].operand is RANGE:
        return [as_number(value, scale), as_number(upper, scale)]
    if symbol in _LISTS:
        return [source.typed(each) for each in value.split(",") if each.strip()]
    return as_number(value, scale) if OPERATORS[symbol].is_numeric else source.typed(value)


def as_number(text: str, scale: Scale = AS_IT_IS) -> Any:
    """A number as people write it, with a point or a comma, in the unit of the scale; the text where it is none."""
    plain = text.strip().replace(",", ".")
    try:
        number = float(plain)
    except ValueError:
        return text.strip()
    if not scale.is_own and isfinite(number):
        return scale.stored(number)
    return int(number) if number.is_integer() and "e" not in plain.lower() and "." not in plain else number


def as_text(value: Any, scale: Scale = AS_IT_IS) -> str:
    """What a form shows for a stored value."""
    if isinstance(value, bool):
        return _("yes") if value else _("no")
    if isinstance(value, list):
        return ", ".join(as_text(each, scale) for each in value)
    if not scale.is_own and isinstance(value, int | float):
        return scale.text(value)
    return "" if value is None else str(value)


def as_duration(text: str) -> str:
    """5m of "5 min", "5 minutes" or "5m"; what cannot be read stays as it is, and the rule says what is wrong with it."""
    match = _DURATION.fullmatch(text)
    unit = match[2][0].lower() if match else ""
    return f"{int(match[1])}{unit}" if match and unit in "smhd" else text.strip()
