"""The admin page on which a person tries a chain with values of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from redis.exceptions import RedisError

from aemos.lib import redis
from devices import catalogue, latest
from devices.catalogue import Field
from devices.values import Datatype
from rules.authoring import describe, trial
from rules.authoring.trial import KnownValue, TrialInput
from rules.engine import chains
from rules.engine.exceptions import InvalidChain
from rules.engine.values import Reference, Value
from rules.models import RuleChain
from rules.processing import loading

MAXIMUM_FIELDS = 50
BY_SCHEDULE = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A variable that the form asks for, and what is known of it."""

    reference: Reference
    label: str
    known: Value


class TrialForm(forms.Form):
    """One field for each variable that the chain reads, filled with what was reported last."""

    def __init__(self, chain: RuleChain, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.chain = chain
        self.nodes = list(chain.nodes.all())
        compiled = chains.compile(loading.spec_of(chain, self.nodes))
        references = sorted(compiled.references)
        names = describe.names_of(chain.organization_id, self.nodes)
        sources = list(dict.fromkeys(reference[:2] for reference in references))
        self.fields["originator"] = forms.ChoiceField(
            label="Reported by",
            choices=[
                *((uuid, names.get((source_type, uuid), uuid)) for source_type, uuid in sources),
                (BY_SCHEDULE, "nobody: a run by schedule"),
            ],
            required=False,
            help_text="Its values are the event's; those of the others are taken as known.",
        )
        known = latest.recall(references[:MAXIMUM_FIELDS])
        fields = catalogue.shared().originators(set(sources))
        self.places: dict[str, Place] = {}
        for number, reference in enumerate(references[:MAXIMUM_FIELDS]):
            source = fields.get(reference[:2])
            field = source.fields.get(reference.key) if source else None
            if source is None or field is None:
                continue  # what a transform makes is nobody's variable
            value = known[reference].value if reference in known else None
            place = Place(reference=reference, label=f"{source.name} {reference.key}", known=value)
            self.places[f"value{number}"] = place
            self.fields[f"value{number}"] = _field(field, place)

    def given(self) -> TrialInput:
        """What is reported, and of the others what was changed on the page."""
        originator = self.cleaned_data["originator"]
        own, others = {}, []
        for reference, value, known in self._entered():
            if reference.uuid == originator:
                if value is not None:
                    own[reference.key] = value
            elif value != known:
                others.append(KnownValue(reference=reference, value=value))
        return TrialInput(values=own, originator=originator, latest=others)

    def report(self) -> dict[str, Any] | None:
        """None, and the form says why, when it cannot be tried so."""
        try:
            return trial.run(self.chain, self.nodes, self.given())
        except ValidationError as error:
            for field, texts in error.message_dict.items():
                self.add_error(field if field in self.fields else None, texts)
        except RedisError as error:
            self.add_error(None, f"The latest values are not known now. {redis.explain(error)}")
        except InvalidChain as error:
            self.add_error(None, str(error))
        return None

    def _entered(self) -> Iterator[tuple[Reference, Value, Value]]:
        for name, place in self.places.items():
            value = self.cleaned_data[name]
            yield place.reference, None if value == "" else value, place.known


def _field(field: Field, place: Place) -> forms.Field:
    hint = "" if place.known is not None else "Has no value yet."
    options: dict[str, Any] = {
        "label": place.label,
        "required": False,
        "initial": place.known,
        "help_text": hint,
    }
    if field.allowed_values:
        return forms.TypedChoiceField(
            choices=[("", "no value"), *((value, value) for value in field.allowed_values)],
            coerce=lambda text: next((each for each in field.allowed_values if str(each) == text), text),
            **options,
        )
    if field.datatype == Datatype.BOOLEAN:
        return forms.NullBooleanField(**options)
    return forms.FloatField(**options) if field.datatype == Datatype.NUMBER else forms.CharField(**options)
