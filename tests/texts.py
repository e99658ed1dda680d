"""Texts of the pages that are translated: `make texts` brings the catalogues in pages/locale up to date and compiles them.

Texts are found where they stand: in templates by Django's own parser, in Python by its syntax tree, in scripts by a pattern;
phrases of rules come from the rooms that have them. A translator writes the .po files, in which what is new has an empty place.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polib

from deploy.programs import REPOSITORY

PAGES = REPOSITORY / "pages"
LOCALE = PAGES / "locale"
TEMPLATES = (PAGES / "templates", REPOSITORY / "devices" / "templates")
# The page of those who run the system.
ENGLISH = "operations"
LANGUAGES = ("de",)
DJANGO, SCRIPTS = "django", "djangojs"
_FUNCTIONS = frozenset({"_", "lazy", "noop", "gettext", "gettext_lazy", "gettext_noop", "say"})
_IN_SCRIPTS = re.compile(r'\bgettext\("((?:[^"\\]|\\.)+)"\)')
_HEADER = {"Content-Type": "text/plain; charset=utf-8", "Plural-Forms": "nplurals=2; plural=(n != 1);"}
Texts = Mapping[str, str]
"""Text -> its plural; empty for one that has none."""


def texts_of(domain: str) -> dict[str, str]:
    """All that a catalogue must hold."""
    if domain == SCRIPTS:
        return dict.fromkeys(_of_scripts(), "")
    return {**dict.fromkeys(_of_python(), ""), **dict.fromkeys(_of_rules(), ""), **dict(_of_templates())}


def _of_scripts() -> Iterator[str]:
    from rules.engine.actions import SEVERITIES

    yield from SEVERITIES
    for path in sorted((PAGES / "static").rglob("*.js")):
        if path.stem != ENGLISH and not path.is_symlink() and path.name != "chart.js":
            yield from (text.replace('\\"', '"') for text in _IN_SCRIPTS.findall(path.read_text()))


def _of_python() -> Iterator[str]:
    others = (REPOSITORY / "rules" / "authoring", REPOSITORY / "devices" / "people")
    for path in sorted([*PAGES.rglob("*.py"), *(path for folder in others for path in folder.glob("*.py"))]):
        if ENGLISH in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and _name(node.func) in _FUNCTIONS:
                first = node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield first.value


def _name(function: ast.expr) -> str:
    return (
        function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    )


def _of_rules() -> Iterator[str]:
    """What pages say in words of the rules and devices, which know nothing of languages."""
    from django.utils import timezone

    from devices.models import Role, StateChange
    from rules.authoring import graph, sentences
    from rules.engine.actions import ROLES, SEVERITIES
    from rules.engine.chains import NODE_TYPES
    from rules.engine.operators import OPERATORS
    from rules.models import RuleChain

    yield from (operator.predicate for operator in OPERATORS.values())
    for phrases in (sentences.TRANSFORMS, sentences.MEASURES, sentences.OVER_TIME):
        yield from phrases.values()
    yield from (label for _kind, label in graph.LINKS)
    yield from (graph.THEN, *NODE_TYPES, *SEVERITIES)
    yield from (f"{role}s" for role in ROLES)
    yield from (str(label) for label in (*StateChange.CommandState.labels, *Role.labels))
    yield from (RuleChain(enabled=False).stopped, RuleChain(enabled=True, suspended_at=timezone.now()).stopped)


def _of_templates() -> Iterator[tuple[str, str]]:
    from django.template import Template
    from django.template.engine import Engine

    engine = Engine.get_default()
    for path in sorted(path for folder in TEMPLATES for path in folder.rglob("*.html")):
        if ENGLISH not in path.parts:
            yield from _in_nodes(Template(path.read_text(), engine=engine).nodelist)


def _in_nodes(nodes: Any) -> Iterator[tuple[str, str]]:
    from django.template.base import NodeList
    from django.templatetags.i18n import BlockTranslateNode, TranslateNode

    for node in nodes:
        if isinstance(node, TranslateNode):
            text = node.filter_expression.var
            if isinstance(text := getattr(text, "literal", text), str) and text:  # else a variable
                yield text, ""
        elif isinstance(node, BlockTranslateNode):
            singular, _ = node.render_token_list(node.singular)
            plural = node.render_token_list(node.plural)[0] if node.plural else ""
            yield singular, plural
        for value in list(vars(node).values()):
            if isinstance(value, NodeList):
                yield from _in_nodes(value)
        for _, inner in getattr(node, "conditions_nodelists", ()):
            yield from _in_nodes(inner)


def file_of(language: str, domain: str) -> Path:
    return LOCALE / language / "LC_MESSAGES" / f"{domain}.po"


def bring_up_to_date(language: str, domain: str) -> list[str]:
    """Adds what is new, with an empty place, and takes out what is gone; gives what has no translation."""
    path, wanted = file_of(language, domain), texts_of(domain)
    known = {entry.msgid: entry for entry in polib.pofile(str(path))} if path.exists() else {}
    catalogue = polib.POFile(wrapwidth=130)
    catalogue.metadata = {"Language": language, **_HEADER}
    for text, plural in sorted(wanted.items()):
        entry = polib.POEntry(msgid=text, flags=["python-brace-format"] if "{" in text else [])
        old = known.get(text)
        if plural:
            entry.msgid_plural = plural
            entry.msgstr_plural = old.msgstr_plural if old and old.msgid_plural == plural else {0: "", 1: ""}
        else:
            entry.msgstr = old.msgstr if old else ""
        catalogue.append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    catalogue.save(str(path))
    catalogue.save_as_mofile(str(path.with_suffix(".mo")))
    return [entry.msgid for entry in catalogue if not entry.translated()]


def main() -> None:
    import django

    django.setup()
    for language in LANGUAGES:
        for domain in (DJANGO, SCRIPTS):
            missing = bring_up_to_date(language, domain)
            print(f"{file_of(language, domain).relative_to(REPOSITORY)}: {len(texts_of(domain))} texts")
            for text in missing:
                print(f"  not translated: {text}")


if __name__ == "__main__":
    main()
