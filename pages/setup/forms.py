"""Forms for a farm, a sensor with what it measures, and a device with what it can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from django import forms
from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy

from devices.models import Device, DeviceState, Membership, Organization, Role, Sensor, Variable
from devices.values import Datatype
from pages.areas import AreaChoice

if TYPE_CHECKING:
    from django_stubs_ext import StrOrPromise


class Quantity(NamedTuple):
    """Something that many sensors measure: what it is called in readings, and for people."""

    name: str
    label: StrOrPromise
    unit: str


QUANTITIES = (
    Quantity("ph", "pH", ""),
    Quantity("ec", "EC", "mS/cm"),
    Quantity("temperature", lazy("temperature"), "°C"),
    Quantity("waterLevel", lazy("water level"), "%"),
    Quantity("dissolvedOxygen", lazy("dissolved oxygen"), "mg/l"),
    Quantity("humidity", lazy("humidity"), "%"),
    Quantity("vpd", "VPD", "kPa"),
    Quantity("co2", "CO2", "ppm"),
    Quantity("light", lazy("light"), "µmol/m²s"),
)
_KNOWN: Mapping[str, Quantity] = {each.name: each for each in QUANTITIES}
# What a device can do: its name, what a person reads, and the fields of its state.
KINDS: Mapping[str, tuple[str, StrOrPromise, dict[str, Any]]] = {
    "switch": (
        "power",
        lazy("switch on and off: a pump, a lamp, a valve"),
        {"allowed_values": ["on", "off"], "safe_value": "off"},
    ),
    "dose": (
        "dose",
        lazy("dose an amount, in ml"),
        {"kind": DeviceState.Kind.MOMENTARY, "datatype": Datatype.NUMBER},
    ),
    "speed": (
        "speed",
        lazy("run at a speed: off, low, high"),
        {"allowed_values": ["off", "low", "high"], "safe_value": "off"},
    ),
    "percent": (
        "level",
        lazy("go to a percentage: a dimmer, a vent"),
        {"datatype": Datatype.NUMBER, "safe_value": 0},
    ),
}


class FarmForm(forms.ModelForm):  # type: ignore[type-arg]  # not subscriptable at run time
    class Meta:
        model = Organization
        fields = ("name",)
        labels: Mapping[str, Any] = {"name": lazy("Name of your farm")}

    def create(self, user: Any) -> Organization:
        """The farm, with its maker as admin."""
        with transaction.atomic():
            organization: Organization = self.save()
            Membership.objects.create(user=user, organization=organization, role=Role.ADMIN)
        return organization


class _PlacedForm(forms.Form):
    """Of something that has a name and stands somewhere."""

    def __init__(self, organization: Organization, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._organization = organization
        place = AreaChoice(organization, none=_("no area"), label=_("Stands in"))
        if place.has_areas:
            self.fields["area"] = place

    def _own(self) -> dict[str, Any]:
        data = self.cleaned_data
        return {"organization": self._organization, "name": data["name"], "area": data.get("area")}


class SensorForm(_PlacedForm):
    name = forms.CharField(
        max_length=200,
        label=lazy("Name"),
        help_text=lazy("such as Tank 1, or the place where it hangs"),
    )
    measures = forms.MultipleChoiceField(
        choices=lambda: [(each.name, f"{each.label}{', ' if each.unit else ''}{each.unit}") for each in QUANTITIES],
        required=False,
        widget=forms.CheckboxSelectMultiple,
        label=lazy("What it measures"),
    )
    others = forms.CharField(
        required=False,
        max_length=500,
        label=lazy("Something else"),
        help_text=lazy("names with their units, separated by commas: flow l/min, orp mV"),
    )

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        data["variables"] = variables = dict(self._variables())
        if not variables and not self.errors:
            self.add_error("measures", _("choose at least one"))
        self._try(Sensor(organization=self._organization, name=data.get("name", "")), "name")
        for name, unit in variables.items():
            self._try(Variable(name=name, unit=unit), "others")
        return data

    def _variables(self) -> Iterator[tuple[str, str]]:
        for name in self.cleaned_data.get("measures", ()):
            yield name, _KNOWN[name].unit
        for each in self.cleaned_data.get("others", "").split(","):
            if words := each.split(None, 1):
                yield words[0], words[1].strip() if len(words) > 1 else ""

    def _try(self, row: Sensor | Variable, field: str) -> None:
        _explain(self, row, field, exclude={"sensor"})

    @transaction.atomic
    def create(self) -> Sensor:
        sensor = Sensor.objects.create(**self._own())
        for name, unit in self.cleaned_data["variables"].items():
            Variable.objects.create(sensor=sensor, name=name, unit=unit)
        return sensor


class DeviceForm(_PlacedForm):
    name = forms.CharField(max_length=200, label=lazy("Name"), help_text=lazy("such as Dosing pump, Fan or Lamp 2"))
    kinds = forms.MultipleChoiceField(
        choices=[(key, text) for key, (_, text, _) in KINDS.items()],
        widget=forms.CheckboxSelectMultiple,
        label=lazy("What it can do"),
        error_messages={"required": lazy("choose at least one")},
    )

    def clean(self) -> dict[str, Any]:
        data = self.cleaned_data
        _explain(self, Device(organization=self._organization, name=data.get("name", "")), "name")
        return data

    @transaction.atomic
    def create(self) -> Device:
        device = Device.objects.create(**self._own())
        for key in self.cleaned_data["kinds"]:
            name, _, fields = KINDS[key]
            DeviceState.objects.create(device=device, name=name, **fields)
        return device


def _explain(form: forms.Form, row: Any, field: str, *, exclude: set[str] | None = None) -> None:
    """What is wrong with a row that is not saved yet, at the field of the form that it comes from."""
    if field in form.errors:
        return
    try:
        row.full_clean(exclude=exclude)
    except ValidationError as error:
        form.add_error(field, _texts(error))


def _texts(error: ValidationError) -> Sequence[str]:
    return list(dict.fromkeys(error.messages))
