"""Observes the state of the demo's devices over CoAP and prints every change."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import Any

import aiocoap
import aiocoap.error

from examples import connection

shown: dict[str, str] = {}  # device -> what was printed last: the gateway repeats a state that does not change


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
    """Registers again whenever the observation ends, or nothing was heard for as long as a state may be believed."""
    while True:
        message = aiocoap.Message(code=aiocoap.GET, observe=0)
        message.set_request_uri(f"coap://{authority}/devices/{device['uuid']}/state?token={device['token']}")
        request = context.request(message)
        try:
            answer = await request.response
            _show(device, answer)
            connection.say(f"observing {device['name']}")
            await _listen(device, aiter(request.observation), max_age=answer.opt.max_age or 60)
        except (aiocoap.error.Error, OSError, TimeoutError) as error:
            connection.say(f"not observing {device['name']}: {type(error).__name__}; trying again in 2 s")
        finally:
            if not request.observation.cancelled:
                request.observation.cancel()
        await asyncio.sleep(2)


async def _listen(device: dict[str, str], notifications: Any, *, max_age: int) -> None:
    """TimeoutError when the gateway has forgotten us: it says something before `max_age` is over. RFC 7641 3.3.1."""
    with contextlib.suppress(StopAsyncIteration):
        while True:
            patience = max_age + random.uniform(5, 15)
            _show(device, await asyncio.wait_for(anext(notifications), patience))


def _show(device: dict[str, str], message: Any) -> None:
    if not message.code.is_successful():
        connection.say(f"not observing {device['name']}: {message.code} {message.payload.decode('utf-8', 'replace')}")
        return
    states = json.loads(message.payload)["states"]
    line = ", ".join(f"{name} {_in_words(state['value'])}" for name, state in states.items())
    if line != shown.get(device["uuid"]):
        shown[device["uuid"]] = line
        connection.say(f"received on coap: {device['name']}: {line}")


def _in_words(value: Any) -> str:
    return "was never set" if value is None else f"= {value}"


if __name__ == "__main__":
    main()
