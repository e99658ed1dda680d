"""Effects: what chains ask for in, done in the caller's transaction, and after its commit told to everybody who listens.

An effect has a key derived from its event and node, and the database takes each key once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from devices.models import StateChange
from rules import states
from rules.actions import Effect
from rules.events import Event
from rules.exceptions import ChainFailed
from rules.index import BoundChain

Wish = states.Request
"""An effect with everything looked up that it needs to be done."""


@dataclass(slots=True, kw_only=True)
class Performed:
    """What was done, for `tell`."""

    changes: list[states.Change] = field(default_factory=list)

    def __iadd__(self, other: Performed) -> Performed:
        self.changes += other.changes
        return self


def wish(effect: Effect, bound: BoundChain, event: Event) -> Wish:
    """Raises ChainFailed when what the effect needs does not exist any more."""
    state_id = bound.states.get((effect.device_uuid, effect.state_name))
    if state_id is None:
        cause = f"device {effect.device_uuid} has no state {effect.state_name!r} any more"
        raise ChainFailed(effect.chain_uuid, effect.node, cause)
    return states.Request(
        effect_key=effect.effect_key,
        state_id=state_id,
        value=effect.value,
        source=StateChange.Source.RULE,
        actor=f"{bound.name} / {effect.node}",
        timestamp_us=effect.timestamp_us,
        priority=event.priority,
    )


def perform(wishes: Sequence[Wish]) -> Performed:
    """Does what the wishes ask for, in the current transaction."""
    return Performed(changes=states.apply(wishes))


def tell(performed: Performed) -> None:
    """After the commit. What fails here, the sweep makes good."""
    states.tell(performed.changes)
