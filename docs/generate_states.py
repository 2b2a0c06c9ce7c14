"""Writes docs/states.md from the tables of mlpiped/model.py: `python docs/generate_states.py`.

A test fails when the page and the tables differ. What a state means is the comment behind it in model.py.
"""

from __future__ import annotations

import inspect
import io
import sys
import tokenize
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from mlpiped import model

Moves = Mapping[Any, frozenset[Any]]

PAGE = Path(__file__).with_name("states.md")

HEAD = """\
# States and outcomes

Made by `docs/generate_states.py` from the tables in `mlpiped/model.py`. Change those, not this page.

A **state** says where a thing is. An **outcome** says how it ended, and exists only when it has ended.
Every move below is guarded: the ledger refuses any other, and writes an event for each one that it makes.
`mlpipectl events` lists them.
"""

RUN = """\
A run is one passage through a pipeline. It fails when a step of it did not succeed; what did succeed is kept,
and the next run reuses it.
"""

STEP = """\
A step of a run. From `waiting` it goes straight to `finished` when its result is reused, or when something before
it did not succeed. The arrows back to `queued` are new attempts: after a failure with retries left, after a lost
attempt, or after an input changed while it ran. From `queued` straight to `running` goes a step that waited for an
equal one of another run, which was cancelled: its attempt goes on for the step that waited.
"""

ATTEMPT = """\
One dispatch of a step, under one token. A token starts at most once. To run the step again there is a new attempt
with a token of its own. An attempt that others wait for outlives the cancelling of its step: it becomes the attempt
of the first of them.
"""


def page() -> str:
    """The whole text of docs/states.md."""
    return "\n".join(
        [
            HEAD,
            _part("Runs", RUN, model.RUN_MOVES, model.RunState),
            _table("How a run ended", model.RunOutcome),
            _part("Steps", STEP, model.STEP_MOVES, model.StepState),
            _table("How a step ended", model.StepOutcome),
            _part("Attempts", ATTEMPT, model.ATTEMPT_MOVES, model.AttemptState),
            _table("How an attempt ended", model.AttemptEnd),
        ]
    )


def _part(title: str, text: str, moves: Moves, states: type[StrEnum]) -> str:
    return f"## {title}\n\n{text}\n{_diagram(moves, list(states))}\n{_table('State', states)}"


def _diagram(moves: Moves, states: list[StrEnum]) -> str:
    """Mermaid; states in the order in which they are written, so that the text is always the same."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {states[0]}"]
    for state in states:
        lines += [f"    {state} --> {after}" for after in states if after in moves[state]]
        if not moves[state]:
            lines.append(f"    {state} --> [*]")
    return "\n".join([*lines, "```", ""])


def _table(title: str, states: type[StrEnum]) -> str:
    meanings = _comments(states)
    rows = [f"| `{state}` | {meanings.get(state.name, '')} |" for state in states]
    return "\n".join([f"| {title} | Meaning |", "|---|---|", *rows, ""])


def _comments(states: type[StrEnum]) -> dict[str, str]:
    """Member name -> the comment on its line."""
    found: dict[str, str] = {}
    lines = inspect.getsource(states).splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline):
        name = token.line.split("=")[0].strip()
        if token.type == tokenize.COMMENT and name in states.__members__:
            found[name] = token.string.lstrip("# ")
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
