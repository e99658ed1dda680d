"""Backtests over REST: what a chain would have done with stored readings, or with a series that the request brings."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from devices.serializers import StrictMixin, ValueField
from rules.api.serializers import ChainRefused, NodeSerializer
from rules.authoring import backtest, validation
from rules.authoring.backtest import Given
from rules.engine.exceptions import InvalidChain
from rules.models import RuleChain, RuleNode
from rules.processing import schedules

MAXIMUM_SPAN = timedelta(days=31)
MAXIMUM_GIVEN = 5_000
DEFAULT_SPAN = timedelta(days=1)


class GivenSerializer(StrictMixin):
    """A reading of the series."""

    UUID = serializers.UUIDField(help_text="uuid of the sensor.")
    key = serializers.CharField(help_text="Name of the variable.")
    value = ValueField()
    timestamp = serializers.DateTimeField()


class BacktestSerializer(StrictMixin):
    """The span that is played, and readings in the place of those that are stored."""

    to = serializers.DateTimeField(required=False, help_text="End; now if left out, or the newest of `readings`.")
    readings = GivenSerializer(  # type: ignore[call-arg]  # an option of the list
        many=True, required=False, max_length=MAXIMUM_GIVEN, help_text="A series in the place of what is stored."
    )

    def get_fields(self) -> dict[str, Any]:
        # "from" is no name that a class body can assign to.
        begin = serializers.DateTimeField(
            required=False, help_text="Begin; a day before the end if left out, or the oldest of `readings`."
        )
        return {"from": begin, **super().get_fields()}

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        times = [each["timestamp"] for each in attrs.get("readings", ())]
        end = attrs.get("to") or max(times, default=timezone.now())
        begin = attrs.get("from") or min(times, default=end - DEFAULT_SPAN)
        if begin > end:
            raise serializers.ValidationError({"from": ["It is after the end of the span."]})
        if end - begin > MAXIMUM_SPAN:
            raise serializers.ValidationError({"from": [f"The span is at most {MAXIMUM_SPAN.days} days."]})
        return {**attrs, "from": begin, "to": end}


class UnsavedBacktestSerializer(BacktestSerializer):
    """A chain that is not saved, and what it is played with."""

    organization = serializers.UUIDField()
    nodes = NodeSerializer(many=True)
    executionType = serializers.ChoiceField(  # noqa: N815  the API speaks camelCase
        choices=RuleChain.ExecutionType.choices, default=RuleChain.ExecutionType.EVENT_TRIGGERED
    )
    cron = serializers.CharField(
        required=False, allow_blank=True, default="", max_length=100, help_text="When it runs by schedule."
    )
    timezone = serializers.CharField(required=False, default="UTC", max_length=63, help_text="That of the schedule.")


class DoneSerializer(serializers.Serializer[Any]):
    at = serializers.DateTimeField(help_text="When it would have been done.")
    text = serializers.CharField(help_text="The action, in words.")


class BacktestReportSerializer(serializers.Serializer[Any]):
    """What the chain would have done."""

    to = serializers.DateTimeField(help_text="How far it was played.")
    readings = serializers.IntegerField(help_text="Readings that the chain reads.")
    runs = serializers.IntegerField(help_text="How often the chain would have run.")
    count = serializers.IntegerField(help_text="Actions that would have changed something.")
    held = serializers.IntegerField(help_text="Actions of which nothing would have come: it was so already, or rested.")
    done = DoneSerializer(many=True, help_text="The first hundred of `count`.")
    failures = serializers.ListField(child=serializers.CharField(), help_text="Errors of nodes, each once.")
    isCut = serializers.BooleanField(help_text="Whether it was more than can be played at once.")  # noqa: N815

    def get_fields(self) -> dict[str, Any]:
        begin = serializers.DateTimeField(help_text="From when it was played: later than asked where it is cut.")
        return {"from": begin, **super().get_fields()}


class BacktestMixin:
    """`POST /rule-chains/{uuid}/backtest`, and `/rule-chains/backtest` for one that is not saved."""

    @extend_schema(summary="Backtest the rule chain", request=BacktestSerializer, responses=BacktestReportSerializer)
    @action(detail=True, methods=["post"])
    def backtest(self: Any, request: Request, **_: Any) -> Response:
        """Plays stored readings, or those given, through the chain, enabled or not. Nothing is done."""
        chain: RuleChain = self.get_object()
        form = BacktestSerializer(data=request.data)
        form.is_valid(raise_exception=True)
        return _played(chain, list(chain.nodes.all()), form.validated_data)

    @extend_schema(
        summary="Backtest a rule chain that is not saved",
        operation_id="rule_chains_backtest_unsaved",
        request=UnsavedBacktestSerializer,
        responses=BacktestReportSerializer,
    )
    @action(detail=False, methods=["post"], url_path="backtest")
    def backtest_unsaved(self: Any, request: Request, **_: Any) -> Response:
        """Plays a chain that is not saved, as `POST /rule-chains/{uuid}/backtest` does one that is."""
        form = UnsavedBacktestSerializer(data=request.data)
        form.is_valid(raise_exception=True)
        asked = form.validated_data
        chain = RuleChain(
            organization=self._organization(asked["organization"]),
            execution_type=asked["executionType"],
            cron=asked["cron"],
            timezone=asked["timezone"],
        )
        nodes = [RuleNode(**node) for node in asked["nodes"]]
        if problems := [*schedules.problems_of(chain), *validation.problems_of(chain, nodes)]:
            raise ChainRefused(problems)
        return _played(chain, nodes, asked)


def _played(chain: RuleChain, nodes: list[RuleNode], asked: dict[str, Any]) -> Response:
    given = None
    if "readings" in asked:
        given = [Given(str(each["UUID"]), each["key"], each["value"], each["timestamp"]) for each in asked["readings"]]
    try:
        found = backtest.run(chain, nodes, begin=asked["from"], end=asked["to"], given=given)
    except backtest.NotRead as error:
        problems: list[dict[str, list[str]]] = [{} for _ in range(error.position)]
        raise serializers.ValidationError({"readings": [*problems, {error.field: [str(error)]}]}) from error
    except InvalidChain as error:
        raise ChainRefused(error.problems) from error
    return Response(
        {
            "from": found.begin,
            "to": found.end,
            "readings": found.readings,
            "runs": found.runs,
            "count": found.count,
            "held": found.held,
            "done": [{"at": each.at, "text": each.text} for each in found.done],
            "failures": found.failures,
            "isCut": found.is_cut,
        }
    )
