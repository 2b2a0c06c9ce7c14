"""Crash points: named places in the life of a step and a trigger where a test can end the process.

Compiled in always, armed only by `MLPIPED_CRASH_AT=<name>[:<n>]`: the n-th time (default 1) that the process passes the
point, it ends by SIGKILL. `POINTS` lists every name, so that a harness can visit them all.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "before_fire",  # a trigger's event has arrived, nothing is written
    "after_fire",  # run and cursor are durable
    "before_intent",
    "after_intent",
    "after_submit",
    "after_handle",
    "before_outcome",
    "mid_collect",
    "before_commit",
    "after_commit",
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
