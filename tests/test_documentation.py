"""The pages say what the code does: settings, check ids, commands and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])


def settings_read() -> set[str]:
    source = (ROOT / "aemos" / "settings.py").read_text()
    return set(re.findall(r'_env\.\w+\(\s*"([A-Z_]+)"', source))


def test_every_setting_is_described_and_no_other() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    described = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}

    assert described | {"AEMOS_ENV"} == settings_read()


def test_the_template_of_the_environment_names_only_real_settings() -> None:
    names = re.findall(r"^([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)

    assert set(names) <= settings_read()


def test_every_check_id_is_described() -> None:
    ids = set(re.findall(r"\b([EW]00\d)\b", (ROOT / "aemos" / "checks.py").read_text()))

    assert ids == {"E001", "E002", "E003", "E004", "E005", "E006", "E007", "W001", "W003", "W007", "W008"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())

    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_commands_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    files = re.findall(
        r"`((?:aemos|devices|rules|notifications|gateway|monitoring|tests|deploy|docs|examples)/[\w./-]+\.\w+)`", text
    )
    commands = re.findall(r"manage\.py (\w+)", text)
    known = {path.stem for path in ROOT.glob("*/management/commands/*.py")} | {"check", "migrate", "createsuperuser"}

    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [name for name in commands if name not in known and name != "with"] == []


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()

    assert [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in readme] == []


def test_decisions_are_numbered_one_after_the_other() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))

    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    assert [page.name for page in pages if not page.read_text().startswith(f"# {int(page.name[:4])}. ")] == []


def test_the_backpressure_pages_name_every_reason_threshold_and_default() -> None:
    from django.conf import settings

    from rules.admission.circuit import Reason

    handling = (ROOT / "docs" / "backpressure-handling.md").read_text()
    internal = {Reason.ACCEPTED, Reason.DISABLED, Reason.RECOVERING, Reason.RECOVERED, Reason.MANUAL, Reason.RESET}
    assert [reason for reason in set(Reason) - internal if f"`{reason}`" not in handling] == []
    page = (ROOT / "docs" / "backpressure-config.md").read_text()
    for name in ("QUEUE_WARNING_THRESHOLD", "QUEUE_CRITICAL_THRESHOLD", "QUEUE_RECOVERY_THRESHOLD", "EVENT_PARTITIONS"):
        assert f"| `{name}` | {getattr(settings, name)} |" in page


def test_the_presets_of_backpressure_are_in_order_and_start() -> None:
    page = (ROOT / "docs" / "backpressure-config.md").read_text()
    rows = {
        cells[1].strip(" `"): [int(cell) for cell in cells[2:6]]
        for line in page.split("## Presets")[1].splitlines()
        if line.startswith("| `QUEUE_") and len(cells := line.split("|")) > 5
    }
    columns = zip(
        rows["QUEUE_RECOVERY_THRESHOLD"],
        rows["QUEUE_WARNING_THRESHOLD"],
        rows["QUEUE_CRITICAL_THRESHOLD"],
        strict=True,
    )
    for recovery, warning, critical in columns:
        assert recovery < warning < critical
