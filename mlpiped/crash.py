"""Crash points: named places in the life of a step and a trigger where a test can end the process.

Compiled in always, armed only by `MLPIPED_CRASH_AT=<name>[:<n>]`: the n-th time (default 1) that the process passes the
point, it ends by SIGKILL. `POINTS` and `SHARING` list every name, so that a harness can visit them all.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "before_fire",  # a trigger's event has arrived, nothing is written
    "before_start",  # the run is durable, with its cursor; nothing of it is in memory
    "after_fire",  # … and it has its turn, or waits for it
    "before_intent",
    "after_intent",
    "after_submit",  # the step has been started, the ledger does not know
    "after_handle",  # … and the handle is on its way to the ledger
    "before_outcome",  # the step has ended, the ledger does not know
    "before_end",  # … and was judged: it has failed, was lost, or never ran
    "mid_collect",  # before each output comes into the store
    "after_rename",  # it has come there, its name is not durable
    "before_commit",
    "after_commit",
    "in_commit",  # any transaction: all is written but COMMIT
    "committed",  # any transaction: it is durable, nobody has been told
)
SHARING = (  # only where the step that leads is cancelled: no load comes there by itself
    "before_hand_over",  # an equal step waits for what its attempt makes, nothing is written
    "in_hand_over",  # all is written but COMMIT
    "after_hand_over",  # the attempt is that step's, which does not know yet
)

_armed, _, _count = os.environ.get("MLPIPED_CRASH_AT", "").partition(":")
_left = int(_count or 1)


def point(name: str) -> None:
    """End the process here if this point is the armed one."""
    global _left
    if name != _armed:
        return
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
