"""The graph of a pipeline as text, for `dot` and for Mermaid. Each step is below everything that it comes after."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlpiped.cli.render import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.cli.render import Screen

Step = dict[str, Any]
_FILL = {
    "succeeded": "#c8e6c9", "reused": "#b2ebf2", "failed": "#ffcdd2", "timed_out": "#ffcdd2", "lost": "#ffcdd2",
    "cancelled": "#ffe0b2", "skipped": "#eeeeee", "running": "#bbdefb", "collecting": "#bbdefb",
    "submitting": "#bbdefb", "queued": "#fff9c4", "waiting": "#ffffff",
}  # fmt: skip


def ordered(steps: Sequence[Step]) -> list[Step]:
    """Every step after those that it comes after; otherwise in the order of the definition."""
    by_name = {step["name"]: step for step in steps}
    after: dict[str, list[str]] = {step["name"]: [] for step in steps}
    missing = {}
    for step in steps:
        known = [name for name in step["after"] if name in by_name]
        missing[step["name"]] = len(known)
        for name in known:
            after[name].append(step["name"])
    ready = [step["name"] for step in steps if missing[step["name"]] == 0]
    found: list[Step] = []
    for name in ready:  # grows while it is walked
        found.append(by_name[name])
        for later in after[name]:
            missing[later] -= 1
            if missing[later] == 0:
                ready.append(later)
    return found


def text(steps: Sequence[Step], states: Mapping[str, str], screen: Screen) -> str:
    """One line a step, with what it takes from whom; a picture of every graph that a person can still read."""
    lines = []
    size = max((len(shown(step["name"])) for step in steps), default=0)
    for step in ordered(steps):
        name = shown(step["name"])
        state = states.get(step["name"], "")
        mark = screen.paint(f"{state.replace('_', ' '):<10}", state) if states else ""
        made = ", ".join(shown(output["name"]) for output in step["outputs"])
        line = f"  {mark}{name:<{size}}"
        if step["after"]:
            line += "  <- " + ", ".join(shown(before) for before in step["after"])
        outside = [shown(p["source"]) for p in step["inputs"] if p["source"].partition("/")[0] not in step["after"]]
        if outside:
            line += ("  <- " if not step["after"] else ", ") + ", ".join(outside)
        lines.append(line + (f"  -> {made}" if made else ""))
    return "\n".join(lines)


def dot(name: str, steps: Sequence[Step], states: Mapping[str, str]) -> str:
    lines = [f"digraph {_quoted(name)} {{", "  rankdir=LR;", '  node [shape=box, style="rounded,filled"];']
    for step in steps:
        fill = _FILL.get(states.get(step["name"], ""), "#ffffff")
        lines.append(f"  {_quoted(step['name'])} [fillcolor={_quoted(fill)}];")
    lines.extend(f"  {_quoted(a)} -> {_quoted(step['name'])};" for step in steps for a in step["after"])
    return "\n".join([*lines, "}"])


def mermaid(steps: Sequence[Step], states: Mapping[str, str]) -> str:
    number = {step["name"]: f"s{i}" for i, step in enumerate(steps)}
    lines = ["flowchart LR"]
    for step in steps:
        label = shown(step["name"]).replace('"', "#quot;")
        lines.append(f'  {number[step["name"]]}["{label}"]')
    lines.extend(f"  {number[a]} --> {number[step['name']]}" for step in steps for a in step["after"] if a in number)
    for word, fill in _FILL.items():
        members = [number[step["name"]] for step in steps if states.get(step["name"]) == word]
        if members:
            lines += [f"  classDef {word} fill:{fill}", f"  class {','.join(members)} {word}"]
    return "\n".join(lines)


def _quoted(name: str) -> str:
    return json.dumps(shown(name), ensure_ascii=False)
