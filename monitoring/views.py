"""Health, queue, Prometheus and the reset of the circuit over HTTP."""

from __future__ import annotations

import logging

from django.db import Error as DatabaseError
from django.http import HttpResponse
from drf_spectacular.utils import OpenApiResponse, extend_schema
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from rest_framework.authentication import SessionAuthentication
from rest_framework.parsers import FormParser, MultiPartParser
from rest_framework.permissions import IsAdminUser
from rest_framework.renderers import BaseRenderer, JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework_simplejwt.authentication import JWTAuthentication

from aemos.lib.problems import Unavailable
from devices.exceptions import Overloaded
from devices.parsers import BoundedJSONParser
from monitoring import health, serializers
from monitoring.access import MayWatch, MetricsTokenAuthentication
from monitoring.exposition import expose
from monitoring.queue import Health, look
from rules.admission import circuit_store, control

log = logging.getLogger(__name__)


class WatchView(APIView):
    """For those who may watch."""

    authentication_classes = (MetricsTokenAuthentication, JWTAuthentication, SessionAuthentication)
    permission_classes = (MayWatch,)


class HealthView(WatchView):
    @extend_schema(
        responses={
            200: serializers.HealthSerializer,
            503: OpenApiResponse(serializers.HealthSerializer, description="The queue is critical, or not known."),
        }
    )
    def get(self, request: Request) -> Response:
        """How the queue is, and what a person should know about the system."""
        view = look()
        return Response(health.body_of(view), status=503 if view.health in health.FAILING else 200)


class QueueView(WatchView):
    @extend_schema(
        responses={
            200: serializers.QueueSerializer,
            503: OpenApiResponse(serializers.QueueSerializer, description="Redis does not answer."),
        }
    )
    def get(self, request: Request) -> Response:
        """Everything about the queue: lanes, workers and circuit. Counts are events."""
        view = look()
        return Response(serializers.queue(view), status=503 if view.health is Health.UNKNOWN else 200)


class SummaryView(WatchView):
    @extend_schema(
        responses={
            200: serializers.SummarySerializer,
            503: OpenApiResponse(serializers.SummarySerializer, description="Redis does not answer."),
        }
    )
    def get(self, request: Request) -> Response:
        """The queue in five words."""
        view = look()
        return Response(serializers.summary(view), status=503 if view.health is Health.UNKNOWN else 200)


class PrometheusView(WatchView):
    @extend_schema(responses={(200, "text/plain"): str})
    def get(self, request: Request) -> HttpResponse:
        """Metrics in Prometheus' text format."""
        return HttpResponse(expose(), content_type=CONTENT_TYPE_PLAIN_0_0_4)

    def perform_content_negotiation(self, request: Request, force: bool = False) -> tuple[BaseRenderer, str]:
        """Takes whatever a scraper says it accepts: there is one format, and refusals are JSON."""
        renderer = JSONRenderer()
        return renderer, renderer.media_type


class ResetView(APIView):
    """A person closes the circuit. Its automatic transitions continue from there."""

    authentication_classes = (JWTAuthentication, SessionAuthentication)
    permission_classes = (IsAdminUser,)
    # Forms, too: a page of the admin sends its CSRF token in one.
    parser_classes = (BoundedJSONParser, FormParser, MultiPartParser)

    @extend_schema(request=None, responses=serializers.ResetSerializer)
    def post(self, request: Request) -> Response:
        """Close the circuit. Written to the log of its transitions with who did it; a queue that is too long opens it again."""
        depth, actor = _depth(), request.user.get_username()
        try:
            previous = circuit_store.load().state
            circuit_store.reset(actor, depth)
            now = circuit_store.load().state
        except DatabaseError as error:
            log.warning("the circuit was not reset: %s", error)
            raise Unavailable("The database does not answer: nothing was changed.") from error
        log.warning("%s reset the circuit from %s at %s events", actor, previous, depth)
        return Response({"circuitState": now, "previousState": previous, "queueDepth": depth, "resetBy": actor})


def _depth() -> int | None:
    try:
        return control.shared().snapshot().depth
    except Overloaded:
        return None
