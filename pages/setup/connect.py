"""What a person needs to connect a sensor or device: commands and a sketch with its own address and token filled in."""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings
from django.http import HttpRequest
from django.utils.translation import gettext_noop as noop

from devices.models import Device, Sensor
from devices.tokens import prefix_of
from devices.values import Datatype

MQTT_TLS_PORT = 8883
_EXAMPLES = {Datatype.NUMBER.value: "6.1", Datatype.BOOLEAN.value: "true", Datatype.STRING.value: '"ok"'}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snippet:
    """One way to connect. `kind` is what it is written in."""

    title: str
    kind: str
    text: str


def snippets(request: HttpRequest, owner: Sensor | Device, token: str) -> list[Snippet]:
    """For a sensor how it reports, for a device also how it hears."""
    url = request.build_absolute_uri("/api/v1/telemetry")
    body = _body(owner)
    broker = _Broker(request, token)
    found = [
        Snippet(title=noop("Report over HTTP"), kind="shell", text=_curl(url, token, body)),
        Snippet(
            title=noop("Report over MQTT"),
            kind="shell",
            text=f"mosquitto_pub {broker.options} -q 1 -t 'devices/{owner.uuid}/datastream' -m '{body}'",
        ),
        Snippet(title=noop("Report from an ESP32"), kind="Arduino", text=_sketch(url, token, body)),
    ]
    if isinstance(owner, Device):
        listen = (
            f"mosquitto_sub {broker.options} -q 2 -t 'devices/{owner.uuid}/commands' -t 'devices/{owner.uuid}/state/+'"
        )
        found.insert(0, Snippet(title=noop("Hear commands over MQTT"), kind="shell", text=listen))
    return found


class _Broker:
    """How programs of Mosquitto are told where the broker is, and who speaks."""

    def __init__(self, request: HttpRequest, token: str) -> None:
        host = request.get_host().rsplit(":", 1)[0] if not request.get_host().endswith("]") else request.get_host()
        where = (
            f"-h {host} -p {MQTT_TLS_PORT} --cafile ca.crt"
            if request.is_secure()
            else f"-h {host} -p {settings.MQTT_PORT}"
        )
        prefix = prefix_of(token)
        self.options = f"{where} -i {prefix} -u {prefix} -P '{token}' -V 5"


def _body(owner: Sensor | Device) -> str:
    rows = owner.variables.order_by("name") if isinstance(owner, Sensor) else owner.states.order_by("name")
    values = [f'"{row.name}": {_example(row)}' for row in rows[:4]]
    return '{"values": {' + ", ".join(values) + "}}"


def _example(row: object) -> str:
    allowed = getattr(row, "allowed_values", None)
    if allowed:
        return f'"{allowed[0]}"' if isinstance(allowed[0], str) else str(allowed[0]).lower()
    return _EXAMPLES[getattr(row, "datatype", Datatype.NUMBER)]


def _curl(url: str, token: str, body: str) -> str:
    return (
        f"curl -sS {url} \\\n  -H 'Authorization: Bearer {token}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n  -d '{body}'"
    )


def _sketch(url: str, token: str, body: str) -> str:
    escaped = body.replace('"', '\\"')
    return f"""#include <WiFi.h>
#include <HTTPClient.h>

const char* WIFI_NAME = "your network";
const char* WIFI_PASSWORD = "its password";
const char* URL = "{url}";
const char* TOKEN = "{token}";

void setup() {{
  Serial.begin(115200);
  WiFi.begin(WIFI_NAME, WIFI_PASSWORD);
  while (WiFi.status() != WL_CONNECTED) delay(500);
}}

void loop() {{
  String body = "{escaped}";  // put your readings here
  HTTPClient http;
  http.begin(URL);
  http.addHeader("Content-Type", "application/json");
  http.addHeader("Authorization", String("Bearer ") + TOKEN);
  int status = http.POST(body);  // 202: it is safe. 429 or 503: keep the reading and send it again later
  Serial.println(status);
  http.end();
  delay(60000);
}}
"""
