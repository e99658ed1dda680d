"""What a person does from the office: switches a demo device, or tells the farm something, over REST."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import requests

from examples import connection

ANSWER_SECONDS = 10


def main() -> None:
    options = _parser().parse_args()
    farm = connection.farm(options)
    try:
        session = _logged_in(options.web, farm["admin"])
        if options.what == "switch":
            _switch(session, options.web, farm["devices"], options)
        else:
            _tell(session, options.web, farm["organization"], options)
    except requests.RequestException as error:
        answer = getattr(error.response, "text", "") or type(error).__name__
        sys.exit(f"AEMOS at {options.web} did not do it: {answer}")


def _parser() -> argparse.ArgumentParser:
    parser = connection.parser(
        "Log in over REST as the demo's admin, then switch a device or tell everybody something."
    )
    parser.add_argument("--web", default=connection.web_url(), help="AEMOS web address (default: %(default)s)")
    actions = parser.add_subparsers(dest="what", required=True)
    switch = actions.add_parser("switch", help="set a state of a device", description="Set a state of a device.")
    switch.add_argument("device", help="its name, such as 'Dosing pump' or Fan")
    switch.add_argument("state", help="such as power or speed")
    switch.add_argument("value", help="such as on, off or high")
    tell = actions.add_parser("tell", help="send a notification", description="Tell the whole farm something.")
    tell.add_argument("title", help="a few words")
    tell.add_argument("--message", default="", help="more words")
    tell.add_argument("--severity", default="info", choices=["info", "warning", "critical"], help="(default: info)")
    tell.add_argument("--type", default="multi-protocol", help="socket, mqtt, coap or multi-protocol (the default)")
    return parser


def _logged_in(web: str, login: dict[str, str]) -> requests.Session:
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {_post(session, f'{web}/api/v1/auth/login', login)['access']}"
    return session


def _switch(session: requests.Session, web: str, devices: list[dict[str, str]], options: argparse.Namespace) -> None:
    uuid = next((device["uuid"] for device in devices if device["name"] == options.device), None)
    if uuid is None:
        names = ", ".join(device["name"] for device in devices)
        sys.exit(f"There is no device {options.device}; the demo farm has {names}.")
    body = {"deviceUuid": uuid, "stateName": options.state, "value": options.value}
    change = _post(session, f"{web}/api/v1/device-state-instances", body)
    before = "never set before" if change["previous"] is None else f"was {change['previous']}"
    connection.say(f"switched: {options.device}: {options.state} = {change['value']}, {before}")


def _tell(session: requests.Session, web: str, organization: str, options: argparse.Namespace) -> None:
    body = {name: getattr(options, name) for name in ("title", "message", "severity", "type")}
    told = _post(session, f"{web}/api/v1/notifications", {"organization": organization, **body})
    protocols = ", ".join(delivery["protocol"] for delivery in told["deliveries"])
    connection.say(f"sent: {options.title}, over {protocols}")


def _post(session: requests.Session, url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = session.post(url, json=body, timeout=ANSWER_SECONDS)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


if __name__ == "__main__":
    main()
