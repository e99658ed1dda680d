"""JSON of rejected events, dead letters and their replays: rows in, camelCase out, and what people want replayed in."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers

from devices.models import Organization
from devices.serializers import CamelCaseSerializer, ScopedField, StrictMixin
from rules.admission import replay
from rules.models import DeadLetter, RejectedEvent, Replay, RuleChain


class RejectedEventSerializer(CamelCaseSerializer[RejectedEvent]):
    """What was sent and not accepted, with the reason."""

    organization = ScopedField[Organization](read_only=True, allow_null=True)

    class Meta:
        model = RejectedEvent
        fields = [
            "uuid",
            "event_id",
            "organization",
            "protocol",
            "source_type",
            "originator_uuid",
            "type",
            "priority",
            "lane",
            "timestamp",
            "reason",
            "detail",
            "payload",
            "queue_depth",
            "threshold",
            "circuit_state",
            "received_at",
            "status",
            "decided_at",
            "decided_by",
        ]


class DeadLetterSerializer(CamelCaseSerializer[DeadLetter]):
    """An accepted event that failed at every attempt."""

    organization = ScopedField[Organization](read_only=True, allow_null=True)
    chain = ScopedField[RuleChain](read_only=True, allow_null=True)

    class Meta:
        model = DeadLetter
        fields = [
            "uuid",
            "event_id",
            "organization",
            "lane",
            "originator_uuid",
            "event",
            "error",
            "chain",
            "node",
            "attempts",
            "created_at",
            "status",
            "decided_at",
            "decided_by",
        ]


class ReplaySerializer(CamelCaseSerializer[Replay]):
    """A replay and how far it is: `replayed` and `failed` of about `total` events."""

    organization = ScopedField[Organization](read_only=True, allow_null=True)

    class Meta:
        model = Replay
        fields = [
            "uuid",
            "kind",
            "organization",
            "rate",
            "with_commands",
            "state",
            "total",
            "replayed",
            "failed",
            "note",
            "created_at",
            "created_by",
            "ended_at",
        ]


class ReplayWishSerializer(StrictMixin):
    """What to replay: filters under the names that the list knows, and how."""

    rate = serializers.IntegerField(
        default=replay.DEFAULT_RATE, min_value=1, max_value=replay.MAXIMUM_RATE, help_text="Events a second at most."
    )
    withCommands = serializers.BooleanField(  # noqa: N815  the API speaks camelCase
        default=False, help_text="Also switch devices. Without it no device is switched, whatever chains decide."
    )
    organization = serializers.UUIDField(required=False)
    lane = serializers.CharField(required=False)
    eventId = serializers.UUIDField(required=False)  # noqa: N815
    originator = serializers.UUIDField(required=False)

    def get_fields(self) -> dict[str, Any]:
        # "from" is no name that a class body can assign to.
        times = {
            "from": serializers.DateTimeField(required=False, help_text="Refused or given up then or later."),
            "to": serializers.DateTimeField(required=False, help_text="Refused or given up then or before."),
        }
        return {**super().get_fields(), **times}


class RejectedReplayWishSerializer(ReplayWishSerializer):
    reason = serializers.CharField(required=False)
    priority = serializers.IntegerField(required=False, min_value=1, max_value=10)
    protocol = serializers.CharField(required=False)


class DeadReplayWishSerializer(ReplayWishSerializer):
    chain = serializers.UUIDField(required=False)
    node = serializers.CharField(required=False)
