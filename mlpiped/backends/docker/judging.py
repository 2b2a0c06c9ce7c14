"""How a container ended: what the engine says, what the script in it left, and what we did to it -> the outcome. Pure.

a host that has rebooted since                  Lost: what lies in the folder may be half of what was written
it never started                                Exited, with the engine's words
the kernel ended it for want of memory          Exited, out of memory
the script said how the step ended              Exited
we ended it: cancelled, or over its time        Exited, by SIGKILL
without a word                                  Lost: the engine was restarted, or somebody removed or stopped it
the same, of an image without a shell           as the engine says; SIGKILL and SIGTERM come from outside: Lost
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mlpiped.backends.base import Exited, Lost

if TYPE_CHECKING:
    from mlpiped.backends.docker.script import Ended

NOT_FOUND, NO_PROGRAM = 127, 126
ENDED_FROM_OUTSIDE = "its container was ended from outside: the engine was restarted, or somebody stopped it"


@dataclass(frozen=True, slots=True)
class Evidence:
    """`state`: the engine's, of a container that does not run; None: it has none. `ended`: the script's word."""

    state: dict[str, Any] | None
    ended: Ended | None
    cancelled: bool = False
    timed_out: bool = False
    shell: bool = True  # whether there was a script to speak
    command: str = ""  # the first word, for a sentence
    memory: int | None = None  # bytes: the limit
    rebooted: bool = False


def judge(found: Evidence) -> Exited | Lost:
    state, ended = found.state or {}, found.ended
    if found.rebooted:
        return Lost("host rebooted")
    code, number = _split(ended.code if ended else state.get("ExitCode", 128 + signal.SIGKILL))
    end = Exited(
        code,
        number,
        started=moment(state.get("StartedAt")),
        ended=moment(state.get("FinishedAt")),
        cpu=ended.cpu if ended else None,
        max_rss=ended.memory if ended else None,
    )
    if state.get("Status") == "created":
        return replace(end, code=code or NOT_FOUND, error=_unstartable(found.command, state))
    if ended is not None and ended.fault:
        return replace(end, error=_fault(found.command, ended.code))
    if found.cancelled or found.timed_out:
        return replace(end, cancelled=found.cancelled, timed_out=not found.cancelled)
    if code != 0 and (state.get("OOMKilled") or (ended and ended.kills)):
        limit = f"it needed more than its limit of {found.memory / 2**20:.0f} MiB" if found.memory else "of the host"
        return replace(end, out_of_memory=True, error=f"out of memory: {limit}")
    if ended is not None:
        return end
    if found.state is None:
        return Lost("its container is gone: somebody removed it")
    if found.shell or number in (signal.SIGKILL, signal.SIGTERM):
        return Lost(ENDED_FROM_OUTSIDE)
    return end


def _split(code: int) -> tuple[int | None, int | None]:
    """(exit code, signal): a shell and an engine tell a signal as 128 and its number."""
    try:
        return (None, int(signal.Signals(code - 128))) if code > 128 else (code, None)
    except ValueError:
        return code, None


def _fault(command: str, code: int) -> str:
    if code == NO_PROGRAM:
        return f"permission denied: `{command[:200]}` is not an executable file"
    return f"command not found: `{command[:200]}`"


def _unstartable(command: str, state: dict[str, Any]) -> str:
    words = " ".join(str(state.get("Error") or "").split())
    if state.get("ExitCode") == NOT_FOUND:
        return _fault(command, NOT_FOUND)
    if state.get("ExitCode") == NO_PROGRAM:
        return _fault(command, NO_PROGRAM)
    return f"the container could not be started: {words[:800]}"


def moment(text: str | None) -> float | None:
    """Seconds since the epoch of the engine's RFC 3339, whose fraction has up to nine digits; None for the year 1."""
    if not text or text.startswith("0001"):
        return None
    whole, _, fraction = text.removesuffix("Z").partition(".")
    try:
        return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
    except ValueError:
        return None
