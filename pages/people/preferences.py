"""The page on which a person chooses language, time zone and units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from zoneinfo import available_timezones

from django import forms
from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils import translation
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy
from django.views.decorators.http import require_http_methods

from devices import units
from devices.models import Preferences
from devices.people.preferences import preferences_of
from pages.place import page


def _zones() -> list[tuple[str, str]]:
    """Those named after places; the rest are older names of the same, or offsets."""
    named = sorted(zone for zone in available_timezones() if "/" in zone and not zone.startswith(("Etc/", "SystemV/")))
    return [("", _("as the browser says")), ("UTC", "UTC"), *((zone, zone.replace("_", " ")) for zone in named)]


def _units(offered: Iterable[str]) -> list[tuple[str, Any]]:
    return [("", lazy("as sensors report it")), *((each, each) for each in offered)]


class PreferencesForm(forms.ModelForm):  # type: ignore[type-arg]  # not subscriptable at run time
    language = forms.ChoiceField(
        required=False,
        choices=[("", lazy("as the browser says")), *settings.LANGUAGES],
        label=lazy("Language"),
    )
    time_zone = forms.ChoiceField(required=False, choices=_zones, label=lazy("Time zone"))
    temperature = forms.ChoiceField(
        required=False, choices=_units((units.CELSIUS, units.FAHRENHEIT)), label=lazy("Temperature")
    )
    conductivity = forms.ChoiceField(
        required=False,
        choices=_units((units.MILLISIEMENS, units.MICROSIEMENS, units.PPM_500, units.PPM_700)),
        label=lazy("Conductivity (EC)"),
        help_text=lazy("ppm (500) is the scale of NaCl, ppm (700) that of KCl: take the one of your meter"),
    )

    class Meta:
        model = Preferences
        fields = ("language", "time_zone", "temperature", "conductivity")


@page
@require_http_methods(["GET", "HEAD", "POST"])
def preferences_page(request: HttpRequest) -> HttpResponse:
    mine = preferences_of(request)
    form = PreferencesForm(request.POST or None, instance=mine)
    if request.method == "POST" and form.is_valid():
        mine.user_id = request.user.pk  # type: ignore[assignment]  # who is logged in has one
        form.save()
        with translation.override(mine.language or translation.get_language_from_request(request)):
            messages.success(request, _("Saved."))
        return redirect("preferences")
    context = {
        "form": form,
        "title": _("Preferences"),
        "button": _("Save"),
        "page": "preferences",
        "note": _("For the pages. Devices, the API and exports keep the units of the sensors, and times in UTC."),
    }
    return render(request, "pages/setup/form.html", context, status=400 if request.method == "POST" else 200)
