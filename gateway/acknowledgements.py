"""What a device says of a command, over MQTT and CoAP: acknowledged, applied or failed."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

import msgspec

from aemos.lib.text import storable
from devices import commands
from devices.commands import Acknowledgement
from devices.exceptions import BadPayload

MAXIMUM_ERROR_LENGTH = 500


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    id: UUID
    status: Literal["acknowledged", "applied", "failed"]
    error: str = ""


_decoder = msgspec.json.Decoder(_Said)


def read(payload: bytes, device_uuid: UUID) -> Acknowledgement:
    """Of JSON; raises BadPayload."""
    try:
        said = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadPayload(f"an acknowledgement has id, status and perhaps error: {error}") from None
    return Acknowledgement(
        device_uuid=device_uuid,
        command_uuid=said.id,
        state=commands.State(said.status),
        error=storable(said.error, MAXIMUM_ERROR_LENGTH),
    )


def foreign() -> BadPayload:
    """Of a command that is not this device's."""
    return BadPayload("id: there is no such command of this device", field="id")
