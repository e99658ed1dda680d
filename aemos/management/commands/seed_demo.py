"""`manage.py seed_demo`: makes a small farm to try AEMOS on, and writes what its sensors and people need to log in."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandParser
from django.db import transaction
from django.utils import timezone

from aemos import demo_week
from devices import tokens
from devices.models import Device, DeviceState, DeviceToken, Membership, Organization, Role, Sensor, Variable
from devices.values import Datatype
from rules.authoring import editing
from rules.models import RuleChain, RuleNode

VARIABLES = {"ph": "", "ec": "mS/cm", "temperature": "°C", "waterLevel": "%"}
USERNAME = "admin"


class Command(BaseCommand):
    help = "Create the demo farm (two reservoirs, a dosing pump, a fan, three rule chains). What exists is kept."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--output", type=Path, required=True, help="File for logins and tokens; only you can read it."
        )
        parser.add_argument(
            "--history", action="store_true", help="Also a week of readings, for sensors that have none yet."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        path: Path = options["output"]
        with transaction.atomic():
            farm = _farm(_kept_password(path))
            if options["history"]:
                sensors = Sensor.objects.filter(organization__uuid=farm["organization"]).order_by("name")
                demo_week.fill(list(sensors), end=timezone.now())
        _write_private(path, json.dumps(farm, indent=2))
        self.stdout.write(f"The demo farm is ready, its logins and tokens are in {path}.")


def _farm(password: str) -> dict[str, Any]:
    organization, _ = Organization.objects.get_or_create(name="Demo farm")
    password = _admin(organization, password)
    reservoirs = [_reservoir(organization, name) for name in ("Reservoir A", "Reservoir B")]
    pump = _device(organization, "Dosing pump", "power", ["on", "off"])
    fan = _device(organization, "Fan", "speed", ["off", "low", "high"])
    _chains(organization, reservoirs, pump, fan)
    return {
        "admin": {"username": USERNAME, "password": password},
        "organization": str(organization.uuid),
        "sensors": [_speaker(sensor) for sensor in reservoirs],
        "devices": [_speaker(device) for device in (pump, fan)],
    }


def _admin(organization: Organization, password: str) -> str:
    user, created = User.objects.get_or_create(username=USERNAME, defaults={"is_staff": True, "is_superuser": True})
    if created or not password or not user.check_password(password):
        password = secrets.token_urlsafe(12)
        user.set_password(password)
        user.save()
    Membership.objects.get_or_create(user=user, organization=organization, defaults={"role": Role.ADMIN})
    return password


def _reservoir(organization: Organization, name: str) -> Sensor:
    sensor, _ = Sensor.objects.get_or_create(organization=organization, name=name)
    for variable, unit in VARIABLES.items():
        Variable.objects.get_or_create(sensor=sensor, name=variable, defaults={"unit": unit})
    return sensor


def _device(organization: Organization, name: str, state: str, values: list[str]) -> Device:
    device, _ = Device.objects.get_or_create(organization=organization, name=name)
    defaults = {"datatype": Datatype.STRING, "allowed_values": values}
    DeviceState.objects.get_or_create(device=device, name=state, defaults=defaults)
    return device


def _speaker(owner: Sensor | Device) -> dict[str, str]:
    """Name, uuid and tokens: the second is for whoever listens beside the device, because a token is one connection to the
    broker."""
    demo, listener = (_token(owner, name) for name in ("demo", "demo listener"))
    return {"name": owner.name, "uuid": str(owner.uuid), "token": demo, "listenerToken": listener}


def _token(owner: Sensor | Device, name: str) -> str:
    """The server can show it again because it derives it from the prefix."""
    row = owner.tokens.live().filter(name=name).first()
    return tokens.token_for(row.prefix) if row else DeviceToken.objects.issue(owner, name=name)[1]


def _chains(organization: Organization, reservoirs: list[Sensor], pump: Device, fan: Device) -> None:
    ph_high = _filter(reservoirs[0], "ph", ">", 6.5)
    ph_low = _filter(reservoirs[0], "ph", "<", 6.2)
    warm = {"type": "OR", "expressions": [_filter(sensor, "temperature", ">", 26) for sensor in reservoirs]}
    _chain(
        organization, "Dose when pH is high", [("pH above 6.5", ph_high), ("pump on", _command(pump, "power", "on"))]
    )
    _chain(organization, "Stop dosing", [("pH below 6.2", ph_low), ("pump off", _command(pump, "power", "off"))])
    cool = [
        ("too warm", warm),
        ("fan high", _command(fan, "speed", "high")),
        ("fan off", _command(fan, "speed", "off")),
    ]
    _chain(organization, "Cool the greenhouse", cool)


def _filter(sensor: Sensor, key: str, operator: str, value: float) -> dict[str, Any]:
    return {"sourceType": "sensor", "UUID": str(sensor.uuid), "key": key, "operator": operator, "value": value}


def _command(device: Device, state: str, value: str) -> dict[str, Any]:
    return {"type": "device_command", "deviceUuid": str(device.uuid), "stateName": state, "value": value}


def _chain(organization: Organization, name: str, steps: list[tuple[str, dict[str, Any]]]) -> None:
    """A filter, what follows when it is true, and, if there is a third step, what follows when it is false."""
    if RuleChain.objects.filter(organization=organization, name=name).exists():
        return
    names = [step for step, _ in steps]
    nodes = [
        RuleNode(name=step, type=RuleNode.Type.ACTION if position else RuleNode.Type.FILTER, config=config)
        for position, (step, config) in enumerate(steps)
    ]
    nodes[0].next = names[1]
    nodes[0].on_false = names[2] if len(names) == 3 else ""
    editing.save(RuleChain(organization=organization, name=name), nodes)


def _kept_password(path: Path) -> str:
    try:
        password: str = json.loads(path.read_text(encoding="utf-8"))["admin"]["password"]
    except (OSError, ValueError, LookupError):
        return ""
    return password


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    aside.replace(path)
