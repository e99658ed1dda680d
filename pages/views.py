"""The pages: an overview of a farm, and the charts of a sensor."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop as noop
from django.views.decorators.http import require_POST, require_safe
from redis.exceptions import RedisError

from devices.models import Device, Sensor, Variable
from devices.people.preferences import preferences_of
from devices.permissions import access_of
from devices.units import Scale
from pages import areas, device, marks, organizations, overview
from pages.place import demand, page, row_of
from pages.rules.choices import as_number

# Spans of the charts: what it says, and its hours.
SPANS = (
    (noop("1 hour"), 1), (noop("6 hours"), 6), (noop("1 day"), 24), (noop("7 days"), 168),
    (noop("30 days"), 720), (noop("1 year"), 8_760),
)  # fmt: skip


@page
@require_safe
def overview_page(request: HttpRequest) -> HttpResponse:
    access = access_of(request)
    known = organizations.known_to(access)
    chosen = organizations.chosen(request, known)
    context: dict[str, Any] = {"organizations": known, "organization": chosen}
    if chosen is not None:
        try:
            context["areas"], context["area"] = areas.chosen(request, chosen)
            context["search"] = search = request.GET.get("search", "").replace("\x00", "")[:100]
            number = request.GET.get("page", "1")
            context["overview"] = overview.of(
                chosen,
                access,
                units=preferences_of(request).units,
                area=context["area"],
                search=search,
                page=int(number) if number.isdecimal() and len(number) < 6 else 1,
            )
        except RedisError:
            context["problem"] = _(
                "Redis does not answer: newest values are not known now. This page tries again by itself."
            )
    return render(request, "pages/overview.html", context, status=503 if "problem" in context else 200)


@page
@require_safe
def sensor_page(request: HttpRequest, uuid: str) -> HttpResponse:
    sensor = _sensor(request, uuid)
    units = preferences_of(request).units
    rows = [(row, units.scale_of(row.unit)) for row in sensor.variables.order_by("name") if row.datatype != "string"]
    variables = [(row, scale, *_target(row, scale)) for row, scale in rows]
    context = {
        "sensor": sensor,
        "organization": sensor.organization,
        "variables": variables,
        "spans": SPANS,
        "place": areas.place_of(sensor, reverse("put-sensor", args=[sensor.uuid])),
        "may_connect": access_of(request).may("add", "device-tokens", sensor.organization_id),
    }
    return render(request, "pages/sensor.html", context)


@page
@require_safe
def marks_of_sensor(request: HttpRequest, uuid: str) -> HttpResponse:
    return marks.answer(request, _sensor(request, uuid))


@page
@require_POST
def set_target(request: HttpRequest, uuid: str) -> HttpResponse:
    """The target range of one variable, `from` and `to`; an empty one is no limit."""
    sensor = _sensor(request, uuid)
    demand(request, "change", "variables", sensor.organization_id)
    variable = sensor.variables.filter(name=request.POST.get("variable", "").replace("\x00", "")).first()
    if variable is None:
        raise Http404("There is no such variable.")
    given = {each: as_number(request.POST.get(each, "")) for each in ("from", "to")}
    if wrong := [each for each in given.values() if isinstance(each, str) and each]:
        text = _("{name}: {text} is no number. Nothing was changed.")
        messages.error(request, text.format(name=variable.name, text=", ".join(wrong)))
        return redirect("sensor-page", uuid=sensor.uuid)
    scale = preferences_of(request).units.scale_of(variable.unit)
    limits = (None if each == "" else scale.stored(each) for each in given.values())
    variable.target_minimum, variable.target_maximum = limits
    try:
        variable.clean()
    except ValidationError as error:
        text = _("{name}: {why}. Nothing was changed.")
        messages.error(request, text.format(name=variable.name, why=" ".join(error.messages)))
    else:
        variable.save()
        messages.success(request, _("The target range of {name} is set.").format(name=variable.name))
    return redirect("sensor-page", uuid=sensor.uuid)


@page
@require_safe
def device_page(request: HttpRequest, uuid: str) -> HttpResponse:
    access = access_of(request)
    found = row_of(request, Device.objects.select_related("organization", "area"), "devices", uuid)
    context = {
        "device": found,
        "organization": found.organization,
        "shown": device.of(found),
        "place": areas.place_of(found, reverse("put-device", args=[found.uuid])),
        "may_switch": access.may("add", "state-changes", found.organization_id, area=found.area_id),
        "may_connect": access.may("add", "device-tokens", found.organization_id),
    }
    return render(request, "pages/device.html", context)


def _target(variable: Variable, scale: Scale) -> tuple[str, str]:
    """The ends of its target range as texts, empty where there is none."""
    low, high = variable.target_minimum, variable.target_maximum
    return tuple("" if each is None else f"{scale.shown(each):g}" for each in (low, high))  # type: ignore[return-value]


def _sensor(request: HttpRequest, uuid: str) -> Sensor:
    return row_of(request, Sensor.objects.select_related("organization", "area"), "sensors", uuid)
