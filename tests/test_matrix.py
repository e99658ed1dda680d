"""What is told reaches who it is for, and nobody else: causes in, clients that others wrote out, all of it real processes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from deploy.local import LocalSystem, local_system
from tests import socketio_clients
from tests.listeners import COAP, LISTENERS, MQTT, SOCKETIO, Device, Heard, Listener, listening
from tests.system_clients import Person, coap_get, http_post, mqtt_grants, reading
from tests.waiting import until

pytestmark = pytest.mark.timeout(240)
SOON_SECONDS = 15.0
CAUSES = {"by-a-rule-in-a-worker": "rule", "by-a-person-over-rest": "person", "by-a-schedule": "schedule"}


class Farm:
    """A running system with a lamp that six clients listen to. Each cause sets the lamp's scene to its own name, once."""

    def __init__(self, system: LocalSystem) -> None:
        self.system = system
        self.organization: str = system.farm["organization"]
        self.person = Person(system)
        self.lamp = self.device("Lamp", self.organization)
        self.listeners: dict[str, Listener] = {}
        self._changes: dict[str, dict[str, Any]] = {}

    def device(self, name: str, organization: str) -> Device:
        uuid = self.person.post("devices", organization=organization, name=name)["uuid"]
        self.person.post("device-states", device=uuid, name="scene", datatype="string")
        tokens = {key: self.person.post("device-tokens", device=uuid)["token"] for key in ("token", "listenerToken")}
        return {"uuid": uuid, "name": name, **tokens}

    def change(self, cause: str) -> dict[str, Any]:
        """The change of state that the cause made; all listeners have had time to hear of it before the next."""
        if cause not in self._changes:
            getattr(self, f"_{cause}")()
            self._changes[cause] = self._changed_to(cause)
            for name in self.listeners:
                self.heard(name, cause)
        return self._changes[cause]

    def _change_to(self, scene: str) -> dict[str, Any] | None:
        changes = self.person.get("state-changes", device=self.lamp["uuid"])["results"]
        return next((change for change in changes if change["value"] == scene), None)

    def _changed_to(self, scene: str) -> dict[str, Any]:
        found = until(lambda: self._change_to(scene), seconds=75)  # a schedule knows no time shorter than a minute
        assert found is not None
        return found

    def _person(self) -> None:
        self.person.switch(self.lamp, "scene", "person")

    def _rule(self) -> None:
        self.chain("By a rule", self._command("rule"), variable="ec")
        self.report_until(lambda: self._change_to("rule"), ec=9.0)

    def _schedule(self) -> None:
        nodes = [{"name": "scene", "type": "action", "config": self._command("schedule")}]
        kind = {"executionType": "schedule-only", "cron": "* * * * *"}
        chain = self.person.post(
            "rule-chains", organization=self.organization, name="By the clock", nodes=nodes, **kind
        )
        self._changed_to("schedule")
        self.person.post(f"rule-chains/{chain['uuid']}/disable")

    def chain(self, name: str, action: dict[str, Any], *, variable: str) -> None:
        """Acts when the first reservoir reports more than 8 of the variable, which the demo's own chains do not read."""
        uuid = self.system.farm["sensors"][0]["uuid"]
        condition = {"sourceType": "sensor", "UUID": uuid, "key": variable, "operator": ">", "value": 8}
        nodes = [
            {"name": "high", "type": "filter", "config": condition, "next": "act"},
            {"name": "act", "type": "action", "config": action},
        ]
        self.person.post("rule-chains", organization=self.organization, name=name, nodes=nodes)

    def report_until(self, seen: Callable[[], object], **values: float) -> None:
        """As a sensor does, again and again: a chain that was saved a moment ago is in force within a second."""
        for _ in range(20):
            assert http_post(self.system, self.system.farm["sensors"][0], reading(**values)).status_code == 202
            with suppress(AssertionError):
                until(seen, seconds=1)
                return
        pytest.fail(f"nothing came of {values}")

    def _command(self, scene: str) -> dict[str, Any]:
        return {"type": "device_command", "deviceUuid": self.lamp["uuid"], "stateName": "scene", "value": scene}

    def heard(self, name: str, scene: str) -> Heard:
        """What that listener heard of the scene, as soon as it came by every way or is overdue."""
        ways = {"state", "commands"} if name in MQTT else {"observe"} if name in COAP else {"device-state-change"}
        deadline = time.monotonic() + SOON_SECONDS
        while True:
            heard = [each for each in self.listeners[name].heard() if _scene(each[1]) == scene]
            if {way for way, _ in heard} == ways or time.monotonic() > deadline:
                return heard
            time.sleep(0.02)

    def tell(self, title: str, **fields: Any) -> str:
        """A notification by hand; its uuid."""
        uuid: str = self.person.post("notifications", organization=self.organization, title=title, **fields)["uuid"]
        return uuid

    def deliveries(self, notification: str) -> dict[str, str]:
        """The state of each protocol's delivery, as soon as none of them is pending."""

        def look() -> dict[str, str] | None:
            rows = self.person.get(f"notifications/{notification}")["deliveries"]
            found = {row["protocol"]: row["state"] for row in rows}
            return None if "pending" in found.values() else found

        found = until(look)
        assert found is not None
        return found

    def until_told(self, title: str, wanted: dict[str, list[str]]) -> None:
        deadline = time.monotonic() + SOON_SECONDS
        while (told := self.told(title)) != wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        assert told == wanted

    def told(self, title: str) -> dict[str, list[str]]:
        """By which events and topics each listener heard of a notification's title or an alarm's type."""
        return {
            name: [way for way, body in each.heard() if _title(body) == title] for name, each in self.listeners.items()
        }


def _scene(body: dict[str, Any]) -> Any:
    if "states" in body:
        return body["states"]["scene"]["value"]
    data = body.get("data", {})
    return data.get("value") if data.get("stateName") == "scene" else None


def _title(body: dict[str, Any]) -> Any:
    data = body.get("data", {})
    return data.get("title", data.get("type"))


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with local_system(tmp_path_factory.mktemp("system")) as system:
        system.start()
        found = Farm(system)
        names = [name for name in LISTENERS if name != "socketio-in-javascript" or shutil.which("node")]
        with listening(system, found.lamp, token=found.person.token, names=names) as found.listeners:
            yield found


@pytest.mark.parametrize(
    ("cause", "listener"),
    [
        pytest.param(cause, listener, id=f"{words}-is-heard-by-{listener}")
        for words, cause in CAUSES.items()
        for listener in LISTENERS
    ],
)
def test_what_is_switched(farm: Farm, cause: str, listener: str) -> None:
    if listener not in farm.listeners:
        pytest.skip("node is not on this machine, and JavaScript clients need it")
    change = farm.change(cause)
    heard = farm.heard(listener, cause)
    assert {body["device"] for _, body in heard} == {farm.lamp["uuid"]}
    if listener not in COAP:  # it carries states, and a state may come more than once
        assert sorted(way for way, _ in heard) == (
            ["commands", "state"] if listener in MQTT else ["device-state-change"]
        )
        assert {body["id"] for _, body in heard} == {change["uuid"]}
        assert {body["data"]["source"] for _, body in heard} == {"person" if cause == "person" else "rule"}


def expected(farm: Farm, *, socketio: str = "", mqtt: str = "") -> dict[str, list[str]]:
    """Messages that are no states are not for observers over CoAP."""
    ways = {**dict.fromkeys(SOCKETIO, socketio), **dict.fromkeys(MQTT, mqtt), **dict.fromkeys(COAP, "")}
    return {name: [ways[name]] if ways[name] else [] for name in farm.listeners}


def test_a_notification_of_an_unknown_type_goes_out_on_all_three_protocols(farm: Farm) -> None:
    notification = farm.tell("By pigeon", type="carrier-pigeon")
    assert farm.deliveries(notification) == {"socketio": "sent", "mqtt": "acknowledged", "coap": "sent"}
    farm.until_told("By pigeon", expected(farm, socketio="notification", mqtt="broadcast"))


@pytest.mark.parametrize(
    ("kind", "state", "ways"),
    [
        ("socket", {"socketio": "sent"}, {"socketio": "notification"}),
        ("mqtt", {"mqtt": "acknowledged"}, {"mqtt": "broadcast"}),
        ("coap", {"coap": "sent"}, {}),
    ],
)
def test_a_type_that_names_one_protocol_goes_out_on_no_other(
    farm: Farm, kind: str, state: dict[str, str], ways: dict[str, str]
) -> None:
    assert farm.deliveries(farm.tell(f"Only {kind}", type=kind)) == state
    farm.deliveries(farm.tell(f"After {kind}"))  # every protocol keeps the order, so whoever hears this has heard all
    farm.until_told(f"After {kind}", expected(farm, socketio="notification", mqtt="broadcast"))
    assert farm.told(f"Only {kind}") == expected(farm, **ways)


def test_an_alarm_that_a_rule_raises_is_broadcast_to_the_whole_organization(farm: Farm) -> None:
    farm.chain("Alarm", {"type": "raise_alarm", "alarm": "Too full", "severity": "critical"}, variable="waterLevel")
    farm.report_until(lambda: any(farm.told("Too full").values()), waterLevel=99.0)
    farm.until_told("Too full", expected(farm, socketio="alert", mqtt="broadcast"))


def test_nobody_joins_subscribes_or_observes_what_is_of_another_organization(farm: Farm) -> None:
    neighbour: str = farm.person.post("organizations", name="Neighbour")["uuid"]
    theirs = farm.device("Their lamp", neighbour)
    third = {**farm.lamp, "token": farm.person.post("device-tokens", device=farm.lamp["uuid"])["token"]}
    with socketio_clients.connected(farm.system.socketio, farm.person.token) as client:
        for room in (f"organization-{neighbour}", f"device-uuid-{theirs['uuid']}"):
            assert client.ask("subscribe", {"room": room})["ok"] is False
        assert client.ask("subscribe", {"room": f"device-uuid-{farm.lamp['uuid']}"}) == {"ok": True}
    for topic in (f"organizations/{neighbour}/broadcast", f"devices/{theirs['uuid']}/state"):
        assert mqtt_grants(farm.system, third, topic) is False
    assert mqtt_grants(farm.system, third, f"devices/{farm.lamp['uuid']}/state") is True
    path = f"/devices/{theirs['uuid']}/state"
    assert coap_get(farm.system, path, token=farm.lamp["token"]) == "4.03"
    assert coap_get(farm.system, path, token=theirs["token"]) == "2.05"
