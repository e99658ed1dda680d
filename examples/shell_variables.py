"""Addresses, uuids and tokens of the demo farm as shell variables, for mosquitto_sub, mosquitto_pub, coap-client and curl."""

from __future__ import annotations

import shlex
from typing import Any

from examples import connection


def main() -> None:
    parser = connection.parser(
        'Print lines for a shell, to be used as: eval "$(.venv/bin/python -m examples.shell_variables)"'
    )
    for name, value in _variables(connection.farm(parser.parse_args())).items():
        connection.say(f"{name}={shlex.quote(value)}")


def _variables(farm: dict[str, Any]) -> dict[str, str]:
    """SENSOR is the first reservoir, PUMP and FAN are the devices; _USER and _TOKEN are what they log in with."""
    host, port = connection.mqtt_address()
    speakers = dict(zip(("SENSOR", "PUMP", "FAN"), (farm["sensors"][0], *farm["devices"]), strict=True))
    found = {
        "WEB": connection.web_url(),
        "MQTT_HOST": host,
        "MQTT_PORT": str(port),
        "COAP": connection.coap_authority(),
    }
    for name, speaker in speakers.items():
        found[name] = speaker["uuid"]
        found[f"{name}_USER"] = speaker["token"].split("_")[1]
        found[f"{name}_TOKEN"] = speaker["token"]
    return {**found, "ORGANIZATION": farm["organization"]}


if __name__ == "__main__":
    main()
