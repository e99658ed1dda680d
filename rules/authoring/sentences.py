"""Describe a rule chain in a sentence that a grower can read, in the language and the units that one wants. Pure.

Each phrase goes through `say`, which translates it, before names and values are put into its places. Chains that cannot be
compiled are described as far as they can be read, because those are the ones people look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from devices.units import Scale
from rules.engine.chains import NodeSpec
from rules.engine.conditions import MAX_DEPTH
from rules.engine.durations import check_duration
from rules.engine.operators import OPERATORS
from rules.engine.temporal import RELEASE_KEYS

Names = Mapping[tuple[str, str], str]
"""(source type, lower-case uuid) -> name."""
Scales = Mapping[tuple[str, str, str], Scale]
"""(source type, lower-case uuid, variable) -> how its values are shown; nothing for one without a unit."""
Say = Callable[[str], str]

MAXIMUM_CHARACTERS = 5_000
MAXIMUM_NODES = 100
"""Of a longer chain only the beginning is described."""
_SHOWN_UUID = 8
_SHOWN_ITEMS = 5
NO_UNIT = Scale()

TRANSFORMS: Mapping[str, str] = {
    "add": "take {key} plus {value}{target}",
    "subtract": "take {key} minus {value}{target}",
    "multiply": "take {key} times {value}{target}",
    "divide": "take {key} divided by {value}{target}",
    "scale": "take {key} times {factor}, plus {offset}{target}",
    "rename": "call {key} {target_name}",
    "set": "take {target_name} as {value}",
}


class ChainDescriber:
    """Says what the nodes of one chain do; `names` gives the names of what they mention."""

    def __init__(self, names: Names, *, scales: Scales | None = None, say: Say = str) -> None:
        self._names = names
        self._scales = scales or {}
        self.say = say

    def chain(self, nodes: Sequence[NodeSpec]) -> str:
        """The whole chain, from the node that no other points to; empty for a chain without nodes."""
        by_name = {node.name: node for node in reversed(nodes)}
        pointed_to = {name for node in nodes for name in node.targets}
        start = next((node for node in nodes if node.name not in pointed_to), nodes[0] if nodes else None)
        if start is None:
            return ""
        text = self._from(start, by_name, seen=set())
        shown = text if len(text) <= MAXIMUM_CHARACTERS else text[:MAXIMUM_CHARACTERS] + "…"
        return shown[0].upper() + shown[1:] + ("" if shown.endswith("…") else ".")

    def node(self, node: NodeSpec) -> str:
        """One node alone."""
        config = node.config if isinstance(node.config, Mapping) else {}
        if node.type == "filter":
            return self.condition(config)
        if node.type == "transform":
            return self._transform(config)
        kind = config.get("type")
        action = ACTIONS.get(kind) if isinstance(kind, str) else None
        text = action(self, config) if action else self.say("do {what}").format(what=_value(kind))
        if "cooldown" not in config:
            return text
        return self.say("{action}, at most once in {time}").format(action=text, time=_duration(config["cooldown"]))

    def condition(self, config: object, depth: int = 0) -> str:
        """A leaf, or a group with its parts."""
        if not isinstance(config, Mapping):
            return _value(config)
        parts = config.get("expressions")
        if not isinstance(parts, list):
            return self._leaf(config)
        if depth > MAX_DEPTH:
            return "…"
        texts = [self.condition(part, depth + 1) for part in parts]
        kinds = [isinstance(part, Mapping) and "expressions" in part for part in parts]
        grouped = [f"({text})" if group else text for text, group in zip(texts, kinds, strict=True)]
        return f" {self.say('or') if config.get('type') == 'OR' else self.say('and')} ".join(grouped)

    def name_of(self, source_type: str, uuid: str) -> str:
        """Empty for one that does not exist, or is not mentioned."""
        return self._names.get((source_type, uuid), "")

    def source(self, source_type: object, uuid: object) -> str:
        """Its name; of one that does not exist, the beginning of its uuid."""
        return self.name_of(str(source_type), str(uuid).lower()) or f"{source_type} {str(uuid)[:_SHOWN_UUID]}"

    def _leaf(self, leaf: Mapping[str, object]) -> str:
        operator, scale = _value(leaf.get("operator")), self._scale_of(leaf)
        text = f"{self.source(leaf.get('sourceType'), leaf.get('UUID'))} {_value(leaf.get('key'))}"
        for key, phrase in MEASURES.items():
            if key in leaf:
                text = self.say(phrase).format(value=text, of=_duration(leaf[key]))
                scale = scale if key == "median" else scale.of_differences
        value = self._range(leaf, scale) if operator == "between" else _value(leaf.get("value"), scale)
        known = OPERATORS.get(operator)
        predicate = self.say(known.predicate) if known else "{operator} {value}"
        told = predicate.format(operator=operator, value=value, duration=_duration(leaf.get("duration")))
        return f"{text} {told}" + "".join(
            self.say(phrase).format(_value(leaf[key], scale) if key in RELEASE_KEYS else _duration(leaf[key]))
            for key, phrase in OVER_TIME.items()
            if key in leaf
        )

    def _scale_of(self, leaf: Mapping[str, object]) -> Scale:
        name = (str(leaf.get("sourceType")), str(leaf.get("UUID")).lower(), str(leaf.get("key")))
        return self._scales.get(name, NO_UNIT)

    def _range(self, leaf: Mapping[str, object], scale: Scale) -> str:
        value = leaf.get("value")
        if isinstance(value, list) and len(value) == 2:
            low, high = (_value(each, scale) for each in value)
            return self.say("{low} and {high}").format(low=low, high=high)
        return _value(value, scale)

    def _from(self, node: NodeSpec, by_name: Mapping[str, NodeSpec], seen: set[str]) -> str:
        """What happens from here on. Where branches meet, the second refers to the first."""
        if node.name in seen:
            return self.say("continue with “{node}”").format(node=node.name)
        if len(seen) >= MAXIMUM_NODES:
            return "…"
        seen.add(node.name)
        text, node = self._joined(node, by_name, seen)
        following = by_name.get(node.next or "")
        if node.type == "filter":
            return self._branches(text, node, by_name, seen)
        failing = by_name.get(node.on_failure or "")
        if failing:
            rest = self._from(failing, by_name, seen)
            text = self.say("{action} (if that fails: {rest})").format(action=text, rest=rest)
        if following is None:
            return text
        rest = self._from(following, by_name, seen)
        both = self.say("{first}, then {rest}") if following.type != "filter" else self.say("{first}; then {rest}")
        return both.format(first=text, rest=rest)

    def _joined(self, node: NodeSpec, by_name: Mapping[str, NodeSpec], seen: set[str]) -> tuple[str, NodeSpec]:
        """Filters that follow one another and go nowhere when false are one condition."""
        texts = [self.node(node)]
        while node.type == "filter" and not node.on_false:
            following = by_name.get(node.next or "")
            if following is None or following.type != "filter" or following.on_false or following.name in seen:
                break
            seen.add(following.name)
            texts.append(self.node(following))
            node = following
        either = f" {self.say('or')} "
        grouped = (f"({text})" if len(texts) > 1 and either in text else text for text in texts)
        return f" {self.say('and')} ".join(grouped), node

    def _branches(self, text: str, node: NodeSpec, by_name: Mapping[str, NodeSpec], seen: set[str]) -> str:
        branches = [by_name.get(node.next or ""), by_name.get(node.on_false or "")]
        yes, no = (
            (self._from(each, by_name, seen), each.type == "filter") if each else (self.say("do nothing"), False)
            for each in branches
        )
        then = self.say("when {condition}, {action}").format(condition=text, action=_bracketed(*yes))
        if not branches[1]:
            return then
        return self.say("{then}; otherwise {otherwise}").format(then=then, otherwise=_bracketed(*no))

    def _command(self, config: Mapping[str, object]) -> str:
        value = _value(config.get("value"))
        if "valueFrom" in config:
            value = self.say("the value of {name}").format(name=_value(config["valueFrom"]))
        state = f"{self.source('device', config.get('deviceUuid'))} {_value(config.get('stateName'))}"
        text = self.say("set {state} to {value}").format(state=state, value=value)
        return (
            self.say("{action}, also when it is so already").format(action=text)
            if config.get("force") is True
            else text
        )

    def _notify(self, config: Mapping[str, object]) -> str:
        title = _value(config.get("title") or config.get("message"))
        text = self.say("notify people “{title}”").format(title=title)
        return f"{text} ({_value(config['severity'])})" if "severity" in config else text

    def _raise_alarm(self, config: Mapping[str, object]) -> str:
        alarm = _value(config.get("alarm"))
        if "severity" not in config:
            return self.say("raise the alarm “{alarm}”").format(alarm=alarm)
        severity = self.say(_value(config["severity"]))
        return self.say("raise the {severity} alarm “{alarm}”").format(severity=severity, alarm=alarm)

    def _clear_alarm(self, config: Mapping[str, object]) -> str:
        return self.say("clear the alarm “{alarm}”").format(alarm=_value(config.get("alarm")))

    def _transform(self, config: Mapping[str, object]) -> str:
        operation, key, target = _value(config.get("operation")), config.get("key"), config.get("target")
        phrase = TRANSFORMS.get(operation)
        if phrase is None:
            return f"{operation} {_value(key)}"
        is_renamed = target is not None and target != key
        renamed = self.say(" as {name}").format(name=_value(target)) if is_renamed else ""
        texts = {name: _value(config.get(name)) for name in ("key", "value", "factor")}
        return self.say(phrase).format(
            **texts, offset=_value(config.get("offset", 0)), target=renamed, target_name=_value(target)
        )


ACTIONS: Mapping[str, Callable[[ChainDescriber, Mapping[str, object]], str]] = {
    "device_command": ChainDescriber._command,
    "notify": ChainDescriber._notify,
    "raise_alarm": ChainDescriber._raise_alarm,
    "clear_alarm": ChainDescriber._clear_alarm,
}

MEASURES: Mapping[str, str] = {
    "per": "the change of {value} in {of}",
    "increase": "the increase of {value} in {of}",
    "median": "the median of the newest {of} of {value}",
}
OVER_TIME: Mapping[str, str] = {
    **dict.fromkeys(RELEASE_KEYS, " (until it is beyond {})"),
    "for": " for {}",
    "times": " at least {} times",
    "within": " within {}",
}


def _bracketed(text: str, is_filter: bool) -> str:
    """A branch that begins with a condition of its own, set apart from what comes after it."""
    return f"({text})" if is_filter else text


def _value(value: object, scale: Scale = NO_UNIT) -> str:
    """A number with its unit, where it has one; Python's words for nothing, true and false are not those of people."""
    if isinstance(value, int | float) and not isinstance(value, bool) and scale != NO_UNIT:
        return f"{scale.text(value)} {scale.unit}"[:100]
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        items = [_value(item, scale) for item in value[:_SHOWN_ITEMS]]
        return ", ".join([*items, "…"] if len(value) > _SHOWN_ITEMS else items)
    return str(value)[:100]


def _duration(value: object) -> str:
    """5 m of 5m; anything else, such as how many times, as it is."""
    if isinstance(value, str) and check_duration(value) is None:
        return f"{value[:-1]} {value[-1]}"
    return _value(value)
