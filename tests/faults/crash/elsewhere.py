"""Steps that run on another machine, which dies too: while the daemon lives, and with it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from crash.trial import OUTSIDE, Trial
from mlpiped.crash import POINTS

if TYPE_CHECKING:
    from collections.abc import Sequence

POINTS_OF_STEPS = tuple(name for name in POINTS if name not in ("before_fire", "before_start", "after_fire"))


class TrialElsewhere(Trial, ABC):
    """Every third death of the daemon, and some moments of its life, are the machine's too. No clock fires.

    `prelude` is the plugins' word for where they run.
    """

    def __init__(
        self,
        seed: int,
        *,
        prelude: str,
        points: Sequence[str] = (*POINTS_OF_STEPS, OUTSIDE, OUTSIDE, OUTSIDE),
        **more: Any,
    ) -> None:
        super().__init__(seed, clocks=False, slots=1, points=points, prelude=prelude, **more)

    def configure(self, text: str) -> None:
        """More lines for the daemon's config."""
        with self.daemon.config.open("a") as config:
            config.write(text)

    def life(self, *words: object, **more: object) -> None:
        """While it lives the machine may fail, and come back."""
        timer = threading.Timer(self.random.uniform(0.1, 1.0), self.shake)
        fails = self.random.random() < 0.3
        if fails:
            timer.start()
        more.setdefault("patience", self.random.uniform(0.5, 2.5))
        super().life(*words, **more)  # type: ignore[arg-type]
        if fails:
            timer.join()
        elif self.random.random() < 0.3:
            self.shake()

    @abstractmethod
    def shake(self) -> None:
        """Let the machine fail and come back."""
