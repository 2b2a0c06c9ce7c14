"""Verbs about what a pipeline is made of: show, plan."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from mlpiped.cli import graph
from mlpiped.cli.render import Cell, ago, duration, lasting, number, shown
from mlpiped.cli.verbs import words
from mlpiped.errors import MlpipedError, UsageError
from mlpiped.protocol import path, reference

if TYPE_CHECKING:
    from mlpiped.cli.ctl import Call


def show(call: Call) -> int:
    what: str = call.args.what
    try:
        reference(what)
    except UsageError:
        return _show_pipeline(call, what)
    return _show_run(call, what)


def _drawn(call: Call, name: str, steps: list[Any], states: dict[str, str]) -> str | None:
    if call.args.dot:
        return graph.dot(name, steps, states)
    return graph.mermaid(steps, states) if call.args.mermaid else None


def _show_run(call: Call, reference_: str) -> int:
    if call.as_json:
        return call.document(call.client.get(path("runs", reference_)))
    answer = call.client.get(path("runs", reference_, "graph"))
    run, screen, now = answer["run"], call.screen, time.time()
    states = {step["name"]: step["outcome"] or step["state"] for step in run["steps"]}
    drawn = _drawn(call, f"{run['pipeline']} {run['id']}", answer["graph"], states)
    if drawn is not None:
        return call.say(drawn)
    cause = run["cause"]["kind"] + (f": {run['cause']['detail']}" if run["cause"]["detail"] else "")
    facts: list[list[object]] = [
        ["run", f"{run['id']} of {run['pipeline']}, version {run['version']}"],
        ["state", screen.state(run)],
        ["cause", cause],
        ["owner", run["owner"]],
        ["created", f"{run['created_at']} ({ago(run['created_at'], now)})"],
        ["took", lasting(run["started_at"], run["finished_at"], now)],
    ]
    facts += [[f"parameter {name}", number(value)] for name, value in run["parameters"].items()]
    facts += [[f"tag {name}", value] for name, value in run["tags"].items()]
    call.say(screen.table(["", ""], facts) + "\n")
    order = {step["name"]: i for i, step in enumerate(graph.ordered(answer["graph"]))}
    rows = [
        [
            step["name"],
            screen.state(step),
            lasting(step["started_at"], step["finished_at"], now),
            step["compute"],
            step["attempts"],
            step["why"],
        ]
        for step in sorted(run["steps"], key=lambda step: order.get(step["name"], len(order)))
    ]
    call.say(screen.table(["STEP", "STATE", "TOOK", "COMPUTE", "TRIES", "WHY"], rows))
    return 0


def _show_pipeline(call: Call, name: str) -> int:
    answer = call.client.get(path("pipelines", name))
    drawn = None if call.as_json else _drawn(call, name, answer["graph"], {})
    if drawn is not None:
        return call.say(drawn)
    stale, fault = _stale(call, name)
    if call.as_json:
        return call.document({**answer, "plan": stale})
    about, screen, now = answer["pipeline"], call.screen, time.time()
    facts: list[list[object]] = [
        ["pipeline", f"{about['name']}, version {about['version']}"],
        ["file", f"{about['file']}:{about['line']}"],
        ["description", about["description"]],
        ["next fire", Cell("paused", "paused") if about["paused"] else ago(about["next_fire"], now)],
        ["last run", _last(about["last"], now)],
    ]
    facts += [["trigger", trigger] for trigger in about["triggers"]]
    facts += [[f"parameter {p['name']}", _parameter(p)] for p in answer["parameters"]]
    call.say(screen.table(["", ""], [row for row in facts if row[1]]) + "\n")
    states = {step["name"]: step["action"] for step in stale["steps"]} if stale else {}
    call.say(graph.text(answer["graph"], states, screen))
    if about["broken"]:
        call.note(f"\n{screen.paint('broken', 'broken')}: the file has a fault, this is its last good version")
        call.note(shown(about["broken"]))
    if fault is not None:
        call.note(f"\nwhat is stale is not known: {fault.message}")
    return 0


def _stale(call: Call, name: str) -> tuple[dict[str, Any] | None, MlpipedError | None]:
    """What a run would do now; a data store that is away is no reason to show nothing."""
    try:
        return call.client.post(path("plan"), {"pipeline": name}), None
    except MlpipedError as error:
        return None, error


def _last(last: dict[str, Any] | None, now: float) -> str | None:
    return None if last is None else f"{last['id']}, {last['outcome'] or last['state']} {ago(last['finished_at'], now)}"


def _parameter(p: dict[str, Any]) -> str:
    text = f"{p['type']}, required" if p["required"] else f"{p['type']} = {number(p['default'])}"
    if p["choices"]:
        text += f", one of {', '.join(number(choice) for choice in p['choices'])}"
    return text + (f"  ({p['description']})" if p["description"] else "")


def plan(call: Call) -> int:
    what: str = call.args.what
    subject = {"file": words.plugin_file(what)} if words.is_file(what) else {"pipeline": what}
    answer = call.client.post(path("plan"), {**subject, **words.choice(call.args)}, timeout=300)
    if call.as_json:
        return call.document(answer)
    rows = [
        [step["name"], Cell(step["action"], step["action"]), duration(step["seconds"]), step["why"]]
        for step in answer["steps"]
    ]
    call.say(call.screen.table(["STEP", "", "COST", "WHY"], rows))
    count = {
        word: sum(step["action"] == word for step in answer["steps"]) for word in ("run", "reuse", "skip", "unknown")
    }
    names = {"run": "would run", "reuse": "reused", "skip": "skipped", "unknown": "not known yet"}
    text = ", ".join(f"{n} {names[word]}" for word, n in count.items() if n)
    print(f"{text}; {duration(answer['seconds'])} by past runs", file=sys.stderr)
    return 0
