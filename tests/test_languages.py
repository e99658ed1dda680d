"""Languages: every text of the pages is translated, whole, and compiled; and only the pages change with the language."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polib
import pytest
from django.test import Client
from django.utils import translation

from deploy.programs import REPOSITORY
from devices.models import Organization, Variable
from pages.rules import problems
from tests import builders, test_rule_form, texts
from tests.test_pages import measured, raised

GERMAN = {"Accept-Language": "de-AT,de;q=0.9,en;q=0.5"}
_PLACE = re.compile(r"\{\w*\}|%\(\w+\)s|</?\w+>")
CATALOGUES = [(language, domain) for language in texts.LANGUAGES for domain in (texts.DJANGO, texts.SCRIPTS)]


# The catalogues


@pytest.mark.parametrize(("language", "domain"), CATALOGUES)
def test_a_catalogue_has_every_text_and_no_other(language: str, domain: str) -> None:
    """Else: make texts, then translate what it names."""
    known = {entry.msgid: entry for entry in polib.pofile(str(texts.file_of(language, domain)))}
    wanted = texts.texts_of(domain)
    assert (wanted.keys() - known.keys(), known.keys() - wanted.keys()) == (set(), set())
    assert [text for text, entry in known.items() if not entry.translated()] == []
    assert {text: entry.msgid_plural for text, entry in known.items()} == wanted


@pytest.mark.parametrize(("language", "domain"), CATALOGUES)
def test_a_translation_has_the_places_of_its_text(language: str, domain: str) -> None:
    wrong = []
    for entry in polib.pofile(str(texts.file_of(language, domain))):
        wanted = set(_PLACE.findall(entry.msgid_plural or entry.msgid))
        for translated in entry.msgstr_plural.values() if entry.msgid_plural else [entry.msgstr]:
            missing = wanted - set(_PLACE.findall(translated)) - ({"%(count)s"} if entry.msgid_plural else set())
            if missing or set(_PLACE.findall(translated)) - wanted:
                wrong.append(entry.msgid)
    assert wrong == []


@pytest.mark.parametrize(("language", "domain"), CATALOGUES)
def test_what_is_compiled_is_what_was_translated(language: str, domain: str, tmp_path: Path) -> None:
    source = texts.file_of(language, domain)
    polib.pofile(str(source)).save_as_mofile(str(tmp_path / "compiled.mo"))
    assert (tmp_path / "compiled.mo").read_bytes() == source.with_suffix(".mo").read_bytes()


def test_the_search_for_texts_finds_them() -> None:
    """A search that finds nothing would find nothing missing."""
    found = texts.texts_of(texts.DJANGO)
    assert found["%(count)s sensor"] == "%(count)s sensors"  # a template's plural
    for text in (
        "Acknowledge",
        "Name of the rule",
        "when {condition}, {action}",
        "is above {value}",
        "critical",
        "Lower the pH",
    ):
        assert text in found, text
    assert "Copied" in texts.texts_of(texts.SCRIPTS)


# The pages


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


@pytest.fixture
def client(farm: Organization) -> Client:
    return builders.client_of(builders.member(farm, "admin"))


@pytest.mark.django_db
@pytest.mark.usefixtures("empty_redis")
def test_pages_speak_the_language_of_the_browser(client: Client, farm: Organization) -> None:
    sensor = builders.sensor(farm, "Tank 1")
    raised(farm, sensor)
    measured(Variable.objects.get(sensor=sensor), 6.123)
    page = client.get("/", headers=GERMAN).text
    for text in ('<html lang="de"', "Übersicht", "Bestätigen", "vor 5\xa0Minuten", "6.123", "Sensor hinzufügen"):
        assert text in page, text
    assert "Acknowledge" not in page


@pytest.mark.django_db
@pytest.mark.usefixtures("empty_redis")
def test_who_has_chosen_a_language_has_it_in_every_browser(client: Client) -> None:
    saved = client.post("/account/preferences", {"language": "de"}, follow=True).text
    assert "Gespeichert." in saved
    assert '<html lang="de"' in client.get("/", headers={"Accept-Language": "en"}).text
    client.post("/account/preferences", {"language": "en"})
    assert '<html lang="en"' in client.get("/", headers=GERMAN).text


@pytest.mark.django_db
def test_a_rule_is_told_in_the_language_of_the_page(client: Client, farm: Organization) -> None:
    sensor, pump = builders.sensor(farm, "Tank"), builders.device(farm, "Pumpe")
    chain = builders.switching_chain(sensor, pump)
    page = client.get(f"/rules/{chain.uuid}", headers=GERMAN).text
    assert "Wenn Tank ph unter 5.5 liegt: Pumpe power auf on stellen." in page
    form = client.get("/rules/new?template=dry-run", headers=GERMAN).text
    for text in ("Pumpe ohne Wasser anhalten", "Wasser zu niedrig", "unter … liegt", "einen Alarm auslösen"):
        assert text in form, text


@pytest.mark.django_db
@pytest.mark.usefixtures("empty_redis")
def test_what_is_wrong_with_a_rule_is_told_in_the_language_of_the_page(client: Client, farm: Organization) -> None:
    sensor, pump = builders.sensor(farm, "Tank"), builders.device(farm, "Pumpe")
    then = [test_rule_form.switched(pump, "power", "on")]

    def sent(number: str) -> dict[str, Any]:
        return test_rule_form.posted([test_rule_form.value(sensor, "ph", ">", number)], then)

    assert (
        "muss eine Zahl sein"
        in client.post(f"/rules/new?organization={farm.uuid}&template=blank", sent("viel"), headers=GERMAN).text
    )
    preview = client.post(f"/rules/preview?organization={farm.uuid}", sent("7"), headers=GERMAN)
    assert "Der Sensor hat sie noch nie gemeldet" in preview.json()["html"]


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("must be a number", "muss eine Zahl sein"),
        ("must be one of ['on', 'off']", "muss eines von ['on', 'off'] sein"),
        ("is no state of this device; it has none", "ist kein Zustand dieses Geräts; it has none"),
        ("must be below value, 6.5, for >", "muss unter dem Wert 6.5 liegen, bei >"),
        (
            "has a single {: write {{ for a brace, and {name} for a value",
            "hat ein einzelnes {: Schreiben Sie {{ für eine Klammer und {name} für einen Wert",
        ),
        ("was never heard of", "was never heard of"),
    ],
)
def test_a_sentence_of_the_engine_is_recognized(english: str, german: str) -> None:
    with translation.override("de"):
        assert problems.translated(english) == german
    assert problems.translated(english) == english


def test_sentences_that_are_recognized_are_written_somewhere() -> None:
    """One that nobody writes any more would be translated for nothing."""
    written = [pattern for path in _SPEAKERS for pattern in _sentences_in(REPOSITORY / path)]
    assert [text for text in problems.SENTENCES if not any(pattern.fullmatch(text) for pattern in written)] == []


_SPEAKERS = ("rules/engine", "rules/authoring/validation.py", "devices/values.py", "devices/models.py")


def _sentences_in(path: Path) -> Iterator[re.Pattern[str]]:
    """A pattern for every text and f-string that is longer than a word or two."""
    for file in [path] if path.is_file() else path.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(each) for each in fixed if isinstance(each, str)) > len("is longer"):
                yield re.compile("".join(re.escape(each) if isinstance(each, str) else ".*" for each in fixed))


@pytest.mark.django_db
def test_numbers_that_scripts_read_keep_their_point(client: Client, farm: Organization) -> None:
    sensor = builders.sensor(farm, variables={"temperature": "number"})
    sensor.variables.update(unit="°C", target_minimum=18.5)
    client.post("/account/preferences", {"language": "de", "temperature": "°F"})
    page = client.get(f"/sensors/{sensor.uuid}").text
    assert 'data-factor="1.7999999999999998" data-offset="32.0"' in page
    assert 'data-low="65.3"' in page


@pytest.mark.django_db
def test_scripts_have_their_texts(client: Client) -> None:
    assert "Kopiert" in client.get("/texts.js?de", headers=GERMAN).text
    assert "Kopiert" not in client.get("/texts.js?en").text


@pytest.mark.django_db
@pytest.mark.usefixtures("empty_redis")
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/api/v1/sensors?organization=x", "Enter a valid UUID"),
        ("/admin/", "Areas"),
        ("/operations", "The queue in the last hour"),
    ],
)
def test_programs_and_those_who_run_the_system_are_spoken_to_in_english(path: str, text: str) -> None:
    client = builders.client_of(builders.user(is_staff=True, is_superuser=True))
    client.post("/account/preferences", {"language": "de"})
    answer = client.get(path, headers=GERMAN)
    assert text in answer.text
    for word in ("Gültig", "gültig", "Abmelden", "Übersicht"):
        assert word not in answer.text
