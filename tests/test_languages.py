"""Languages: every text of the pages is translated, whole, and compiled; and only the pages change with the language."""

from __future__ import annotations

import re
from pathlib import Path

import polib
import pytest
from django.test import Client

from devices.models import Organization, Variable
from tests import builders, texts
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
