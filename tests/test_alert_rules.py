"""Alert rules, recording rules and dashboards that are shipped: promtool takes them, they do what they should, and all metrics
in them exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.db import connection

from deploy.programs import REPOSITORY, get
from tests.test_api_rights import make_farm

FOLDER = REPOSITORY / "deploy" / "prometheus"
ALERTS, TESTS, RECORDING = FOLDER / "alerts.yml", FOLDER / "alerts.test.yml", FOLDER / "recording.yml"
GRAFANA = REPOSITORY / "deploy" / "grafana"


def promtool(*arguments: str) -> str:
    done = subprocess.run(
        [get("promtool").path, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_finds_nothing_wrong() -> None:
    assert "SUCCESS" in promtool("check", "rules", ALERTS.name)


def test_each_alert_fires_when_it_should_and_not_otherwise() -> None:
    assert "SUCCESS" in promtool("test", "rules", TESTS.name)
    named = re.findall(r"- alert: (\w+)", ALERTS.read_text())
    tested = re.findall(r'alertname="(\w+)"', TESTS.read_text())
    assert [tested.count(name) for name in named] == [2] * len(named)
    assert set(named) == set(re.findall(r"`(Aemos\w+)`", (REPOSITORY / "docs" / "monitoring.md").read_text()))


def test_each_recording_rule_makes_of_known_series_what_it_should() -> None:
    assert "SUCCESS" in promtool("check", "rules", RECORDING.name)
    assert "SUCCESS" in promtool("test", "rules", "recording.test.yml")
    tested = (FOLDER / "recording.test.yml").read_text()
    recorded = re.findall(r"- record: (\S+)", RECORDING.read_text())
    assert [name for name in recorded if f"expr: {name}" not in tested and f"({name})" not in tested] == []


def documented() -> set[str]:
    """tests/test_prometheus.py compares that page with what is scraped."""
    named = re.findall(r"^\| `(\w+)", (REPOSITORY / "docs" / "monitoring.md").read_text(), re.MULTILINE)
    histograms = [name for name in named if name.endswith("duration_seconds")]
    recorded = re.findall(r"- record: (\S+)", RECORDING.read_text())
    return {
        *named,
        *(f"{name}_bucket" for name in histograms),
        *recorded,
        "django_http_responses_total_by_status_total",
    }


def metrics_of(expression: str) -> set[str]:
    plain = re.sub(r"\bby \(.*?\)|\{.*?\}|\[.*?\]", " ", expression)
    return {
        name
        for name in re.findall(r"[a-z][a-z0-9_:]*[_:][a-z0-9_:]+", plain)
        if not name.endswith(("_quantile", "_time"))
    }


def test_every_metric_of_the_rules_exists() -> None:
    rules = [yaml.safe_load(file.read_text()) for file in (ALERTS, RECORDING)]
    expressions = [rule["expr"] for file in rules for group in file["groups"] for rule in group["rules"]]
    used = {name for each in expressions for name in metrics_of(each)}
    assert len(used) >= 16
    assert used <= documented(), used - documented()


def test_the_folder_holds_what_the_page_names() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "alerts.yml", "alerts.test.yml", "recording.yml", "recording.test.yml"
    }  # fmt: skip


def panels(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GRAFANA / name).read_text())["panels"]
    return found


@pytest.mark.parametrize("name", ["operations.json", "rules.json"])
def test_dashboards_ask_for_metrics_that_exist(name: str, tmp_path: Path) -> None:
    """promtool reads each question, as if it were a rule."""
    asked = [target["expr"] for panel in panels(name) for target in panel["targets"]]
    rules = [{"record": f"asked:{number}", "expr": expression} for number, expression in enumerate(asked)]
    file = tmp_path / "asked.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    assert f"{len(asked)} rules found" in promtool("check", "rules", str(file))
    used = {metric for expression in asked for metric in metrics_of(expression)}
    assert used <= documented(), used - documented()


@pytest.mark.django_db
def test_the_dashboard_of_a_farm_asks_what_the_database_can_answer() -> None:
    if connection.vendor != "postgresql":
        pytest.skip("its questions are for PostgreSQL")
    farm = make_farm()
    asked = [target["rawSql"] for panel in panels("farm.json") for target in panel["targets"]]
    board = json.loads((GRAFANA / "farm.json").read_text())
    variables = [each["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    with connection.cursor() as cursor:
        for question in (*variables, *asked):
            text = re.sub(r"\$__timeFilter\((.*?)\)", r"\1 > now() - interval '10 years'", question)
            text = text.replace("$organization", str(farm.organization.pk)).replace("$sensor", str(farm.sensor.pk))
            cursor.execute(text)
            assert cursor.fetchall() or "suspect IS NOT NULL" in question, question


@pytest.mark.parametrize("file", sorted(GRAFANA.glob("*.json")), ids=lambda file: file.stem)
def test_panels_stand_side_by_side(file: Path) -> None:
    found = panels(file.name)
    assert len({panel["id"] for panel in found}) == len(found)
    cells = [
        (x, y)
        for panel in found
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) <= 23
