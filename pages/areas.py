"""The page of a farm's areas: the tree, with forms to add, rename and delete; and where sensors and devices stand."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from django import forms
from django.contrib import messages
from django.core.exceptions import ValidationError
from django.db.models import Count
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy
from django.views.decorators.http import require_http_methods, require_POST

from devices.areas.models import people_of, tree
from devices.models import Area, Device, Organization, Sensor
from devices.permissions import access_of
from pages import organizations
from pages.place import demand, page, row_of


class AreaChoice(forms.ChoiceField):
    """The areas of an organization as a tree, or none; gives the row."""

    def __init__(self, organization: Organization, *, none: str, **options: Any) -> None:
        self._areas = tree(Area.objects.filter(organization=organization))
        self.has_areas = bool(self._areas)
        indented = [(str(area.uuid), "\u2003" * depth + area.name) for area, depth in self._areas]
        super().__init__(choices=[("", none), *indented], required=False, **options)

    def clean(self, value: Any) -> Area | None:
        chosen = super().clean(value)
        return next((area for area, _ in self._areas if str(area.uuid) == chosen), None)


class AreaForm(forms.Form):
    name = forms.CharField(max_length=100, label=lazy("Name"))

    def __init__(self, organization: Organization, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._organization = organization
        self.fields["parent"] = AreaChoice(organization, none=_("none: it is the largest"), label=_("A part of"))

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        self.row = Area(organization=self._organization, name=data.get("name", ""), parent=data.get("parent"))
        if not self.errors:
            try:
                self.row.full_clean()
            except ValidationError as error:
                self.add_error("name", list(dict.fromkeys(error.messages)))
        return data


@page
@require_http_methods(["GET", "HEAD", "POST"])
def areas_page(request: HttpRequest) -> HttpResponse:
    organization = organizations.demanded(request, "add" if request.method == "POST" else "view", "areas")
    form = AreaForm(organization, request.POST or None)
    if request.method == "POST" and form.is_valid():
        form.row.save()
        return redirect(_address(organization))
    rows = Area.objects.filter(organization=organization).annotate(
        sensor_count=Count("sensors", distinct=True), device_count=Count("devices", distinct=True)
    )
    context = {
        "organization": organization,
        "areas": tree(rows),
        "form": form,
        "may_add": access_of(request).may("add", "areas", organization.pk),
        "page": "areas",
        "month_ago": timezone.now() - timedelta(days=30),
    }
    return render(request, "pages/areas.html", context, status=400 if request.method == "POST" else 200)


@page
@require_POST
def delete_area(request: HttpRequest, uuid: UUID) -> HttpResponse:
    area = row_of(request, Area.objects.select_related("organization"), "areas", uuid)
    demand(request, "delete", "areas", area.organization_id)
    if people := people_of(area):
        text = _("{area} stays: {people} may act only in it or a part of it. Change their memberships first.")
        messages.error(request, text.format(area=area.name, people=", ".join(people)))
    else:
        area.delete()
        text = _("{area} is deleted. What stood in it stands in none.")
        messages.success(request, text.format(area=area.name))
    return redirect(_address(area.organization))


@page
@require_POST
def put_sensor(request: HttpRequest, uuid: UUID) -> HttpResponse:
    return _put(request, Sensor, "sensors", uuid)


@page
@require_POST
def put_device(request: HttpRequest, uuid: UUID) -> HttpResponse:
    return _put(request, Device, "devices", uuid)


def chosen(request: HttpRequest, organization: Organization) -> tuple[list[tuple[Area, int]], Area | None]:
    """All areas of the organization as a tree, and the one that the address names. Raises Http404."""
    areas = tree(Area.objects.filter(organization=organization))
    wanted = request.GET.get("area", "")
    found = next((area for area, _ in areas if str(area.uuid) == wanted), None)
    if wanted and found is None:
        raise Http404("There is no such area.")
    return areas, found


def place_of(row: Sensor | Device, action: str) -> dict[str, Any]:
    """For the page of a sensor or device: where it stands, and the list of places where there are any."""
    form = forms.Form(initial={"area": str(row.area.uuid) if row.area else ""})
    form.fields["area"] = choice = AreaChoice(row.organization, none=_("no area"), label=_("Stands in"))
    return {"area": row.area, "action": action, "field": form["area"] if choice.has_areas else None}


def _put(request: HttpRequest, model: type[Sensor | Device], resource: str, uuid: UUID) -> HttpResponse:
    row: Any = row_of(request, model._default_manager.select_related("organization"), resource, uuid)
    demand(request, "change", resource, row.organization_id)
    try:
        row.area = AreaChoice(row.organization, none="").clean(request.POST.get("area", ""))
    except ValidationError:
        messages.error(request, _("There is no such area."))
    else:
        row.save(update_fields=["area"])
    return redirect("sensor-page" if resource == "sensors" else "device-page", uuid=row.uuid)


def _address(organization: Organization) -> str:
    return f"{reverse('areas-page')}?organization={organization.uuid}"
