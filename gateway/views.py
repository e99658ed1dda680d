"""Where the gateway is reached, for pages and programs that know only the address of the web process."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.http import HttpRequest
from django.http.request import split_domain_port
from drf_spectacular.utils import extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView


def socketio_url(request: Request | HttpRequest) -> str:
    """SOCKETIO_URL, or the host that the client asked with the port of the gateway; an IPv6 host keeps its brackets."""
    if settings.SOCKETIO_URL:
        return str(settings.SOCKETIO_URL)
    host, _ = split_domain_port(request.get_host())
    return f"{request.scheme}://{host}:{settings.SOCKETIO_PORT}"


class GatewayView(APIView):
    """Open to everybody: the address alone lets nobody in."""

    authentication_classes = ()
    permission_classes = (AllowAny,)

    @extend_schema(
        tags=["gateway"],
        summary="Where Socket.IO is served",
        responses=inline_serializer("Gateway", {"socketio": serializers.URLField()}),
    )
    def get(self, request: Request, **_: Any) -> Response:
        return Response({"socketio": socketio_url(request)})
