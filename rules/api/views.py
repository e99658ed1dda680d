"""The REST API of rule chains, their nodes, and commands that people give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast
from uuid import UUID

from django.contrib.auth.models import AbstractBaseUser
from django.core.exceptions import ValidationError as DjangoValidationError
from django.db import transaction
from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema, extend_schema_view
from redis.exceptions import RedisError
from rest_framework import status
from rest_framework.decorators import action
from rest_framework.exceptions import APIException, NotFound, ValidationError
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import Serializer

from aemos.lib import redis
from aemos.lib.problems import Conflict, ProblemException, Unavailable
from devices.exceptions import Overloaded
from devices.filters import BooleanFilter, CharFilter, ChoiceFilter, FilterSet, by_uuid
from devices.models import Device, DeviceState, Organization
from devices.serializers import in_camel_case
from devices.viewsets import EditViewSet, ReadViewSet, ScopedViewSet
from rules.api import telemetry
from rules.api.backtest_views import BacktestMixin
from rules.api.serializers import (
    ChainRefused,
    EditedNodeSerializer,
    NewNodeSerializer,
    NodeSerializer,
    RuleChainDetailSerializer,
    RuleChainSerializer,
    StateCommandSerializer,
    StateInstanceSerializer,
    ValidationSerializer,
    serialize_problems,
)
from rules.api.trial_serializers import (
    CopySerializer,
    DocumentSerializer,
    ImportSerializer,
    TrialReportSerializer,
    TrialSerializer,
    TriggeredSerializer,
    UnsavedTrialSerializer,
)
from rules.authoring import editing, import_export, lint, trial, validation
from rules.authoring.trial import TrialInput
from rules.effects import states
from rules.engine.exceptions import InvalidChain
from rules.models import RuleChain, RuleNode
from rules.processing import schedules


class RuleChainFilter(FilterSet):
    ordered_by = {"name": "name", "priority": "priority", "created_at": "createdAt"}
    searched = ("name",)
    organization = by_uuid("organization")
    name = CharFilter(lookup_expr="icontains")
    enabled = BooleanFilter()
    executionType = ChoiceFilter(  # noqa: N815  the API speaks camelCase
        field_name="execution_type", choices=RuleChain.ExecutionType.choices
    )


class QueueRefuses(ProblemException):
    """The queue takes no event now: the same answer as telemetry gets, with Retry-After."""

    def __init__(self, refusal: Overloaded) -> None:
        super().__init__(refusal.detail, code=refusal.reason, members=telemetry.members_of(refusal))
        self.status_code = telemetry.STATUS[type(refusal)]
        self.wait = refusal.retry_after  # REST framework sends it as Retry-After


@extend_schema_view(
    retrieve=extend_schema(responses=RuleChainDetailSerializer),
    create=extend_schema(request=RuleChainSerializer, responses={201: RuleChainDetailSerializer}),
    update=extend_schema(request=RuleChainSerializer, responses=RuleChainDetailSerializer),
    partial_update=extend_schema(request=RuleChainSerializer, responses=RuleChainDetailSerializer),
)
class RuleChainViewSet(BacktestMixin, EditViewSet[RuleChain]):
    """Rule chains with their nodes. `nodes` in a PUT or PATCH replaces all nodes at once."""

    resource = "rule-chains"
    # These last ones change nothing, or demand the right themselves in the organization that the body names.
    verbs: ClassVar = dict.fromkeys(("enable", "disable", "duplicate", "trigger"), "change") | dict.fromkeys(
        ("import_chain", "execute", "execute_unsaved", "backtest", "backtest_unsaved"), "view"
    )
    queryset = RuleChain.objects.select_related("organization", "statistics").prefetch_related("nodes")
    serializer_class = RuleChainSerializer
    filterset_class = RuleChainFilter

    def get_serializer_class(self) -> type[RuleChainSerializer]:
        """One chain is shown with more fields than a list of them."""
        return RuleChainSerializer if self.action == "list" else RuleChainDetailSerializer

    def get_object(self) -> RuleChain:
        """Locked when it is to be changed, so that changes that cross do not undo one another."""
        chain = super().get_object()
        if self.request.method in ("PUT", "PATCH"):
            return _locked(chain)
        return chain

    @transaction.atomic
    def update(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().update(request, *args, **kwargs)

    def perform_destroy(self, instance: RuleChain) -> None:
        editing.delete(instance)

    @extend_schema(request=None, responses=RuleChainDetailSerializer)
    @action(detail=True, methods=["post"])
    def enable(self, request: Request, **_: Any) -> Response:
        """Switches the chain on, if it is valid, and lets one run again that was suspended."""
        return self._switched(enabled=True)

    @extend_schema(request=None, responses=RuleChainDetailSerializer)
    @action(detail=True, methods=["post"])
    def disable(self, request: Request, **_: Any) -> Response:
        """Switches the chain off."""
        return self._switched(enabled=False)

    @transaction.atomic
    def _switched(self, *, enabled: bool) -> Response:
        chain = _locked(self.get_object())
        with refusing():
            editing.switch(chain, enabled=enabled, by=_name(self.request))
        return self._detail(chain)

    @extend_schema(request=CopySerializer, responses={201: RuleChainDetailSerializer})
    @action(detail=True, methods=["post"])
    def duplicate(self, request: Request, **_: Any) -> Response:
        """Copies the chain under a new name; the copy is switched off."""
        chain = self.get_object()
        wish = _valid(CopySerializer(data=request.data))
        name = wish.get("name", "")
        if RuleChain.objects.filter(organization=chain.organization_id, name=name).exists():
            raise ValidationError({"name": ["There is already a rule chain with this name for this organization."]})
        with refusing():
            copy = editing.duplicate(chain, name=name)
        return self._detail(copy, code=status.HTTP_201_CREATED)

    @extend_schema(responses=ValidationSerializer)
    @action(detail=True, methods=["get"])
    def validate(self, request: Request, **_: Any) -> Response:
        """Validates the chain as if it were saved now, and adds lint warnings."""
        chain = self.get_object()
        nodes = list(chain.nodes.all())
        problems = schedules.problems_of(chain) + validation.problems_of(chain, nodes)
        answer = {
            "validationErrors": serialize_problems(problems),
            "validationWarnings": serialize_problems(lint.warnings_of(chain, nodes)),
        }
        return Response(answer)

    @extend_schema(responses=DocumentSerializer)
    @action(detail=True, methods=["get"])
    def export(self, request: Request, **_: Any) -> Response:
        """The chain as a document, to keep or to import elsewhere."""
        return Response(import_export.exported(self.get_object()))

    @extend_schema(summary="Import a rule chain", request=ImportSerializer, responses={201: RuleChainDetailSerializer})
    @action(detail=False, methods=["post"], url_path="import")
    def import_chain(self, request: Request, **_: Any) -> Response:
        """Makes a chain, switched off, from a document. A uuid that the organization does not have is a problem."""
        wish = _valid(ImportSerializer(data=request.data))
        organization = self._organization(wish["organization"])
        self.access.demand("add", self.resource, organization.pk)
        with refusing():
            body = import_export.chain_of(wish["document"], wish.get("mapping", {}))
        body |= {"organization": str(organization.uuid), "enabled": False}
        body |= {"name": wish["name"]} if "name" in wish else {}
        serializer = self.get_serializer(data=body)
        try:
            serializer.is_valid(raise_exception=True)
            with transaction.atomic():
                serializer.save()
        except ChainRefused as error:
            raise ChainRefused(import_export.named(error.problems, wish["document"]), fields=error.fields) from error
        return Response(serializer.data, status=status.HTTP_201_CREATED)

    @extend_schema(summary="Try the rule chain", request=TrialSerializer, responses=TrialReportSerializer)
    @action(detail=True, methods=["post"])
    def execute(self, request: Request, **_: Any) -> Response:
        """Tries the chain, enabled or not, with the values given. Nothing is done; the answer shows every step."""
        chain = self.get_object()
        serializer = TrialSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        return _tried(chain, list(chain.nodes.all()), serializer.given())

    @extend_schema(
        summary="Try a rule chain that is not saved",
        operation_id="rule_chains_execute_unsaved",
        request=UnsavedTrialSerializer,
        responses=TrialReportSerializer,
    )
    @action(detail=False, methods=["post"], url_path="execute")
    def execute_unsaved(self, request: Request, **_: Any) -> Response:
        """Tries a chain that is not saved, as `POST /rule-chains/{uuid}/execute` does one that is."""
        serializer = UnsavedTrialSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        chain = RuleChain(organization=self._organization(serializer.validated_data["organization"]))
        nodes = [RuleNode(**node) for node in serializer.validated_data["nodes"]]
        problems = validation.problems_of(chain, nodes)
        if problems:
            raise ChainRefused(problems)
        return _tried(chain, nodes, serializer.given())

    @extend_schema(request=None, responses={202: TriggeredSerializer})
    @action(detail=True, methods=["post"])
    def trigger(self, request: Request, **_: Any) -> Response:
        """Runs the chain now, for real, with what is known. 409 while it is switched off or suspended."""
        chain = self.get_object()
        if chain.stopped:
            raise Conflict(f"{chain} is {chain.stopped}; switch it on first.")
        try:
            event = schedules.trigger(chain, protocol="http")
        except Overloaded as refusal:
            raise QueueRefuses(refusal) from refusal
        return Response({"eventId": event.id}, status=status.HTTP_202_ACCEPTED)

    def _detail(self, chain: RuleChain, *, code: int = status.HTTP_200_OK) -> Response:
        return Response(self.get_serializer(self.get_queryset().get(pk=chain.pk)).data, status=code)

    def _organization(self, uuid: UUID) -> Organization:
        """Raises ValidationError for one that the person does not belong to."""
        rows = self.access.limit(Organization.objects.all(), "pk", resource="organizations")
        found = rows.filter(uuid=uuid).first()
        if found is None:
            raise ValidationError({"organization": [f"There is none with the uuid {uuid}."]})
        return found


def _name(request: Request) -> str:
    return cast("AbstractBaseUser", request.user).get_username()


def _valid(serializer: Serializer[Any]) -> dict[str, Any]:
    serializer.is_valid(raise_exception=True)
    return dict(serializer.validated_data)


def _tried(chain: RuleChain, nodes: Sequence[RuleNode], given: TrialInput) -> Response:
    try:
        return Response(trial.run(chain, nodes, given))
    except InvalidChain as error:
        raise ChainRefused(error.problems) from error
    except DjangoValidationError as error:
        raise ValidationError(in_camel_case(error)) from error
    except RedisError as error:
        detail = "The latest values are not known now, Redis cannot be reached; try again, or give them as `latest`."
        raise Unavailable(detail, code="redis-unavailable") from error


def _locked(chain: RuleChain) -> RuleChain:
    """The chain as it is now; 404 when it was deleted meanwhile."""
    found: RuleChain = get_object_or_404(RuleChain.objects.locked(), pk=chain.pk)
    return found


@contextmanager
def refusing() -> Iterator[None]:
    """Answers 400 with every problem when the chain inside is refused."""
    try:
        yield
    except InvalidChain as error:
        raise ChainRefused(error.problems) from error


@extend_schema_view(
    create=extend_schema(request=NewNodeSerializer, responses={201: NodeSerializer}),
    update=extend_schema(request=EditedNodeSerializer, responses={200: NodeSerializer}),
    partial_update=extend_schema(request=EditedNodeSerializer, responses={200: NodeSerializer}),
    destroy=extend_schema(responses={204: None}),
)
class RuleNodeViewSet(ReadViewSet[RuleNode]):
    """The nodes of one chain. After every change the chain as a whole must be valid, else nothing is changed.

    Fields in `errors` count the nodes of the whole chain as it would have been.
    """

    resource = "rule-chains"
    organization_path = "chain__organization"
    queryset = RuleNode.objects.select_related("chain__organization")
    serializer_class = NodeSerializer
    verbs: ClassVar = dict.fromkeys(("create", "update", "partial_update", "destroy"), "change")

    def get_queryset(self) -> QuerySet[RuleNode]:
        return super().get_queryset().filter(chain__uuid=self.kwargs["chain_uuid"])

    def list(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._chain()
        return super().list(request, *args, **kwargs)

    @transaction.atomic
    def create(self, request: Request, **_: Any) -> Response:
        chain = self._chain(to_change=True)
        serializer = NewNodeSerializer(data=request.data, context=self.get_serializer_context())
        serializer.is_valid(raise_exception=True)
        values = dict(serializer.validated_data)
        previous = values.pop("previous", None)
        new = RuleNode(chain=chain, **values)
        with refusing():
            editing.save(chain, editing.insert(list(chain.nodes.all()), new, after=previous), by=_name(request))
        return Response(self.get_serializer(new).data, status=status.HTTP_201_CREATED)

    @transaction.atomic
    def update(self, request: Request, *, partial: bool = False, **_: Any) -> Response:
        chain = self._chain(to_change=True)
        nodes = list(chain.nodes.all())
        node = self._node(nodes)
        context = self.get_serializer_context()
        serializer = EditedNodeSerializer(node, data=request.data, partial=partial, context=context)
        serializer.is_valid(raise_exception=True)
        editing.rename(nodes, node.name, serializer.validated_data.get("name", node.name))
        for name, value in serializer.validated_data.items():
            setattr(node, name, value)
        with refusing():
            editing.save(chain, nodes, by=_name(request))
        return Response(self.get_serializer(node).data)

    def partial_update(self, request: Request, **kwargs: Any) -> Response:
        return self.update(request, partial=True, **kwargs)

    @transaction.atomic
    def destroy(self, request: Request, **_: Any) -> Response:
        chain = self._chain(to_change=True)
        nodes = list(chain.nodes.all())
        with refusing():
            editing.save(chain, editing.remove(nodes, self._node(nodes)), by=_name(request))
        return Response(status=status.HTTP_204_NO_CONTENT)

    def _chain(self, *, to_change: bool = False) -> RuleChain:
        """The chain of the URL; locked, and 403 without the right, when it is to be changed."""
        rows = self.access.limit(RuleChain.objects.all(), "organization", resource=self.resource)
        chain = get_object_or_404(rows, uuid=self.kwargs["chain_uuid"])
        if not to_change:
            return chain
        self.access.demand("change", self.resource, chain.organization_id)
        return _locked(chain)

    def _node(self, nodes: Sequence[RuleNode]) -> RuleNode:
        node = next((node for node in nodes if node.uuid == self.kwargs["uuid"]), None)
        if node is None:
            raise NotFound
        return node


class Vetoed(APIException):
    """An interlock does not let this happen now."""

    status_code = status.HTTP_409_CONFLICT
    default_code = "vetoed"


@extend_schema_view(
    create=extend_schema(
        summary="Switch a device", request=StateCommandSerializer, responses={201: StateInstanceSerializer}
    )
)
class StateInstanceViewSet(ScopedViewSet[DeviceState]):
    """A person switches a device; the change goes out on all protocols."""

    resource = "state-changes"
    organization_path = "device__organization"
    queryset = DeviceState.objects.select_related("device__organization")
    serializer_class = StateCommandSerializer

    def create(self, request: Request) -> Response:
        wish = self.get_serializer(data=request.data)
        wish.is_valid(raise_exception=True)
        state = self._state(wish.validated_data["deviceUuid"], wish.validated_data["stateName"])
        value, override = wish.validated_data["value"], wish.validated_data["override"]
        if override:
            self.access.demand("change", "interlocks", state.device.organization_id)
        try:
            change = states.change_by_person(
                state, value, user=cast("AbstractBaseUser", request.user), override=override
            )
        except DjangoValidationError as error:
            raise ValidationError(in_camel_case(error)) from error
        except states.ChangeVetoed as error:
            raise Vetoed(str(error)) from error
        except RedisError as error:
            raise Unavailable(f"What its interlock requires cannot be read: {redis.explain(error)}") from error
        return Response(StateInstanceSerializer(change).data, status=status.HTTP_201_CREATED)

    def _state(self, device_uuid: UUID, name: str) -> DeviceState:
        devices = self.access.limit(Device.objects.all(), "organization", resource="devices")
        device = devices.filter(uuid=device_uuid).first()
        if device is None:
            raise ValidationError({"deviceUuid": [f"There is none with the uuid {device_uuid}."]})
        self.access.demand("add", self.resource, device.organization_id, area=device.area_id)
        states_of_device = list(self.get_queryset().filter(device=device))
        found = next((state for state in states_of_device if state.name == name), None)
        if found is None:
            names = ", ".join(state.name for state in states_of_device) or "none"
            raise ValidationError({"stateName": [f"{device.name} has no such state; it has: {names}."]})
        return found
