"""Observes the state of the demo's devices over CoAP and prints every change."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import aiocoap
import aiocoap.error

from examples import connection


def main() -> None:
    parser = connection.parser("Observe coap://.../devices/<uuid>/state of every demo device and print what arrives.")
    parser.add_argument("--authority", default=connection.coap_authority(), help="host:port (default: %(default)s)")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_observe_all(options.authority, connection.farm(options)["devices"]))


async def _observe_all(authority: str, devices: list[dict[str, str]]) -> None:
    context = await aiocoap.Context.create_client_context()
    await asyncio.gather(*[_observe(context, authority, device) for device in devices])


async def _observe(context: aiocoap.Context, authority: str, device: dict[str, str]) -> None:
    """Registers again whenever the observation ends: the gateway was restarted, or did not hear from us."""
    while True:
        message = aiocoap.Message(code=aiocoap.GET, observe=0)
        message.set_request_uri(f"coap://{authority}/devices/{device['uuid']}/state?token={device['token']}")
        request = context.request(message)
        try:
            _show(device, (await request.response))
            connection.say(f"observing {device['name']}")
            async for notification in request.observation:
                _show(device, notification)
        except (aiocoap.error.Error, OSError) as error:
            connection.say(f"not observing {device['name']}: {type(error).__name__}; trying again in 2 s")
        await asyncio.sleep(2)


def _show(device: dict[str, str], message: Any) -> None:
    if not message.code.is_successful():
        connection.say(f"not observing {device['name']}: {message.code} {message.payload.decode('utf-8', 'replace')}")
        return
    states = json.loads(message.payload)["states"]
    shown = ", ".join(f"{name} = {state['value']}" for name, state in states.items())
    connection.say(f"received on coap: {device['name']}: {shown}")


if __name__ == "__main__":
    main()
