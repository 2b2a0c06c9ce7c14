"""Steps that run on another machine, which dies too: while the daemon lives, and with it."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from crash.trial import OUTSIDE, Trial
from mlpiped.crash import POINTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.ssh_rig import Box, Cable

POINTS_OF_STEPS = tuple(name for name in POINTS if name not in ("before_fire", "before_start", "after_fire"))
WAYS = ("sshd", "sessions", "cable", "answers")


def harm(what: str, box: Box, cable: Cable, pause: float) -> None:
    """What happens to a machine with an sshd, or to the way to it: one of WAYS."""
    if what == "sshd":
        box.stop()
        time.sleep(pause)
        box.start()
    elif what == "sessions":
        box.drop()
    else:
        if what == "answers":  # what is asked for is done, and nobody learns of it
            cable.freeze_down()
            time.sleep(pause)
        cable.cut()


class TrialElsewhere(Trial, ABC):
    """Every third death of the daemon, and some moments of its life, are the machine's too. No clock fires.

    `prelude` is the plugins' word for where they run.
    """

    lives = (0.5, 2.5)
    """Seconds between which the daemon is left alone, once it serves."""
    often = 0.3
    """How likely the machine fails while a daemon lives, and else when it has died."""

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
        timer = threading.Timer(self.random.uniform(0.1, self.lives[1] / 2.5), self.shake)
        fails = self.random.random() < self.often
        if fails:
            timer.start()
        more.setdefault("patience", self.random.uniform(*self.lives))
        super().life(*words, **more)  # type: ignore[arg-type]
        if fails:
            timer.join()
        elif self.random.random() < self.often:
            self.shake()

    @abstractmethod
    def shake(self) -> None:
        """Let the machine fail and come back."""
