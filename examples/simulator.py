"""Simulates two reservoirs: believable readings out over HTTP, drifting with time and with what pump and fan do."""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import requests

from examples import connection

HIGH_PH, DOSED_PH = 6.7, 6.0


@dataclass(slots=True)
class Reservoir:
    """The water of one reservoir. `step` moves it on by one reading."""

    ph: float = 6.35
    ec: float = 1.8
    temperature: float = 24.8
    water_level: float = 82.0
    dosing: bool = False

    def step(self, seconds: float, noise: random.Random) -> dict[str, float]:
        """Plants take up nutrients and raise pH; dosing lowers it; the day warms and cools; water evaporates.

        Faster than in a real farm, so that something happens while one looks.
        """
        self.dosing = self.ph > HIGH_PH or (self.dosing and self.ph > DOSED_PH)
        self.ph += (-0.12 if self.dosing else 0.03) * seconds + noise.gauss(0, 0.01)
        self.ec = max(1.2, self.ec - 0.0005 * seconds + noise.gauss(0, 0.005))
        self.temperature += 0.35 * math.sin(time.time() / 20) * min(seconds, 1) + noise.gauss(0, 0.05)
        self.temperature = min(max(self.temperature, 21.0), 28.5)
        self.water_level = 95.0 if self.water_level < 60 else self.water_level - 0.01 * seconds
        values = {"ph": self.ph, "ec": self.ec, "temperature": self.temperature, "waterLevel": self.water_level}
        return {name: round(value, 2) for name, value in values.items()}


def main() -> None:
    options = _options()
    farm = connection.farm(options)
    noise = random.Random(options.seed)
    reservoirs = [(sensor, Reservoir()) for sensor in farm["sensors"]]
    # Above the limit of the demo's rule and being dosed: whatever was left from the last run, the pump switches within seconds.
    reservoirs[0][1].ph, reservoirs[0][1].dosing = 6.72, True
    with requests.Session() as session:
        for number in range(options.count) if options.count else iter(int, 1):
            for sensor, reservoir in reservoirs:
                _report(session, options.url, sensor, reservoir.step(options.interval, noise))
            del number
            time.sleep(options.interval)


def _options() -> argparse.Namespace:
    parser = connection.parser("Send believable readings of the demo farm's reservoirs over HTTP.")
    parser.add_argument("--url", default=connection.web_url(), help="AEMOS web address (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between readings (default: %(default)s)")
    parser.add_argument("--count", type=int, default=0, help="how many rounds to send; 0 goes on until stopped")
    parser.add_argument("--seed", type=int, default=None, help="makes the noise repeatable")
    return parser.parse_args()


def _report(session: requests.Session, url: str, sensor: dict[str, str], values: dict[str, float]) -> None:
    body: dict[str, Any] = {"values": values, "timestamp": datetime.now(UTC).isoformat()}
    shown = " ".join(f"{name}={value}" for name, value in values.items())
    try:
        answer = session.post(
            f"{url}/api/v1/telemetry", json=body, headers={"Authorization": f"Bearer {sensor['token']}"}, timeout=5
        )
    except requests.RequestException as error:
        connection.say(f"reading not sent: {sensor['name']}: {type(error).__name__}; trying again with the next one")
        return
    if answer.status_code == requests.codes.accepted:
        connection.say(f"reading accepted: {sensor['name']}: {shown}")
    else:
        connection.say(f"reading refused: {sensor['name']}: {answer.status_code} {answer.text}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
