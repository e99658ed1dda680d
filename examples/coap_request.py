"""Sends one reading over CoAP, as a sensor would, then reads the state of the demo's pump."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime

import aiocoap
import aiocoap.error

from examples import connection


def main() -> None:
    parser = connection.parser("POST one reading of the first demo sensor and GET the state of the first device.")
    parser.add_argument("--authority", default=connection.coap_authority(), help="host:port (default: %(default)s)")
    parser.add_argument("--variable", default="ph", help="what was measured (default: %(default)s)")
    parser.add_argument("--value", type=float, default=6.8, help="the reading (default: %(default)s)")
    options = parser.parse_args()
    farm = connection.farm(options)
    body = {"values": {options.variable: options.value}, "timestamp": datetime.now(UTC).isoformat()}
    try:
        asyncio.run(_talk(options.authority, farm["sensors"][0], farm["devices"][0], json.dumps(body).encode()))
    except (aiocoap.error.Error, OSError) as error:
        sys.exit(f"CoAP at {options.authority} does not answer: {type(error).__name__}. Is `make run` running?")


async def _talk(authority: str, sensor: dict[str, str], device: dict[str, str], body: bytes) -> None:
    context = await aiocoap.Context.create_client_context()
    post = aiocoap.Message(code=aiocoap.POST, payload=body, content_format=50)
    post.set_request_uri(f"coap://{authority}/devices/{sensor['uuid']}/datastream?token={sensor['token']}")
    get = aiocoap.Message(code=aiocoap.GET)
    get.set_request_uri(f"coap://{authority}/devices/{device['uuid']}/state?token={device['token']}")
    for request in (post, get):
        answer = await context.request(request).response
        path = "/" + "/".join(request.opt.uri_path)
        connection.say(f"{request.code} {path}: {answer.code} {answer.payload.decode()}".rstrip())
    await context.shutdown()


if __name__ == "__main__":
    main()
