"""What a run knows of each of its steps that has to run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlpiped.model import StepState

if TYPE_CHECKING:
    from mlpiped.attempt import Attempt


@dataclass(slots=True)
class Try:
    """What is held in memory of a step that has to run."""

    state: StepState = StepState.QUEUED
    since: int = 0  # µs: in this state
    why: str = ""  # it has to run
    again: str = ""  # it has to run once more
    held: str | None = None  # why it cannot be decided just now
    compute: str | None = None
    tokens: int = 0
    failures: int = 0  # attempts that were the code's fault
    losses: int = 0
    taints: int = 0
    not_before: int | None = None  # µs: the pause of a retry ends
    attempt: Attempt | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def number(self) -> int:
        """Of the next attempt, from 1."""
        return 1 + self.failures + self.losses + self.taints
