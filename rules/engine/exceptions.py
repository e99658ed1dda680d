"""What can go wrong with a rule chain, from the stored configuration to one run.

RuleError
├── InvalidChain   the configuration is refused, with every problem at once; retrying is useless
└── ChainFailed    one run stopped at a node that could not do its work
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

SHOWN_CHARACTERS = 100
SHOWN_PROBLEMS = 10

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = SHOWN_CHARACTERS


def _shown(value: object) -> object:
    """A short scalar as it is; anything long, nested or not expressible in JSON as shortened text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str) and len(value) <= SHOWN_CHARACTERS:
        return value
    return _shorten.repr(value)


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault in a chain: where (`nodes[0].config.expressions[1].UUID`), what was found, what is wrong with it.

    `value` is bounded, because it is logged and sent back: a list, an object or a text over 100 characters
    becomes shortened text.
    """

    path: str
    value: object
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _shown(self.value))

    def __str__(self) -> str:
        return f"{self.path}: {self.message} (found {self.value!r})"


class RuleError(Exception):
    """Base of every error that the rules raise on purpose."""


class InvalidChain(RuleError):
    """A configuration that cannot be compiled; `problems` holds all of its faults and is never empty."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        shown = [str(problem) for problem in self.problems[:SHOWN_PROBLEMS]]
        if (hidden := len(self.problems) - len(shown)) > 0:
            shown.append(f"and {hidden} more")
        return "; ".join(shown)


class ErrorCode(StrEnum):
    """Why something took too long; the names are the predecessor's."""

    DATA_COLLECTION_TIMEOUT = "DATA_COLLECTION_TIMEOUT"
    RULE_CHAIN_TIMEOUT = "RULE_CHAIN_TIMEOUT"
    WORKER_TIMEOUT = "WORKER_TIMEOUT"
    EXTERNAL_ACTION_TIMEOUT = "EXTERNAL_ACTION_TIMEOUT"


class ChainFailed(RuleError):
    """A run that stopped at `node` of chain `chain_uuid`; `cause` is one line for the person who wrote the rule."""

    def __init__(self, chain_uuid: str, node: str, cause: str, *, code: ErrorCode | None = None) -> None:
        self.chain_uuid = chain_uuid
        self.node = node
        self.cause = cause
        self.code = code
        super().__init__(chain_uuid, node, cause)

    def __str__(self) -> str:
        return f"chain {self.chain_uuid}, node {self.node!r}: {self.cause}"
