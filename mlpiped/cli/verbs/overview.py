"""Verbs about the daemon as a whole: status, pipelines, schedules, compute, gc, doctor, completion."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mlpiped.cli.render import Cell, ago, counted, cut, lasting, shown, size
from mlpiped.errors import Unreachable
from mlpiped.protocol import path

if TYPE_CHECKING:
    from mlpiped.cli.ctl import Call

WATCH_EVERY = 2.0  # seconds


def status(call: Call) -> int:
    while True:
        answer = call.client.get(path("status"))
        if call.as_json:
            call.line(answer) if call.args.watch else call.document(answer)
        else:
            page = _status(call, answer)
            clear = "\x1b[H\x1b[2J" if call.args.watch and call.screen.terminal else ""
            print(clear + page, flush=True)
        if not call.args.watch:
            return 0
        time.sleep(WATCH_EVERY)


def _status(call: Call, answer: dict[str, Any]) -> str:
    screen, now = call.screen, time.time()
    daemon, count = answer["daemon"], answer["pipelines"]
    extra = [f"{count[word]} {word}" for word in ("broken", "paused") if count[word]]
    up = lasting(daemon["started_at"], None, now)
    head = f"mlpiped {shown(daemon['version'])}  pid {daemon['pid']}  up {up}  {counted(count['loaded'], 'pipeline')}"
    parts = [head + (f" ({', '.join(extra)})" if extra else "")]
    if daemon.get("disk_full"):
        full = "the disk of the ledger is full: nothing new is dispatched"
        parts.append(screen.paint(full, "failed") + f"\nhint: free space on the disk of `{shown(daemon['state_dir'])}`")

    if daemon.get("ledger_broken"):
        said = f"{shown(daemon['ledger_broken'])}: nothing new is dispatched"
        parts.append(screen.paint(said, "failed") + "\nhint: look at the disk and its mount; steps that run go on")

    def section(title: str, columns: list[str], rows: list[list[object]]) -> None:
        if rows:
            parts.append(screen.paint(title, "bold") + "\n" + screen.table(columns, rows, indent="  "))

    section("active runs", ["RUN", "PIPELINE", "PROGRESS", "RUNNING", "QUEUED", "FAILED", "OWNER", "SINCE"], [
        [r["id"], r["pipeline"], screen.bar(r["done"], r["total"]), r["running"], r["queued"],
         Cell(r["failed"], "failed" if r["failed"] else None), r["owner"], ago(r["started_at"], now)]
        for r in answer["active"]
    ])  # fmt: skip
    section("on the way", ["RUN", "STEP", "WHAT"], [
        [r["id"], d["step"], shown(d["what"])] for r in answer["active"] for d in r.get("doing", ())
    ])  # fmt: skip
    waiting = answer["runs"].get("queued", 0)
    if waiting:
        parts.append(f"{waiting} {'run waits' if waiting == 1 else 'runs wait'} for their turn")
    section("compute", ["NAME", "KIND", "SLOTS", "HOLDERS"], [_compute_row(c) for c in answer["compute"]])
    section("next fires", ["WHEN", "PIPELINE", "TRIGGER"], [
        [ago(n["at"], now), n["pipeline"], n["trigger"] + (" (paused)" if n["paused"] else "")] for n in answer["next"]
    ])  # fmt: skip
    section("last failures", ["RUN", "PIPELINE", "WHEN", "STEP", "HOW", "WHY"], [
        [f["id"], f["pipeline"], ago(f["finished_at"], now), f["step"], _how(f), cut(shown(f["why"] or "-"), 80)]
        for f in answer["failures"]
    ])  # fmt: skip
    section("broken plugins", ["", ""], [[_place(b), b["message"]] for b in answer["broken"]])
    return "\n\n".join(parts)


def _how(failure: dict[str, Any]) -> Cell:
    word = failure["step_outcome"] or failure["outcome"]
    code = failure["exit_code"]
    return Cell(str(word).replace("_", " ") + (f" (exit {code})" if code else ""), word)


def _place(fault: dict[str, Any]) -> str:
    return f"{fault['file']}:{fault['line']}" if fault["line"] else str(fault["file"])


def _compute_row(compute: dict[str, Any]) -> list[object]:
    holders = ", ".join(f"{h['run']}/{h['step']}" for h in compute["holders"][:4])
    more = len(compute["holders"]) - 4
    words = [holders + (f" and {more} more" if more > 0 else "")] if holders else []
    style = None
    if compute["drained"]:
        words, style = [_drained(compute), *words], "paused"
    if compute["health"]:
        words, style = [shown(compute["health"]), *words], "failed"
    return [compute["name"], compute["kind"], f"{compute['used']}/{compute['slots']}", Cell("; ".join(words), style)]


def _drained(compute: dict[str, Any]) -> str:
    return f"drained by {shown(compute['drained_by'])}" if compute.get("drained_by") else "drained"


def pipelines(call: Call) -> int:
    answer = call.client.get(path("pipelines"))
    if call.as_json:
        return call.document(answer)
    now = time.time()
    rows = [
        [
            p["name"],
            p["version"],
            p["steps"],
            Cell("paused", "paused") if p["paused"] else ago(p["next_fire"], now),
            call.screen.state(p["last"]) if p["last"] else None,
            f"run {p['last']['id']}, {ago(p['last']['finished_at'], now)}" if p["last"] else None,
            "; ".join(p["triggers"]),
        ]
        for p in answer["pipelines"]
    ]
    head = ["NAME", "VERSION", "STEPS", "NEXT", "LAST", "", "TRIGGERS"]
    call.say(call.screen.table(head, rows))
    if not rows:
        call.note("no pipeline is loaded: put a plugin into the plugins folder")
    for fault in answer["broken"]:
        call.note(f"{call.screen.paint('broken', 'broken')} {shown(_place(fault))}: {shown(fault['message'])}")
        if fault["hint"]:
            call.note(f"  hint: {shown(fault['hint'])}")
    return 0


def schedules(call: Call) -> int:
    answer = call.client.get(path("schedules"))
    if call.as_json:
        return call.document(answer)
    now = time.time()
    rows = [
        [
            s["pipeline"],
            s["trigger"],
            Cell("paused", "paused") if s["paused"] else ago(s["next_fire"], now),
            ago(s["last_fire"], now) + (f" (run {s['last_run']})" if s["last_run"] else ""),
            s["mode"],
            s["waits_for"],
        ]
        for s in answer["schedules"]
    ]
    call.say(call.screen.table(["PIPELINE", "TRIGGER", "NEXT", "LAST", "BY", "WAITS FOR"], rows))
    if not rows:
        call.note("no pipeline has a trigger")
    return 0


def compute(call: Call) -> int:
    answer = call.client.get(path("compute"))
    if call.as_json:
        return call.document(answer)
    now = time.time()
    rows: list[list[object]] = []
    for c in answer["compute"]:
        memory = None if c["memory"] is None else f"{size(c['memory_used'])} of {size(c['memory'])}"
        gpus = f"{sum(bool(card['holders']) for card in c['cards'])}/{len(c['cards'])}" if c["cards"] else None
        rows.append([c["name"], c["kind"], f"{c['used']}/{c['slots']}", memory, gpus, _health(c, now)])
    call.say(call.screen.table(["NAME", "KIND", "SLOTS", "MEMORY", "GPUS", "HEALTH"], rows))
    _clusters(call, [c for c in answer["compute"] if c.get("cluster")])
    cards = [
        [f"{c['name']}:{card['index']}", card["name"], size(card["memory"]) if card["memory"] else None, _on(card)]
        for c in answer["compute"]
        for card in c["cards"]
    ]
    if cards:
        call.say("\n" + call.screen.table(["CARD", "MODEL", "MEMORY", "HELD BY"], cards))
    held = [
        [f"{h['run']}/{h['step']}", c["name"], h["slots"], lasting(h["since"], None, now)]
        for c in answer["compute"]
        for h in c["holders"]
    ]
    if held:
        call.say("\n" + call.screen.table(["HELD BY", "ON", "SLOTS", "FOR"], held))
    return 0


def _clusters(call: Call, computes: list[dict[str, Any]]) -> None:
    """Of those whose jobs wait in a queue: its nodes, our jobs in its own words, and why nodes take none."""
    if not computes:
        return
    rows: list[list[object]] = []
    for c in computes:
        seen = c["cluster"]
        down = Cell(seen["nodes_down"], "warn" if seen["nodes_down"] else None)
        jobs = ", ".join(f"{count} {shown(state)}" for state, count in sorted(seen["jobs"].items()))
        rows.append([c["name"], seen["partition"], seen["nodes_up"], down, jobs or "none"])
    call.say("\n" + call.screen.table(["CLUSTER", "PARTITION", "NODES UP", "DOWN", "OUR JOBS"], rows))
    away = [
        [c["name"], shown(some["nodes"]), shown(some["state"]), shown(some["reason"]) or None]
        for c in computes
        for some in c["cluster"]["away"]
    ]
    if away:
        call.say("\n" + call.screen.table(["CLUSTER", "NODES DOWN", "STATE", "REASON"], away))


def _health(compute: dict[str, Any], now: float) -> Cell:
    if compute["health"]:
        since = f" (since {ago(compute['unwell_since'], now)})" if compute["unwell_since"] else ""
        return Cell(compute["health"] + since, "failed")
    if compute["drained"]:
        since = f" (since {ago(compute['drained_since'], now)})" if compute.get("drained_since") else ""
        return Cell(f"{_drained(compute)}: its steps finish, nothing new starts{since}", "paused")
    if (compute.get("cluster") or {}).get("full"):
        return Cell(f"its queue takes no more jobs: {shown(compute['cluster']['full'])}", "warn")
    trouble = compute["cards_trouble"]
    return Cell(f"no GPU can be used: {trouble}", "warn") if trouble else Cell("ok", "ok")


def _on(card: dict[str, Any]) -> Cell:
    if card["foreign"]:
        return Cell(card["foreign"], "warn")
    return Cell(", ".join(f"{h['run']}/{h['step']}" for h in card["holders"]) or "-", None)


def gc(call: Call) -> int:
    """1 when a part of it failed."""
    plan = call.args.plan
    answer = call.client.get(path("gc"), timeout=300) if plan else call.client.post(path("gc"), timeout=None)
    status = 1 if answer["faults"] else 0
    if call.as_json:
        call.document(answer)
        return status
    if plan and answer["artifacts"]:
        now = time.time()
        rows = [
            [cut(a["digest"], 20), a["kind"], size(a["size"]), ago(a["used_at"], now), _took(a["seconds"]), a["why"]]
            for a in answer["artifacts"]
        ]
        call.say(call.screen.table(["ARTIFACT", "KIND", "SIZE", "USED", "TOOK", "WHY"], rows) + "\n")
    parts = [
        [part["what"], part["count"], size(part["bytes"]) if part["bytes"] else None, _took(part["seconds"])]
        for part in answer["parts"]
        if part["count"]
    ]
    if parts:
        call.say(call.screen.table(["WHAT", "COUNT", "SIZE", "TOOK"], parts))
    for fault in answer["faults"]:
        call.note(f"failed: {shown(fault)}")
    cost = f", which took {_took(answer['seconds'])} to make" if answer["seconds"] else ""
    call.note(f"{size(answer['bytes'])}{cost}; nothing was removed" if plan else f"{size(answer['bytes'])} freed{cost}")
    return status


def _took(seconds: float) -> str | None:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s" if seconds else None


def doctor(call: Call) -> int:
    try:
        answer = call.client.get(path("doctor"), timeout=300)
    except Unreachable as error:
        hint = f"{error.hint}; " if error.hint else ""
        raise Unreachable(error.message, hint=f"{hint}`mlpiped check` looks at config and plugins without it") from None
    status = 1 if answer["level"] == "fail" else 0
    if call.as_json:
        call.document(answer)
        return status
    for check in answer["checks"]:
        level = call.screen.paint(f"{check['level']:<4}", check["level"])
        call.say(f"{level}  {shown(check['name']):<11}  {shown(check['message'])}")
        if check["hint"]:
            call.say(f"{'':<19}hint: {shown(check['hint'])}")
    return status


def completion(call: Call) -> int:
    from mlpiped.cli.completion import script
    from mlpiped.cli.ctl import parser

    return call.say(script(parser(), "mlpipectl", call.args.shell).rstrip("\n"))
