"""The REST API of rule chains, their nodes and switching by hand: requests in, JSON out."""

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
from drf_spectacular.utils import OpenApiResponse, extend_schema, extend_schema_view
from rest_framework import status
from rest_framework.exceptions import NotFound, ValidationError
from rest_framework.request import Request
from rest_framework.response import Response

from devices.filters import BooleanFilter, CharFilter, ChoiceFilter, FilterSet, by_uuid
from devices.models import Device, DeviceState
from devices.serializers import in_camel_case
from devices.viewsets import EditViewSet, ReadViewSet, ScopedViewSet
from rules import editing, states
from rules.exceptions import InvalidChain
from rules.models import RuleChain, RuleNode
from rules.serializers import (
    ChainRefused,
    EditedNodeSerializer,
    NewNodeSerializer,
    NodeSerializer,
    RuleChainSerializer,
    StateCommandSerializer,
    StateInstanceSerializer,
    ValidationErrorsSerializer,
)

REFUSED = OpenApiResponse(ValidationErrorsSerializer, description="Nothing was changed; every problem is listed.")


class RuleChainFilter(FilterSet):
    organization = by_uuid("organization")
    name = CharFilter(lookup_expr="icontains")
    enabled = BooleanFilter()
    executionType = ChoiceFilter(  # noqa: N815  the API speaks camelCase
        field_name="execution_type", choices=RuleChain.ExecutionType.choices
    )


@extend_schema_view(
    create=extend_schema(responses={201: RuleChainSerializer, 400: REFUSED}),
    update=extend_schema(responses={200: RuleChainSerializer, 400: REFUSED}),
    partial_update=extend_schema(responses={200: RuleChainSerializer, 400: REFUSED}),
)
class RuleChainViewSet(EditViewSet[RuleChain]):
    """Rule chains with their nodes. `nodes` in a PUT or PATCH replaces all nodes at once."""

    resource = "rule-chains"
    queryset = RuleChain.objects.select_related("organization").prefetch_related("nodes")
    serializer_class = RuleChainSerializer
    filterset_class = RuleChainFilter

    def get_object(self) -> RuleChain:
        """Locked when it is to be changed, so that changes that cross do not undo one another."""
        chain = super().get_object()
        if self.request.method in ("PUT", "PATCH"):
            return locked_chain(chain)
        return chain

    @transaction.atomic
    def update(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().update(request, *args, **kwargs)

    def perform_destroy(self, instance: RuleChain) -> None:
        editing.delete(instance)


def locked_chain(chain: RuleChain) -> RuleChain:
    return get_object_or_404(
        RuleChain.objects.select_for_update(of=("self",)).select_related("organization"), pk=chain.pk
    )


@contextmanager
def refusing() -> Iterator[None]:
    """Answers 400 with every problem when the chain inside is refused."""
    try:
        yield
    except InvalidChain as error:
        raise ChainRefused(error.problems) from error


@extend_schema_view(
    create=extend_schema(request=NewNodeSerializer, responses={201: NodeSerializer, 400: REFUSED}),
    update=extend_schema(request=EditedNodeSerializer, responses={200: NodeSerializer, 400: REFUSED}),
    partial_update=extend_schema(request=EditedNodeSerializer, responses={200: NodeSerializer, 400: REFUSED}),
    destroy=extend_schema(responses={204: None, 400: REFUSED}),
)
class RuleNodeViewSet(ReadViewSet[RuleNode]):
    """The nodes of one chain. After every change the chain as a whole must be valid, else nothing is changed.

    Paths in `validationErrors` count the nodes of the whole chain as it would have been.
    """

    resource = "rule-chains"
    organization_path = "chain__organization"
    queryset = RuleNode.objects.select_related("chain__organization")
    serializer_class = NodeSerializer
    verbs: ClassVar = dict.fromkeys(("create", "update", "partial_update", "destroy"), "change")

    def get_queryset(self) -> QuerySet[RuleNode]:
        return super().get_queryset().filter(chain__uuid=self.kwargs["chain_uuid"])

    def list(self, request: Request, *args: Any, **kwargs: Any) -> Response:
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
            editing.save(chain, editing.insert(list(chain.nodes.all()), new, after=previous))
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
            editing.save(chain, nodes)
        return Response(self.get_serializer(node).data)

    def partial_update(self, request: Request, **kwargs: Any) -> Response:
        return self.update(request, partial=True, **kwargs)

    @transaction.atomic
    def destroy(self, request: Request, **_: Any) -> Response:
        chain = self._chain(to_change=True)
        nodes = list(chain.nodes.all())
        with refusing():
            editing.save(chain, editing.remove(nodes, self._node(nodes)))
        return Response(status=status.HTTP_204_NO_CONTENT)

    def _chain(self, *, to_change: bool = False) -> RuleChain:
        """The chain of the URL; locked, and 403 without the right, when it is to be changed."""
        rows = self.access.limit(RuleChain.objects.all(), "organization", resource=self.resource)
        chain = get_object_or_404(rows, uuid=self.kwargs["chain_uuid"])
        if not to_change:
            return chain
        self.access.demand("change", self.resource, chain.organization_id)
        return locked_chain(chain)

    def _node(self, nodes: Sequence[RuleNode]) -> RuleNode:
        node = next((node for node in nodes if node.uuid == self.kwargs["uuid"]), None)
        if node is None:
            raise NotFound
        return node


@extend_schema_view(create=extend_schema(request=StateCommandSerializer, responses={201: StateInstanceSerializer}))
class StateInstanceViewSet(ScopedViewSet[DeviceState]):
    """A person switches a device; all protocols tell it."""

    resource = "state-changes"
    organization_path = "device__organization"
    queryset = DeviceState.objects.select_related("device__organization")
    serializer_class = StateCommandSerializer

    def create(self, request: Request) -> Response:
        wish = self.get_serializer(data=request.data)
        wish.is_valid(raise_exception=True)
        state = self._state(wish.validated_data["deviceUuid"], wish.validated_data["stateName"])
        try:
            change = states.change_by_person(
                state, wish.validated_data["value"], user=cast("AbstractBaseUser", request.user)
            )
        except DjangoValidationError as error:
            raise ValidationError(in_camel_case(error)) from error
        return Response(StateInstanceSerializer(change).data, status=status.HTTP_201_CREATED)

    def _state(self, device_uuid: UUID, name: str) -> DeviceState:
        devices = self.access.limit(Device.objects.all(), "organization", resource="devices")
        device = devices.filter(uuid=device_uuid).first()
        if device is None:
            raise ValidationError({"deviceUuid": [f"There is none with the uuid {device_uuid}."]})
        self.access.demand("add", self.resource, device.organization_id)
        states_of_device = list(self.get_queryset().filter(device=device))
        found = next((state for state in states_of_device if state.name == name), None)
        if found is None:
            names = ", ".join(state.name for state in states_of_device) or "none"
            raise ValidationError({"stateName": [f"{device.name} has no such state; it has: {names}."]})
        return found
