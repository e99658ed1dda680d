"""JSON of rule chains and their nodes, and of switching by hand: camelCase in, rows out, and back again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar
from uuid import UUID

from django.db.models import Model
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers, status
from rest_framework.exceptions import ValidationError

from aemos.lib.problems import ProblemException, flatten, sentence
from devices.models import StateChange
from devices.serializers import (
    CamelCaseSerializer,
    StateChangeSerializer,
    StrictMixin,
    ValueField,
    organization_field,
)
from rules.authoring import describe, editing, lint, validation
from rules.effects import chain_ends
from rules.engine.exceptions import InvalidChain, Problem
from rules.models import ChainStatistics, RuleChain, RuleNode

MAXIMUM_SMALL_INTEGER = 32_767


class ProblemSerializer(serializers.Serializer[Problem]):
    """One entry of `validationErrors`: where, what was found there, and what is wrong with it."""

    path = serializers.CharField(help_text="For example nodes[0].config.expressions[1].UUID")
    value = ValueField()
    message = serializers.CharField()


class ChainRefused(ProblemException):
    """A 400 whose errors keep the values found. No ValidationError, which would turn every value in it into text."""

    status_code = status.HTTP_400_BAD_REQUEST
    default_code = "invalid"

    def __init__(self, problems: Iterable[Problem], *, fields: Mapping[str, Any] | None = None) -> None:
        self.problems = tuple(problems)
        self.fields = fields or {}
        errors = [*flatten(self.fields), *map(_error_of, self.problems)]
        super().__init__(sentence(errors), errors=errors)


def _error_of(problem: Problem) -> dict[str, Any]:
    shown = ProblemSerializer(problem).data
    return {"field": shown["path"], "code": "invalid", "detail": shown["message"], "value": shown["value"]}


def serialize_problems(problems: Iterable[Problem]) -> list[Any]:
    """Problems as the API answers them."""
    return [ProblemSerializer(problem).data for problem in problems]


class LinkField(serializers.CharField):
    """The name of a node, or null where there is none; the database has an empty text for null."""

    def __init__(self, **options: Any) -> None:
        super().__init__(required=False, allow_null=True, allow_blank=True, max_length=100, **options)

    def run_validation(self, data: Any = serializers.empty) -> Any:
        return "" if data is None else super().run_validation(data)

    def to_representation(self, value: str) -> str | None:  # type: ignore[override]
        return value or None


@extend_schema_field({"type": "string", "enum": RuleNode.Type.values})
class NodeTypeField(serializers.CharField):
    """Judged by chains.compile, like everything that only the rest of the chain can make right or wrong."""


@extend_schema_field({"type": "object", "additionalProperties": True})
class ConfigField(serializers.JSONField):
    """Judged by chains.compile."""


class NodeSerializer(CamelCaseSerializer[RuleNode]):
    """One step of a chain."""

    # Given with a node of a whole chain, the uuid says which one it was.
    uuid = serializers.UUIDField(required=False)
    type = NodeTypeField()
    config = ConfigField()
    next = LinkField(help_text="The node that follows; null ends the chain.")
    on_false = LinkField(help_text="Of a filter: the node that follows when it is false.")
    on_failure = LinkField(
        help_text="Of others: the node that follows when it fails; without it, the event is tried again."
    )

    class Meta:
        model = RuleNode
        fields = ["uuid", "name", "type", "config", "next", "on_false", "on_failure"]
        extra_kwargs = {"name": {"trim_whitespace": False}}

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        return attrs  # the chain as a whole is judged by rules.authoring.editing


class NewNodeSerializer(NodeSerializer):
    """A node to put into a chain."""

    uuid = None  # type: ignore[assignment]
    previous = serializers.CharField(
        write_only=True, required=False, help_text="The node to put it after; without it, the end of the main line."
    )

    class Meta(NodeSerializer.Meta):
        fields = ["name", "type", "config", "next", "on_false", "on_failure", "previous"]


class EditedNodeSerializer(NodeSerializer):
    """A node of a chain, to be changed; links to it follow its new name."""

    uuid = serializers.UUIDField(read_only=True)


class StatisticsSerializer(CamelCaseSerializer[ChainStatistics]):
    """How a chain has fared since it exists. Workers count, and write it down every few seconds."""

    average_seconds = serializers.SerializerMethodField(method_name="get_average_seconds")

    class Meta:
        model = ChainStatistics
        fields = [
            *("executions", "failures", "failures_in_a_row", "average_seconds"),
            *("last_executed_at", "last_failed_at", "last_error"),
        ]

    def get_average_seconds(self, row: ChainStatistics) -> float | None:
        return row.seconds / row.executions if row.executions else None


class RuleChainSerializer(CamelCaseSerializer[RuleChain]):
    """What is to happen when a condition is met. `version` grows by one with every change."""

    organization = organization_field()
    priority = serializers.IntegerField(default=5, min_value=1, max_value=MAXIMUM_SMALL_INTEGER)
    max_retries = serializers.IntegerField(default=3, min_value=0, max_value=MAXIMUM_SMALL_INTEGER)
    nodes = NodeSerializer(many=True)
    statistics = serializers.SerializerMethodField()

    class Meta:
        model = RuleChain
        fields = [
            *("uuid", "organization", "name", "enabled"),
            *("execution_type", "cron", "timezone", "missed_runs", "next_run_at", "last_run_at"),
            *(
                "priority",
                "max_retries",
                "late_events",
                "version",
                "nodes",
                "suspended_at",
                "statistics",
                "created_at",
                "updated_at",
            ),
        ]
        immutable = ["organization"]
        read_only_fields = ["next_run_at", "last_run_at", "suspended_at"]

    # What changes by itself: a body that was read, edited and written back may hold it, and it is passed over.
    volatile: ClassVar = frozenset({"nextRunAt", "lastRunAt", "suspendedAt", "statistics"})

    @extend_schema_field(StatisticsSerializer)
    def get_statistics(self, chain: RuleChain) -> Any:
        return StatisticsSerializer(getattr(chain, "statistics", None) or ChainStatistics()).data

    def to_internal_value(self, data: Any) -> Any:
        """Like every serializer's, but what is wrong inside `nodes` is reported with the values found."""
        if self.instance is not None and isinstance(data, Mapping):
            data = {name: value for name, value in data.items() if name not in self.volatile}
        try:
            return super().to_internal_value(data)
        except ValidationError as error:
            detail = error.detail
            if not isinstance(detail, dict) or "nodes" not in detail or "nodes" not in data:
                raise
            problems = _problems(detail.pop("nodes"), data["nodes"], "nodes")
            raise ChainRefused(problems, fields=detail) from error

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """What is wrong with the chain's own fields is reported together with what is wrong with its nodes."""
        try:
            return super().validate(attrs)
        except ValidationError as error:
            problems = self._node_problems(attrs)
            if not problems or not isinstance(error.detail, dict):
                raise
            raise ChainRefused(problems, fields=error.detail) from error

    def _node_problems(self, attrs: Any) -> Sequence[Problem]:
        chain = self.candidate(attrs)
        assert isinstance(chain, RuleChain)  # noqa: S101  Meta.model
        if "nodes" not in attrs:
            return []
        try:
            return validation.problems_of(chain, nodes_from(attrs["nodes"], chain))
        except InvalidChain as error:
            return error.problems

    def candidate(self, attrs: Any) -> Model:
        return super().candidate({name: value for name, value in attrs.items() if name != "nodes"})

    def save(self, **_: Any) -> RuleChain:
        """Raises ChainRefused with every problem of the chain; inside a transaction, because the row was locked."""
        attrs = dict(self.validated_data)
        raw_nodes = attrs.pop("nodes", None)
        chain = self.candidate(attrs)
        assert isinstance(chain, RuleChain)  # noqa: S101  Meta.model
        try:
            nodes = None if raw_nodes is None else nodes_from(raw_nodes, chain)
            editing.save(chain, nodes, by=self.context["request"].user.get_username())
        except InvalidChain as error:
            raise ChainRefused(error.problems) from error
        self.instance = RuleChain.objects.select_related("organization", "statistics").get(pk=chain.pk)
        return self.instance


class LeftOnSerializer(serializers.Serializer[Any]):
    """A state that a chain has set last. With `goesOff` it goes to its safe value when the chain ends."""

    device = serializers.UUIDField(source="state.device.uuid")
    deviceName = serializers.CharField(source="state.device.name")  # noqa: N815  the API speaks camelCase
    stateName = serializers.CharField(source="state.name")  # noqa: N815
    value = ValueField(source="state.value")
    goesOff = serializers.BooleanField(source="goes_off")  # noqa: N815


class RuleChainDetailSerializer(RuleChainSerializer):
    """A chain with what can be said of it: in words, and what looks wrong although it may be saved."""

    sentence = serializers.SerializerMethodField(help_text="The chain in words, with names instead of uuids.")
    validation_warnings = serializers.SerializerMethodField(method_name="get_validation_warnings")
    left_on = serializers.SerializerMethodField(
        method_name="get_left_on", help_text="What the chain has switched on and nobody has switched since."
    )

    class Meta(RuleChainSerializer.Meta):
        fields = [*RuleChainSerializer.Meta.fields, "sentence", "validation_warnings", "left_on"]

    volatile: ClassVar = RuleChainSerializer.volatile | {"sentence", "validationWarnings", "leftOn"}

    @extend_schema_field(LeftOnSerializer(many=True))
    def get_left_on(self, chain: RuleChain) -> Any:
        return LeftOnSerializer(chain_ends.left_on(chain), many=True).data

    def get_sentence(self, chain: RuleChain) -> str:
        return describe.sentence_of(chain, chain.nodes.all())

    @extend_schema_field(ProblemSerializer(many=True))
    def get_validation_warnings(self, chain: RuleChain) -> Any:
        return serialize_problems(lint.warnings_of(chain, list(chain.nodes.all())))


class ValidationSerializer(serializers.Serializer[Any]):
    """What is wrong with a chain, and what looks wrong."""

    validationErrors = ProblemSerializer(many=True)  # noqa: N815  the API speaks camelCase
    validationWarnings = ProblemSerializer(many=True)  # noqa: N815


def nodes_from(raw_nodes: list[dict[str, Any]], chain: RuleChain) -> list[RuleNode]:
    """New rows in place of the old. A node keeps its uuid when the body gives it, else when its name stays."""
    old = {node.name: node.uuid for node in chain.nodes.all()} if chain.pk else {}
    given = [raw.get("uuid") for raw in raw_nodes]
    problems = [
        Problem(f"nodes[{position}].uuid", str(uuid), "is no other node of this chain; leave it out")
        for position, uuid in enumerate(given)
        if uuid is not None and (uuid not in old.values() or uuid in given[:position])
    ]
    if problems:
        raise InvalidChain(problems)
    free = {name: uuid for name, uuid in old.items() if uuid not in given}
    return [_node(chain, raw, uuid or free.pop(raw["name"], None)) for raw, uuid in zip(raw_nodes, given, strict=True)]


def _node(chain: RuleChain, raw: Mapping[str, Any], uuid: UUID | None) -> RuleNode:
    node = RuleNode(chain=chain, **{name: value for name, value in raw.items() if name != "uuid"})
    node.uuid = uuid or node.uuid
    return node


def _problems(detail: Any, data: Any, path: str) -> Iterable[Problem]:
    """Serializer errors, nested like the data, as a flat list of problems."""
    if isinstance(detail, dict):
        for key, inner in detail.items():
            if isinstance(key, int):
                yield from _problems(inner, data[key], f"{path}[{key}]")
            elif key == "non_field_errors":
                yield from _problems(inner, data, path)
            else:
                yield from _problems(inner, data.get(key), f"{path}.{key}")
    else:
        yield from (Problem(path, data, str(text)) for text in detail)


class StateCommandSerializer(StrictMixin):
    """A person's wish to switch a device."""

    deviceUuid = serializers.UUIDField()  # noqa: N815  the API speaks camelCase
    stateName = serializers.CharField(max_length=100)  # noqa: N815
    value = ValueField()
    override = serializers.CharField(
        max_length=500,
        required=False,
        allow_blank=True,
        default="",
        help_text="The reason for which it is to be done although an interlock vetoes it; takes the role admin.",
    )


class StateInstanceSerializer(StateChangeSerializer):
    """What became of the wish."""

    class Meta:
        model = StateChange
        fields = ["uuid", "device", "stateName", "value", "previous", "timestamp"]
