"""Verbs about runs of the past and the present: runs, why, metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mlpiped.cli.render import Cell, ago, lasting, number, shown
from mlpiped.cli.verbs import words
from mlpiped.errors import UsageError
from mlpiped.protocol import path

if TYPE_CHECKING:
    from mlpiped.cli.ctl import Call


def runs(call: Call) -> int:
    a = call.args
    words.pairs(a.tag, "tag")
    query = path("runs", pipeline=a.pipeline, state=a.state, outcome=a.outcome, tag=a.tag, since=a.since, limit=a.limit)
    answer = call.client.get(query)
    if call.as_json:
        return call.document(answer)
    now = time.time()
    rows = [
        [
            run["id"],
            run["pipeline"],
            call.screen.state(run),
            ago(run["created_at"], now),
            lasting(run["started_at"], run["finished_at"], now),
            run["owner"],
            run["cause"]["kind"] + (f": {run['cause']['detail']}" if run["cause"]["detail"] else ""),
        ]
        for run in answer["runs"]
    ]
    call.say(call.screen.table(["RUN", "PIPELINE", "STATE", "CREATED", "TOOK", "OWNER", "CAUSE"], rows))
    if not rows:
        call.note("no such run")
    return 0


def why(call: Call) -> int:
    run, step = words.split(call.args.what, "a step of a run")
    if step is None:
        raise UsageError(f"name a step of the run: `{run}/STEP`", hint=f"`mlpipectl show {run}` lists them")
    answer = call.client.get(path("runs", run, "steps", step, "why"))
    if call.as_json:
        return call.document(answer)
    name = f"{answer['run']}/{answer['step']}"
    word = answer["outcome"] or answer["state"]
    sentence = answer["waiting"] or answer["why"] or "no reason is recorded"
    call.say(f"{shown(name)} {call.screen.paint(shown(word.replace('_', ' ')), word)}: {shown(sentence)}")
    if answer["waiting"] and answer["why"] and answer["why"] not in answer["waiting"]:
        call.say(f"  it runs because: {shown(answer['why'])}")
    told = [a for a in answer["attempts"] if a["reason"] or a["exit_code"] or len(answer["attempts"]) > 1]
    now = time.time()
    rows = [
        [a["n"], _end(a), a["compute"], a["exit_code"], lasting(a["submitted_at"], a["ended_at"], now), a["reason"]]
        for a in told
    ]
    if rows:
        call.say(call.screen.table(["ATTEMPT", "END", "COMPUTE", "EXIT", "TOOK", "REASON"], rows, indent="  "))
    return 0


def _end(attempt: dict[str, Any]) -> Cell:
    word = attempt["end"] or attempt["state"]
    return Cell(word.replace("_", " "), {"committed": "succeeded", "never_ran": "skipped"}.get(word, word))


def metrics(call: Call) -> int:
    answer = call.client.get(path("runs", call.args.run, "metrics"))
    if call.as_json:
        return call.document(answer)
    rows: list[list[object]] = []
    for step in answer["steps"]:
        note = f"reused from {step['reused_from']}" if step["reused_from"] else ""
        count = dict.fromkeys(step["last"], 0)
        for line in step["metrics"]:
            if line.get("name") in count and line.get("kind", "metric") == "metric":
                count[line["name"]] += 1
        for name, value in step["last"].items():
            more = f"the last of {count[name]}" if count[name] > 1 else ""
            rows.append([step["step"], name, number(value), ", ".join(word for word in (more, note) if word) or " "])
    call.say(call.screen.table(["STEP", "METRIC", "VALUE", ""], rows))
    if not rows:
        call.note(f"run {answer['run']} has no metrics")
    return 0
