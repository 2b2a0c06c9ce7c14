"""What a run asks of whoever hands out the places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.execution.run import Execution
    from mlpiped.ledger import AttemptRow
    from mlpiped.placement.decide import Need


class Dispatcher(Protocol):
    """What a run asks of the scheduler, which answers a `request` by `Execution.granted`, or `decide_again`."""

    def request(self, execution: Execution, index: int, need: Need, share: str | None) -> None:
        """A place for step `index`; `share` is the key under which equal steps of all runs share one attempt."""

    def withdraw(self, execution: Execution, index: int) -> None: ...

    def occupy(self, need: Need, attempt: AttemptRow, share: str | None) -> None:
        """An adopted attempt of the step of `need` holds its place, and its cards, already."""

    def restored(self, run: int) -> None:
        """What it holds is said, by `occupy`. Nobody has a place before all that was begun is known."""

    def followers(self, run: int, index: int) -> Sequence[tuple[Execution, int]]:
        """The steps that wait for what this one makes, in the order in which they came."""

    def hand_over(self, run: int, index: int, heir: Execution, step: int, cards: Sequence[str]) -> None:
        """Its attempt, with these cards, is that step's from now on: its place, and those who follow, too."""

    def release(self, run: int, index: int) -> None:
        """The process has ended: its place is free. Said twice, it is heard once."""

    def unavailable(self, compute: str, why: str | None) -> None:
        """A submit was not taken, because of `why`; or the compute cannot be asked (None)."""

    def answered(self, compute: str) -> None:
        """It can be asked again."""

    def taken(self, compute: str) -> None:
        """A submit went well."""

    def pressed(self) -> bool:
        """Whether steps wait for places."""

    def settled(self, run: int, index: int) -> None:
        """The step's attempt has ended for good or ill: who shares its key may be decided again."""
