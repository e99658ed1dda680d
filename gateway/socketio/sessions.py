"""Sessions of people over Socket.IO: their rooms, and which messages each may receive.

Rooms: `organization-{uuid}`, `device-uuid-{uuid}` and `telemetry-{variable uuid}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from devices.models import Device, Variable
from gateway.people import Login
from gateway.transport import TransportError
from notifications.messages import Message

ORGANIZATION, DEVICE, TELEMETRY = "organization-", "device-uuid-", "telemetry-"


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    """One connected person.

    `organizations` are those whose rooms may be joined, uuid -> the person's role; `rooms` the joined ones with their
    organization. While `is_live` is false messages reach the session through a replay, and it receives nothing else.
    """

    login: Login
    expires_at: float
    organizations: Mapping[str, str]
    rooms: dict[str, str] = field(default_factory=dict)
    is_live: bool = True

    def receives(self, message: Message) -> bool:
        """Whether the session is in a room of the message and has one of the roles it is meant for."""
        role = self.organizations.get(message.organization_uuid)
        try:
            roles = roles_of(message)
        except TransportError:
            return False
        if role is None or (roles and role not in roles):
            return False
        return any(room in self.rooms for room in rooms_of(message))


def rooms_of(message: Message) -> list[str]:
    rooms = [ORGANIZATION + message.organization_uuid]
    if message.device_uuid:
        rooms.append(DEVICE + message.device_uuid)
    return rooms


def roles_of(message: Message) -> list[str]:
    """The roles whose holders alone are notified; empty: everybody is. TransportError when they are no list of roles."""
    roles = message.payload.get("roles") or []
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise TransportError(f"payload.roles must be a list of roles, not {roles!r}", permanent=True)
    return roles


def canonical_room(arguments: tuple[object, ...]) -> str:
    """The room that a client names, with its uuid as the server writes it; empty when it names none."""
    named = arguments[0] if arguments else None
    room = named.get("room") if isinstance(named, Mapping) else named
    if isinstance(room, str):
        for prefix in (ORGANIZATION, DEVICE, TELEMETRY):
            if room.startswith(prefix):
                return prefix + _uuid(room.removeprefix(prefix))
    return ""


def organization_of(room: str) -> str | None:
    """The uuid of the organization that a room belongs to; None when there is no such room."""
    kind, uuid = room[:-36], room[-36:]
    if kind == ORGANIZATION:
        return uuid
    if kind == DEVICE:
        found = Device.objects.filter(uuid=uuid).values_list("organization__uuid", flat=True).first()
    elif kind == TELEMETRY:
        found = Variable.objects.filter(uuid=uuid).values_list("sensor__organization__uuid", flat=True).first()
    else:
        found = None
    return str(found) if found else None


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        return ""
