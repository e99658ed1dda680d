"""The pages: an overview of a farm, and the charts of a sensor."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe
from redis.exceptions import RedisError

from devices.models import Sensor
from devices.permissions import access_of
from pages import organizations, overview

# Spans of the charts: what it says, and its hours.
SPANS = (("1 hour", 1), ("6 hours", 6), ("1 day", 24), ("7 days", 168), ("30 days", 720), ("1 year", 8_760))


@never_cache
@login_required(login_url="admin:login")
@require_safe
def overview_page(request: HttpRequest) -> HttpResponse:
    access = access_of(request)
    known = organizations.known_to(access)
    chosen = organizations.chosen(request, known)
    context: dict[str, Any] = {"organizations": known, "organization": chosen}
    if chosen is not None:
        try:
            context["overview"] = overview.of(chosen, access)
        except RedisError:
            context["problem"] = (
                "Redis does not answer: newest values are not known now. This page tries again by itself."
            )
    return render(request, "pages/overview.html", context, status=503 if "problem" in context else 200)


@never_cache
@login_required(login_url="admin:login")
@require_safe
def sensor_page(request: HttpRequest, uuid: str) -> HttpResponse:
    rows = access_of(request).limit(Sensor.objects.select_related("organization"), "organization", resource="sensors")
    sensor = rows.filter(uuid=uuid).first()
    if sensor is None:
        raise Http404("There is no such sensor.")
    variables = [each for each in sensor.variables.order_by("name") if each.datatype != "string"]
    context = {"sensor": sensor, "organization": sensor.organization, "variables": variables, "spans": SPANS}
    return render(request, "pages/sensor.html", context)
