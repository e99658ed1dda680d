"""The pages on which a farm begins, and on which a sensor or device gets its token."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.db.models import Model
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.utils.translation import gettext as _
from django.views.decorators.http import require_http_methods

from devices.models import Device, DeviceToken, Sensor
from devices.permissions import access_of
from devices.tokens import token_for
from pages import organizations
from pages.place import demand, page, row_of
from pages.setup.connect import snippets
from pages.setup.forms import DeviceForm, FarmForm, SensorForm

ISSUED = "issued_device_token"
get_and_post = require_http_methods(["GET", "HEAD", "POST"])


@page
@get_and_post
def new_farm(request: HttpRequest) -> HttpResponse:
    """For superusers, who may make organizations."""
    if not access_of(request).superuser:
        raise PermissionDenied("Only a superuser may make a farm.")
    form = FarmForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        organization = form.create(request.user)
        messages.success(request, _("{farm} is ready. Now its first sensor.").format(farm=organization))
        return redirect(f"/sensors/new?organization={organization.uuid}")
    return _form(request, form, title=_("New farm"), button=_("Make the farm"))


@page
@get_and_post
def new_sensor(request: HttpRequest) -> HttpResponse:
    organization = organizations.demanded(request, "add", "sensors")
    form = SensorForm(organization, request.POST or None)
    if request.method == "POST" and form.is_valid():
        return redirect("connect-sensor-page", uuid=form.create().uuid)
    return _form(request, form, title=_("New sensor"), button=_("Add the sensor"), organization=organization)


@page
@get_and_post
def new_device(request: HttpRequest) -> HttpResponse:
    organization = organizations.demanded(request, "add", "devices")
    form = DeviceForm(organization, request.POST or None)
    if request.method == "POST" and form.is_valid():
        return redirect("connect-device-page", uuid=form.create().uuid)
    return _form(request, form, title=_("New device"), button=_("Add the device"), organization=organization)


@page
@get_and_post
def connect_sensor(request: HttpRequest, uuid: UUID) -> HttpResponse:
    return _connect(request, Sensor, "sensor", uuid)


@page
@get_and_post
def connect_device(request: HttpRequest, uuid: UUID) -> HttpResponse:
    return _connect(request, Device, "device", uuid)


def _connect(request: HttpRequest, model: type[Model], kind: str, uuid: UUID) -> HttpResponse:
    """A new token is shown on the next page, once: only its prefix waits in the session."""
    owner: Any = row_of(request, model._default_manager.select_related("organization"), f"{kind}s", uuid)
    demand(request, "add", "device-tokens", owner.organization_id)
    if request.method == "POST":
        row, _token = DeviceToken.objects.issue(owner, name=f"made {timezone.now():%Y-%m-%d}")
        request.session[ISSUED] = row.prefix
        return redirect(request.path)
    prefix = request.session.pop(ISSUED, None)
    token = token_for(prefix) if prefix else None
    context = {
        "owner": owner,
        "kind": kind,
        "organization": owner.organization,
        "token": token,
        "snippets": snippets(request, owner, token) if token else [],
        "live_tokens": owner.tokens.live().count(),
    }
    return render(request, "pages/setup/connect.html", context)


def _form(request: HttpRequest, form: Any, **context: Any) -> HttpResponse:
    return render(
        request, "pages/setup/form.html", {"form": form, **context}, status=400 if request.method == "POST" else 200
    )
