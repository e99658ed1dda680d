"""Options that every example has: a farm's file, or addresses and credentials one by one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

DEFAULT_FILE = Path(os.environ.get("VAR_DIR", "var")) / "demo.json"


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all examples share. Addresses are those of `make run` unless the environment says otherwise."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--demo", type=Path, default=DEFAULT_FILE, help="file that `make run` wrote (default: %(default)s)"
    )
    return result


def farm(options: argparse.Namespace) -> dict[str, Any]:
    """The demo farm: admin login, sensors, devices and their tokens. Ends the program with one clear line without it."""
    try:
        found: dict[str, Any] = json.loads(options.demo.read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(f"{options.demo} cannot be read ({error.strerror}). Start `make run` first, or give --demo FILE.")
    return found


def web_url() -> str:
    return f"http://127.0.0.1:{os.environ.get('PORT', '3000')}"


def socketio_url() -> str:
    return f"http://127.0.0.1:{os.environ.get('SOCKETIO_PORT', '3001')}"


def mqtt_address() -> tuple[str, int]:
    return os.environ.get("MQTT_HOST", "127.0.0.1"), int(os.environ.get("MQTT_PORT", "11883"))


def coap_authority() -> str:
    return f"{os.environ.get('COAP_HOST', '127.0.0.1')}:{os.environ.get('COAP_PORT', '5683')}"


def in_words(message: dict[str, Any]) -> str:
    """What a message says: what its data hold depends on its event."""
    data = message["data"]
    if "stateName" in data:
        return f"{data['deviceName']}: {data['stateName']} = {data['value']}"
    if "alarm" in data:
        return f"{data['severity']} alarm {data['change']}: {data['type']} at {data['originatorName']}"
    if "status" in data:
        return f"{data['deviceName']} is {data['status']}"
    return ": ".join(data[name] for name in ("title", "message") if data.get(name))


def say(line: str) -> None:
    """In one piece, which print() does not do: two clients in two threads would end up in one line."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
