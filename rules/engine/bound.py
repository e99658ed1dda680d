"""A compiled chain as a worker runs it: bound to its row and to the states of its organization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rules.engine.chains import Chain
from rules.engine.values import Timer


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedChain:
    """A compiled chain with what its row says. `states`: (device uuid, state name) -> id, of its own organization only.

    `states` is shared by the organization's chains and follows renames: a state that went after the save is missing there.
    A chain that does not hear events runs on its schedule alone. One that `hears_late` also runs for what is history.
    """

    id: int
    name: str
    organization_id: int
    priority: int
    max_retries: int
    compiled: Chain
    states: Mapping[tuple[str, str], int]
    event_triggered: bool = True
    hears_late: bool = False

    @property
    def uuid(self) -> str:
        return self.compiled.spec.uuid

    @property
    def timers(self) -> Sequence[Timer]:
        """What time alone can make true, and so run the chain."""
        return self.compiled.timers if self.event_triggered else ()

    @property
    def commanded(self) -> set[int]:
        """Ids of the states that its actions may set."""
        named = ((command.device_uuid, command.state_name) for command in self.compiled.commands)
        return {self.states[name] for name in named if name in self.states}

    @property
    def sort_key(self) -> tuple[int, int]:
        """What sorts the chains of one event: the most urgent first, then the oldest."""
        return self.priority, self.id
