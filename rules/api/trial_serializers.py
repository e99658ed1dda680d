"""JSON of what people do with whole chains: trials, copies, documents to import; requests in, and what their answers hold."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from django.core.validators import MaxValueValidator
from rest_framework import serializers

from devices.serializers import StrictMixin, ValueField
from rules.api.serializers import NodeSerializer
from rules.authoring import trial
from rules.authoring.trial import KnownValue, TrialInput
from rules.engine.conditions import SOURCE_TYPES

# What a trial reckons with may lie a year after the time that is given, and is answered as a date.
LATEST = datetime(9000, 1, 1, tzinfo=UTC)


def _moment(**fields: Any) -> serializers.DateTimeField:
    return serializers.DateTimeField(required=False, validators=[MaxValueValidator(LATEST)], **fields)


class KnownSerializer(StrictMixin):
    """A value that a sensor or device is taken to have had; at the time of the trial unless `timestamp` says when."""

    sourceType = serializers.ChoiceField(choices=SOURCE_TYPES)  # noqa: N815  the API speaks camelCase
    UUID = serializers.UUIDField()
    key = serializers.CharField()
    value = ValueField(allow_null=True)
    timestamp = _moment()


class TrialSerializer(StrictMixin):
    """What a chain is tried with. Without `values` it is a run by schedule."""

    values = serializers.DictField(
        child=ValueField(), required=False, help_text="What is reported, by variable or state, such as ph."
    )
    sourceType = serializers.ChoiceField(choices=SOURCE_TYPES, required=False)  # noqa: N815
    originator = serializers.UUIDField(
        required=False, help_text="Who reports it; may be left out where only one source can be meant."
    )
    timestamp = _moment(help_text="When; now if left out.")
    latest = KnownSerializer(
        many=True,
        required=False,
        help_text="What is taken as known, in place of what is. Several entries of one variable are its history.",
    )

    def given(self) -> TrialInput:
        data = self.validated_data
        return TrialInput(
            values=data.get("values", {}),
            source_type=data.get("sourceType", ""),
            originator=str(data.get("originator", "")),
            timestamp=data.get("timestamp"),
            latest=[_known(each) for each in data.get("latest", ())],
        )


def _known(data: dict[str, Any]) -> KnownValue:
    reference = trial.reference_of(data["sourceType"], str(data["UUID"]), data["key"])
    return KnownValue(reference=reference, value=data["value"], timestamp=data.get("timestamp"))


class UnsavedTrialSerializer(TrialSerializer):
    """A chain that is not saved, and what to try it with."""

    organization = serializers.UUIDField()
    nodes = NodeSerializer(many=True)


class SourceSerializer(serializers.Serializer[Any]):
    sourceType = serializers.CharField()  # noqa: N815
    UUID = serializers.UUIDField()
    name = serializers.CharField()


class MissingSourceSerializer(SourceSerializer):
    key = serializers.CharField()


class ConditionReportSerializer(MissingSourceSerializer):
    """One comparison: what it found, how old that was, and what it said."""

    path = serializers.CharField()
    text = serializers.CharField()
    found = ValueField(allow_null=True)
    foundAt = serializers.DateTimeField(allow_null=True)  # noqa: N815
    ageSeconds = serializers.FloatField(allow_null=True)  # noqa: N815
    suspect = serializers.CharField(allow_null=True, help_text="Why the newest reading is not believed.")
    passed = serializers.BooleanField()


class StepReportSerializer(serializers.Serializer[Any]):
    """One node of a trial, and the values of the event after it."""

    node = serializers.CharField()
    type = serializers.CharField()
    text = serializers.CharField()
    passed = serializers.BooleanField()
    error = serializers.CharField(allow_null=True)
    conditions = ConditionReportSerializer(many=True)
    values = serializers.DictField(child=ValueField())
    effect = serializers.DictField(child=ValueField(), allow_null=True)


class TrialErrorSerializer(serializers.Serializer[Any]):
    node = serializers.CharField()
    message = serializers.CharField()
    code = serializers.CharField(allow_null=True)


class TrialReportSerializer(serializers.Serializer[Any]):
    """What a run would do. `missingSources` had no value, and conditions that need one were false."""

    originator = SourceSerializer()
    timestamp = serializers.DateTimeField()
    completed = serializers.BooleanField()
    error = TrialErrorSerializer(allow_null=True)
    stoppedAt = serializers.CharField(  # noqa: N815
        allow_null=True, help_text="The filter that was false and had nowhere to go."
    )
    wakeAt = serializers.DateTimeField(  # noqa: N815
        allow_null=True, help_text="When the outcome may be another one although nothing is reported."
    )
    trace = StepReportSerializer(many=True)
    effects = serializers.ListField(
        child=serializers.DictField(child=ValueField()),
        help_text="What would be done, by `type`; `held` says why nothing would come of it now, null if something would.",
    )
    partialData = serializers.BooleanField()  # noqa: N815
    missingSources = MissingSourceSerializer(many=True)  # noqa: N815


class CopySerializer(StrictMixin):
    """How the copy is to be called."""

    name = serializers.CharField(max_length=200, required=False, help_text="The old name with (copy) if left out.")


class DocumentSerializer(serializers.Serializer[Any]):
    """A chain as a file."""

    format = serializers.CharField()
    version = serializers.IntegerField()
    chain = serializers.DictField(child=ValueField())
    sources = SourceSerializer(many=True)


class ImportSerializer(StrictMixin):
    """A document to import into an organization. The chain comes switched off."""

    organization = serializers.UUIDField()
    document = serializers.JSONField(help_text="As GET /rule-chains/{uuid}/export gives it.")
    mapping = serializers.DictField(
        child=serializers.CharField(), required=False, help_text="uuid in the document -> uuid of ours."
    )
    name = serializers.CharField(max_length=200, required=False, help_text="In place of the name in the document.")


class TriggeredSerializer(serializers.Serializer[Any]):
    """The event that runs the chain; it is in the queue."""

    eventId = serializers.UUIDField()  # noqa: N815
