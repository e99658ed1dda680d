"""Build rows for tests: name what matters to the test, the rest has sensible values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from django.contrib.auth.models import User
from django.test import Client

from devices.models import Device, DeviceState, DeviceToken, Membership, Organization, Role, Sensor, Variable
from rules.authoring import editing
from rules.engine.actions import ACTIONS
from rules.models import RuleChain, RuleNode

_numbers = count(1)


def organization(name: str = "") -> Organization:
    return Organization.objects.create(name=name or f"Farm {next(_numbers)}")


def user(username: str = "", *, password: str = "", **fields: Any) -> User:
    """A person, who can log in only if a password is given, because hashing it takes long."""
    row = User(username=username or f"person{next(_numbers)}", **fields)
    row.set_password(password or None)
    row.save()
    return row


def client_of(person: User) -> Client:
    """Logged in, as a browser is."""
    client = Client()
    client.force_login(person)
    return client


def member(of: Organization, role: str = Role.VIEWER, **fields: Any) -> User:
    person = user(**fields)
    Membership.objects.create(user=person, organization=of, role=role)
    return person


def sensor(of: Organization, name: str = "", *, variables: Mapping[str, str] | None = None) -> Sensor:
    """A sensor with variables, name -> datatype; a number `ph` by default."""
    row = Sensor.objects.create(organization=of, name=name or f"Sensor {next(_numbers)}")
    for variable, datatype in ({"ph": "number"} if variables is None else variables).items():
        Variable.objects.create(sensor=row, name=variable, datatype=datatype)
    return row


def device(of: Organization, name: str = "", *, states: Mapping[str, Sequence[Any]] | None = None) -> Device:
    """A device with states of texts, name -> allowed values; a `power` that is on or off by default."""
    row = Device.objects.create(organization=of, name=name or f"Device {next(_numbers)}")
    for state, allowed in ({"power": ["on", "off"]} if states is None else states).items():
        DeviceState.objects.create(device=row, name=state, allowed_values=list(allowed))
    return row


def token(owner: Sensor | Device, **fields: Any) -> str:
    """A device token as the device would show it."""
    shown: str = DeviceToken.objects.issue(owner, **fields)[1]
    return shown


def leaf(source: Sensor | Device, key: str = "ph", operator: str = "<", value: Any = 5.5) -> dict[str, Any]:
    """The configuration of a filter with one comparison."""
    source_type = "sensor" if isinstance(source, Sensor) else "device"
    return {"sourceType": source_type, "UUID": str(source.uuid), "key": key, "operator": operator, "value": value}


def command(target: Device, value: Any = "on", *, state: str = "power") -> dict[str, Any]:
    """The configuration of an action that switches a device."""
    return {"type": "device_command", "deviceUuid": str(target.uuid), "stateName": state, "value": value}


def node(name: str, config: Mapping[str, Any], *, next: str = "", on_false: str = "", on_failure: str = "") -> RuleNode:
    """An unsaved node; its type follows from its configuration."""
    kind = "transform" if "operation" in config else "action" if config.get("type") in ACTIONS else "filter"
    return RuleNode(name=name, type=kind, config=dict(config), next=next, on_false=on_false, on_failure=on_failure)


def chain(of: Organization, nodes: Sequence[RuleNode], name: str = "", **fields: Any) -> RuleChain:
    """A valid chain, saved as the API and the admin save it."""
    row = RuleChain(organization=of, name=name or f"Chain {next(_numbers)}", **fields)
    editing.save(row, nodes)
    return row


def switching_chain(source: Sensor, target: Device, *, value: Any = "on", **fields: Any) -> RuleChain:
    """A chain that switches the device's power when the sensor's ph is below 5.5."""
    nodes = [node("low", leaf(source), next="switch"), node("switch", command(target, value))]
    return chain(source.organization, nodes, **fields)
