"""Typed readers of environment variables: text in, a value out, and every wrong value remembered for the start-up check."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Problem:
    """One variable that cannot be used: its name, what is wrong, and how to mend it. Never carries the value of a secret."""

    variable: str
    message: str
    hint: str


@dataclass(slots=True)
class Environment:
    """Reads variables and collects problems instead of raising, so that one message can list all of them.

    `renamed` maps a variable to the name it had before, which is read where the new one is not set. `earlier_names` holds
    those that were found: earlier name -> name.
    """

    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)
    renamed: Mapping[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    earlier_names: dict[str, str] = field(default_factory=dict)

    def text(self, name: str, default: str = "") -> str:
        value = self.variables.get(name, "").strip()
        earlier = self.renamed.get(name, "")
        if under_earlier_name := self.variables.get(earlier, "").strip():
            self.earlier_names[earlier] = name
        if value and under_earlier_name:
            self._wrong(name, f"is set and so is {earlier}, its earlier name", f"Set only {name}.")
        return value or under_earlier_name or default

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value in choices:
            return value
        self._wrong(name, f"is {value!r}", f"Set it to one of: {', '.join(choices)}.")
        return default

    def integer(self, name: str, default: int, *, minimum: int = 0, maximum: int = 2**31 - 1) -> int:
        raw = self.text(name, str(default))
        try:
            value = int(raw)
        except ValueError:
            value = minimum - 1
        if minimum <= value <= maximum:
            return value
        self._wrong(
            name, f"is {raw!r}", f"Set it to a whole number from {minimum} to {maximum}, or leave it out for {default}."
        )
        return default

    def ratio(self, name: str, default: float) -> float:
        """A number from 0 to 1."""
        raw = self.text(name, str(default))
        try:
            value = float(raw)
        except ValueError:
            value = -1.0
        if 0 <= value <= 1:
            return value
        self._wrong(name, f"is {raw!r}", f"Set it to a number from 0 to 1, or leave it out for {default}.")
        return default

    def flag(self, name: str, *, default: bool) -> bool:
        raw = self.text(name, str(default)).lower()
        if raw in ("1", "true", "yes", "on"):
            return True
        if raw in ("0", "false", "no", "off"):
            return False
        self._wrong(name, f"is {raw!r}", "Set it to true or false.")
        return default

    def words(self, name: str, default: str = "") -> list[str]:
        return [word.strip() for word in self.text(name, default).split(",") if word.strip()]

    def networks(self, name: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """Comma-separated networks such as 10.0.0.0/8; an address without a length stands for itself."""
        found = []
        for word in self.words(name):
            try:
                found.append(ipaddress.ip_network(word))
            except ValueError as error:
                self._wrong(name, f"holds {word!r}: {error}", "Set it to networks such as 10.1.0.0/16,fd00::/8.")
        return found

    def secret(self, name: str) -> str:
        """The secret `name`, or the first line of the file that `name`_FILE names; empty when neither is set."""
        path = self.text(f"{name}_FILE")
        if not path:
            return self.text(name)
        if self.text(name):
            self._wrong(name, f"is set and so is {name}_FILE", "Set only one of the two.")
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            self._wrong(f"{name}_FILE", f"names {path!r}, which cannot be read: {reason}", "Make the file readable.")
            return ""

    def _wrong(self, variable: str, message: str, hint: str) -> None:
        self.problems.append(Problem(variable, message, hint))
