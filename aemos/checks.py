"""System checks of the configuration: settings in, Django check messages out; errors stop every process that sets Django up.

Ids: E001 REDIS_PASSWORD, E002 SECRET_KEY, E003 JWT_SECRET, E004 a value that cannot be used, E005 queue thresholds out of
order, E006 timeouts out of order, E007 METRICS_TOKEN; W001-W003 and W007 are the same where they only warn (staging);
W008 a setting under its earlier name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ImproperlyConfigured

MINIMUM_SECRET_LENGTH = 32
# Words that stand in examples and templates; a secret holding one was copied, not made.
PLACEHOLDERS = (
    "change-me",
    "changeme",
    "change_me",
    "your-secret",
    "your_secret",
    "django-insecure",
    "example",
    "default",
)
_MAKE_ONE = "make one with: python -c 'import secrets; print(secrets.token_urlsafe(48))'"


class UnsafeConfiguration(ImproperlyConfigured):
    """Raised while Django sets up when a setting is wrong or unsafe; its text lists every problem and how to mend it."""


def refuse_unsafe_settings() -> None:
    """Raises UnsafeConfiguration naming every error at once."""
    errors = [message for message in configuration_messages() if message.is_serious()]
    if errors:
        raise UnsafeConfiguration(describe(errors))


def describe(messages: Sequence[CheckMessage]) -> str:
    lines = [f"  {message.id}: {message.msg}\n      How to mend it: {message.hint}" for message in messages]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n".join([f"AEMOS cannot start with AEMOS_ENV={settings.AEMOS_ENV}: {count} in the configuration.", *lines])


@register(Tags.security)
def check_configuration(**_: Any) -> list[CheckMessage]:
    return configuration_messages()


def configuration_messages() -> list[CheckMessage]:
    return [*_secrets(), *_values(), *_relations(), *earlier_names()]


def _secrets() -> list[CheckMessage]:
    if settings.AEMOS_ENV not in ("production", "staging"):
        return []
    kind, letter = (Error, "E") if settings.AEMOS_ENV == "production" else (Warning, "W")
    found: list[CheckMessage] = []
    if not settings.REDIS_PASSWORD:
        hint = f"Set REDIS_PASSWORD, or REDIS_PASSWORD_FILE, to the password Redis requires; {_MAKE_ONE}"
        found.append(
            kind(
                "REDIS_PASSWORD is missing: anyone who reaches Redis could switch pumps.",
                hint=hint,
                id=f"aemos.{letter}001",
            )
        )
    for number, name, value in (
        (2, "SECRET_KEY", settings.CONFIGURED_SECRET_KEY),
        (3, "JWT_SECRET", settings.CONFIGURED_JWT_SECRET),
    ):
        weakness = secret_weakness(value)
        if weakness:
            hint = f"Set {name}, or {name}_FILE, to a random text of its own; {_MAKE_ONE}"
            found.append(kind(f"{name} {weakness}.", hint=hint, id=f"aemos.{letter}00{number}"))
    if settings.METRICS_TOKEN and (weakness := secret_weakness(settings.METRICS_TOKEN)):
        hint = f"Set METRICS_TOKEN, or METRICS_TOKEN_FILE, to a random text, or to nothing; {_MAKE_ONE}"
        found.append(kind(f"METRICS_TOKEN {weakness}.", hint=hint, id=f"aemos.{letter}007"))
    return found


def secret_weakness(value: str) -> str:
    """What makes the secret guessable, as the end of a sentence; empty when nothing does."""
    if not value:
        return "is missing"
    if any(word in value.lower() for word in PLACEHOLDERS):
        return "is a placeholder from an example"
    if len(value) < MINIMUM_SECRET_LENGTH:
        return f"has fewer than {MINIMUM_SECRET_LENGTH} characters"
    if len(set(value)) < 8:  # "aaaa..." and the like pass any length
        return "repeats a few characters"
    return ""


def _values() -> list[CheckMessage]:
    return [
        Error(f"{problem.variable} {problem.message}.", hint=problem.hint, id="aemos.E004")
        for problem in settings.ENVIRONMENT.problems
    ]


def earlier_names() -> list[CheckMessage]:
    return [
        Warning(
            f"{old} is now called {new}; the earlier name still works.", hint=f"Rename it to {new}.", id="aemos.W008"
        )
        for old, new in settings.ENVIRONMENT.earlier_names.items()
    ]


def _relations() -> list[CheckMessage]:
    found: list[CheckMessage] = []
    recovery, warning = settings.QUEUE_RECOVERY_THRESHOLD, settings.QUEUE_WARNING_THRESHOLD
    critical = settings.QUEUE_CRITICAL_THRESHOLD
    if not recovery < warning < critical:
        text = f"The queue thresholds are out of order: recovery {recovery}, warning {warning}, critical {critical}."
        hint = "Set QUEUE_RECOVERY_THRESHOLD < QUEUE_WARNING_THRESHOLD < QUEUE_CRITICAL_THRESHOLD."
        found.append(Error(text, hint=hint, id="aemos.E005"))
    collection, chain = settings.DATA_COLLECTION_TIMEOUT_MS, settings.RULE_CHAIN_TIMEOUT_MS
    if not collection < chain:
        text = f"DATA_COLLECTION_TIMEOUT_MS ({collection}) is not below RULE_CHAIN_TIMEOUT_MS ({chain})."
        hint = "Set DATA_COLLECTION_TIMEOUT_MS lower: a chain must be able to collect its data and still run."
        found.append(Error(text, hint=hint, id="aemos.E006"))
    if not chain < settings.WORKER_TIMEOUT_MS:
        text = f"RULE_CHAIN_TIMEOUT_MS ({chain}) is not below WORKER_TIMEOUT_MS ({settings.WORKER_TIMEOUT_MS})."
        hint = "Set RULE_CHAIN_TIMEOUT_MS lower: a chain must be stopped, and named, before its worker is."
        found.append(Error(text, hint=hint, id="aemos.E006"))
    return found
