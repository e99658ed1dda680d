"""Try a rule chain with given values: report what each node saw and what would be done, and do nothing.

A trial compiles and runs the chain as a worker does. Values of other sensors and devices, and what conditions over time
remember, are what is known now, unless they are given.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import reduce
from typing import Any

import msgspec
from django.conf import settings
from django.core.exceptions import ValidationError
from django.utils import timezone

from devices import catalogue, latest
from devices.catalogue import Field
from devices.models import DeviceState
from devices.quality import limits
from devices.serializers import camel
from rules import events
from rules.authoring import describe, validation
from rules.authoring.sentences import ChainDescriber, Names
from rules.effects import interlocks, perform
from rules.engine import chains
from rules.engine.chains import Chain, NodeSpec, Outcome
from rules.engine.conditions import SOURCE_TYPES, compile_condition
from rules.engine.context import Run, Scope, Trigger
from rules.engine.effect_types import DeviceCommand, Effect
from rules.engine.exceptions import ChainFailed
from rules.engine.fields import is_number
from rules.engine.values import Reference, Sample, TemporalCondition, Value
from rules.events import CHAIN
from rules.models import ActionCooldown, RuleChain, RuleNode
from rules.processing import condition_memory, loading
from rules.processing.quality import sample_of

EVENT_ID = "trial"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownValue:
    """A value that a sensor or device is taken to have had."""

    reference: Reference
    value: Value
    timestamp: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialInput:
    """What a trial is run with. Without `values` it is a run by schedule.

    The originator may be left out where only one source can be meant. `latest` takes the place of what is known of the
    variables that it names; several entries of one are its history, the newest is its value.
    """

    values: Mapping[str, Value] = field(default_factory=dict)
    source_type: str = ""
    originator: str = ""
    timestamp: datetime | None = None
    latest: Sequence[KnownValue] = ()


def run(chain: RuleChain, nodes: Sequence[RuleNode], given: TrialInput) -> dict[str, Any]:
    """The report of the trial, as the REST API answers it.

    Raises InvalidChain, ValidationError by field of `given`, and RedisError where latest values are asked for.
    """
    spec = loading.spec_of(chain, nodes)
    compiled = chains.compile(spec)
    source = _source(chain, compiled, given)
    when = given.timestamp or timezone.now()
    facts = _Facts(compiled, given, when=when, source=source)
    values = {name: value for name, value in given.values.items() if name not in facts.suspects}
    names = describe.names_of(chain.organization_id, nodes)
    trigger = Trigger(
        event_id=EVENT_ID,
        source_type=source[0],
        uuid=source[1],
        values=values,
        timestamp_us=events.microseconds(when),
        lookup=facts.samples.get,
        memory=facts.memory,
        refuses=perform.refuses,
        originator=names.get(source, chain.name),
        deadline=time.monotonic() + settings.RULE_CHAIN_TIMEOUT_MS / 1000,
    )
    return _Report(spec.nodes, names, _NoOpReason(chain, compiled, source[1])).of(compiled, trigger)


def _source(chain: RuleChain, compiled: Chain, given: TrialInput) -> tuple[str, str]:
    """Who reports the values: (source type, uuid). Raises ValidationError."""
    if not given.values and not given.originator:
        return CHAIN, str(chain.uuid)
    sources = {reference[:2] for reference in compiled.references}
    if given.originator:
        fitting = {each for each in sources if each[1] == given.originator.lower()}
    else:
        fitting = {reference[:2] for reference in compiled.references if reference.key in given.values} or sources
    fitting = {each for each in fitting if given.source_type in ("", each[0])}
    if len(fitting) != 1:
        choices = ", ".join(f"{source_type} {uuid}" for source_type, uuid in sorted(sources))
        raise ValidationError({"originator": f"must be one whose values the filters of the chain read: {choices}"})
    (source,) = fitting
    _check_values(source, given.values)
    return source


def _check_values(source: tuple[str, str], values: Mapping[str, Value]) -> None:
    """As telemetry is checked: a misspelt name would be a trial of nothing."""
    originator = catalogue.shared().originators([source]).get(source)
    if originator is None:
        raise ValidationError({"originator": f"there is no {source[0]} {source[1]} any more"})
    has = ", ".join(sorted(originator.fields)) or "nothing"
    problems = [
        f"{name} {known.problem_with(value)}" if known else f"{name}: {originator.name} has {has}"
        for name, value in values.items()
        if (known := originator.fields.get(name)) is None or known.problem_with(value)
    ]
    if problems:
        raise ValidationError({"values": problems})


class _Facts:
    """What is known besides the event: the latest sample of each reference, and what conditions over time remember.

    `suspects`: the names of the event's values that are not believed.
    """

    def __init__(self, compiled: Chain, given: TrialInput, *, when: datetime, source: tuple[str, str]) -> None:
        self._when_us = events.microseconds(when)
        self._given = self._histories(given.latest)
        own = {Reference(*source, key): value for key, value in given.values.items()}
        sources = {source, *(reference[:2] for reference in compiled.references)}
        self._originators = catalogue.shared().originators(sources)
        judged = {reference for reference in own if (field := self._field(reference)) and field.limits}
        self.samples = self._latest((compiled.references - own.keys()) | judged)
        self.suspects = {reference.key for reference, value in own.items() if self._is_suspect(reference, value)}
        believed = {reference: value for reference, value in own.items() if reference.key not in self.suspects}
        self._own = {reference: Sample(value, self._when_us) for reference, value in believed.items()}
        self.samples |= self._own
        self.memory = self._memory(compiled.watches)

    def _latest(self, references: Iterable[Reference]) -> dict[Reference, Sample]:
        self._known = latest.recall([each for each in references if each not in self._given])
        found = {Reference(*key): self._sample(Reference(*key), value) for key, value in self._known.items()}
        return found | {reference: history[-1] for reference, history in self._given.items()}

    def _sample(self, reference: Reference, known: latest.Latest) -> Sample:
        field = self._field(reference)
        return sample_of(known, clock_us=self._when_us, maximum_age_us=field.maximum_age_us if field else None)

    def _field(self, reference: Reference) -> Field | None:
        originator = self._originators.get(reference[:2])
        return originator.fields.get(reference.key) if originator else None

    def _is_suspect(self, reference: Reference, value: Value) -> bool:
        """Then what was known before it stays known, and is suspect."""
        field, known = self._field(reference), self._known.get(reference)
        if field is None or field.limits is None or not is_number(value):
            return False
        reason = limits.judge(field.limits, value, self._when_us, known)
        if reason:
            taken = limits.taken_in(reason, value, self._when_us, self._when_us, known)
            self.samples[reference] = self._sample(reference, taken)
        return bool(reason)

    def _histories(self, known: Sequence[KnownValue]) -> dict[Reference, list[Sample]]:
        found: dict[Reference, list[Sample]] = {}
        for each in known:
            at_us = events.microseconds(each.timestamp) if each.timestamp else self._when_us
            found.setdefault(each.reference, []).append(Sample(each.value, at_us))
        return {reference: sorted(history, key=lambda each: each.timestamp_us) for reference, history in found.items()}

    def _memory(self, watches: Sequence[TemporalCondition]) -> dict[str, Any]:
        """Each may read ten thousand stored readings, while others wait for this process: so it has its time, no more."""
        deadline = time.monotonic() + settings.DATA_COLLECTION_TIMEOUT_MS / 1_000
        found = {}
        for watch in watches:
            if time.monotonic() > deadline:
                within = f"{settings.DATA_COLLECTION_TIMEOUT_MS} ms"
                problem = (
                    f"what {len(watches)} conditions over time remember could not be read within {within}; give it"
                )
                raise ValidationError({"latest": problem})
            found[watch.key] = self._remembered(watch)
        return found

    def _remembered(self, watch: TemporalCondition) -> Any:
        """Of what is given, else of what is stored, and of the event itself."""
        history = self._given.get(watch.reference)
        if history is None:
            stored = condition_memory.stored(watch, since_us=self._when_us - watch.window_us)
            history = [sample for sample in stored if sample.timestamp_us < self._when_us]
        own = self._own.get(watch.reference)
        return reduce(watch.observe, [*history, own] if own else history, None)


class _NoOpReason:
    """Why an effect would change nothing now, as far as that is known: its state, and the cooldowns of this originator."""

    def __init__(self, chain: RuleChain, compiled: Chain, originator: str) -> None:
        uuids = {command.device_uuid for command in compiled.commands}
        rows = DeviceState.objects.filter(device__organization_id=chain.organization_id, device__uuid__in=uuids)
        self._states = {(str(row.device.uuid), row.name): row for row in rows.select_related("device")}
        rests = ActionCooldown.objects.filter(chain__uuid=chain.uuid, originator_uuid=originator)
        self._done_at = dict(rests.values_list("node", "done_at"))

    def reason(self, effect: Effect) -> str | None:
        if isinstance(effect, DeviceCommand):
            state = self._states.get((effect.device_uuid, effect.state_name))
            return _no_op_reason_of(state, effect) if state else None
        done_at = self._done_at.get(effect.node)
        until = done_at + timedelta(microseconds=effect.cooldown_us) if done_at else None
        return f"it rests until {until:%Y-%m-%d %H:%M:%S} UTC" if until and until > timezone.now() else None


def _no_op_reason_of(state: DeviceState, command: DeviceCommand) -> str | None:
    if state.newest[0] == command.value and not (command.force or state.is_momentary):
        return "it is so already"
    now = timezone.now()
    until = state.rests_until(command.value, cooldown_us=command.cooldown_us, now=now) if command.cooldown_us else None
    if until:
        return f"it rests until {until:%Y-%m-%d %H:%M:%S} UTC"
    vetoed = interlocks.veto_now(state.pk, command.value)
    return f"its interlock vetoes it: {vetoed.detail}" if vetoed else None


class _Report:
    """Listens to a run, step by step, and puts it into words."""

    def __init__(self, nodes: Sequence[NodeSpec], names: Names, held: _NoOpReason) -> None:
        self._held = held
        self._nodes = {node.name: (place, node) for place, node in enumerate(nodes)}
        self._names = names
        self._teller = ChainDescriber(names)
        self._steps: list[dict[str, Any]] = []
        self._effects: list[dict[str, Any]] = []
        self._run: Run | None = None

    def of(self, compiled: Chain, trigger: Trigger) -> dict[str, Any]:
        outcome, failure = None, None
        try:
            outcome = compiled.run(trigger, self._note)
        except ChainFailed as error:
            failure = error
        missing = outcome.missing if outcome else tuple(self._run.missing) if self._run else ()
        if failure:
            self._steps.append(self._step(failure.node, passed=False, error=failure))
        return {
            "originator": {
                "sourceType": trigger.source_type,
                "UUID": trigger.uuid,
                "name": trigger.originator,
            },
            "timestamp": _time(trigger.timestamp_us),
            "completed": failure is None,
            "error": None if failure is None else _error(failure),
            "stoppedAt": outcome.stopped_at if outcome else None,
            "wakeAt": _wake(outcome),
            "trace": self._steps,
            "effects": self._effects,
            "partialData": bool(missing),
            "missingSources": [self._source(reference) for reference in dict.fromkeys(missing)],
        }

    def _note(self, node: str, run: Run, *, passed: bool, error: ChainFailed | None) -> None:
        self._run = run
        step = self._step(node, passed=passed, error=error)
        _, spec = self._nodes[node]
        if spec.type == "filter":
            step["conditions"] = self._conditions(spec, run)
        if len(run.effects) > len(self._effects):
            step["effect"] = self._effect(run.effects[-1])
            self._effects.append(step["effect"])
        step["values"] = dict(run.values)
        self._steps.append(step)

    def _step(self, name: str, *, passed: bool, error: ChainFailed | None) -> dict[str, Any]:
        _, spec = self._nodes[name]
        return {
            "node": name,
            "type": spec.type,
            "text": self._teller.node(spec),
            "passed": passed,
            "error": error.cause if error else None,
            "conditions": [],
            "values": {},
            "effect": None,
        }

    def _conditions(self, spec: NodeSpec, run: Run) -> list[dict[str, Any]]:
        """Every comparison of the filter, those too that a run passes over because an earlier one decides."""
        place, _ = self._nodes[spec.name]
        return [
            self._condition(leaf, path, run) for path, leaf in validation.leaves(spec.config, f"nodes[{place}].config")
        ]

    def _condition(self, leaf: Mapping[str, Any], path: str, run: Run) -> dict[str, Any]:
        condition = compile_condition(leaf, path=path)
        (reference,) = condition.references
        sample = run.read(reference)
        return {
            "path": path,
            "text": self._teller.condition(leaf),
            **self._source(reference),
            "found": sample.value if sample else None,
            "foundAt": _time(sample.timestamp_us) if sample else None,
            "ageSeconds": (run.clock_us - sample.timestamp_us) / 1_000_000 if sample else None,
            "suspect": sample.suspicion or None if sample else None,
            "passed": condition.evaluate(Scope(run.read, run.now_us, run.memory, clock_us=run.clock_us)),
        }

    def _source(self, reference: Reference) -> dict[str, Any]:
        name = self._names.get(reference[:2], "")
        return {"sourceType": reference.source_type, "UUID": reference.uuid, "name": name, "key": reference.key}

    def _effect(self, effect: Effect) -> dict[str, Any]:
        own = {"effect_key", "chain_uuid", "timestamp_us", "cooldown_us", "vetoed"}
        fields = {
            camel(each.name): getattr(effect, each.name)
            for each in msgspec.structs.fields(effect)
            if each.name not in own
        }
        found = {"type": _kind(effect), "text": self._teller.node(self._nodes[effect.node][1]), **fields}
        if isinstance(effect, DeviceCommand):
            found["deviceName"] = self._names.get(("device", effect.device_uuid), "")
        return found | {"held": self._held.reason(effect)}


def _kind(effect: Effect) -> str:
    """As the action's configuration calls it: device_command of a DeviceCommand."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(effect).__name__).lower()


def _error(failure: ChainFailed) -> dict[str, Any]:
    return {"node": failure.node, "message": failure.cause, "code": str(failure.code) if failure.code else None}


def _wake(outcome: Outcome | None) -> str | None:
    return _time(min(outcome.wakes.values())) if outcome and outcome.wakes else None


def _time(timestamp_us: int) -> str:
    return events.moment(timestamp_us).isoformat().replace("+00:00", "Z")


def reference_of(source_type: str, uuid: str, key: str) -> Reference:
    """Raises ValidationError."""
    if source_type not in SOURCE_TYPES:
        raise ValidationError({"sourceType": f"must be one of {', '.join(SOURCE_TYPES)}"})
    return Reference(source_type, uuid.lower(), key)
