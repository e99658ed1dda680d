"""The alert rules that are shipped: promtool takes them, each fires when it should, and every metric in them exists."""

from __future__ import annotations

import re
import subprocess

from deploy.programs import REPOSITORY, get

FOLDER = REPOSITORY / "deploy" / "prometheus"
ALERTS, TESTS = FOLDER / "alerts.yml", FOLDER / "alerts.test.yml"


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


def test_every_metric_of_the_rules_is_documented() -> None:
    """tests/test_prometheus.py compares that page with what is scraped."""
    documented = set(re.findall(r"^\| `(\w+)", (REPOSITORY / "docs" / "monitoring.md").read_text(), re.MULTILINE))
    expressions = [re.sub(r"by \(.*?\)", "", each) for each in re.findall(r"expr: (.*)", ALERTS.read_text())]
    used = {name for each in expressions for name in re.findall(r"\b\w+_\w+\b(?=[\[{)])", each)}
    assert len(used) >= 12
    assert used <= documented, used - documented


def test_the_folder_holds_what_the_page_names() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"alerts.yml", "alerts.test.yml"}
