"""Verbs that go on: wait, logs, events. A daemon that restarts is waited for; Ctrl-C ends only the watching."""

from __future__ import annotations

import base64
import codecs
import sys
import time
from typing import TYPE_CHECKING, Any

from mlpiped.cli.render import duration, lasting, shown, shown_log, size
from mlpiped.cli.verbs import words
from mlpiped.errors import MlpipedError, Unreachable
from mlpiped.protocol import path

if TYPE_CHECKING:
    from mlpiped.cli.ctl import Call

POLL = 25.0  # seconds of one question; the daemon answers at once when the run has ended
AWAY = 600.0  # seconds that a daemon may be away before waiting is given up


def wait(call: Call) -> int:
    return to_the_end(call, call.args.run, logs=False, timeout=words.span(call.args.timeout), known=False)


def to_the_end(call: Call, run: str | int, *, logs: bool, timeout: float | None = None, known: bool = True) -> int:
    """Wait for `run`, printing its logs if asked; the exit status: 1 unless it succeeded.

    `known`: the daemon has answered about this run before, so one that does not answer now is away for a while.
    """
    try:
        if logs:
            try:
                _print_logs(call, path("runs", run, "logs", follow=True))
            except Unreachable as error:
                call.note(error.message)
        answer = _await(call, run, timeout, known)
    except KeyboardInterrupt:
        call.note(f"\nno longer waiting; run {run} goes on (`mlpipectl cancel {run}` would end it)")
        raise
    if answer["state"] != "finished":
        if call.as_json:
            call.document(answer)
        call.note(f"run {answer['id']} has not finished after {duration(timeout)}; it goes on")
        return 1
    if call.as_json:
        call.line(answer) if logs else call.document(answer)
    else:
        _conclude(call, answer)
    return 0 if answer["outcome"] == "succeeded" else 1


def _await(call: Call, run: str | int, timeout: float | None, known: bool) -> dict[str, Any]:
    """The run when it has finished, or as it is when the time is over. Raises Unreachable."""
    deadline = None if timeout is None else time.monotonic() + timeout
    away_since: float | None = None
    while True:
        left = POLL if deadline is None else min(POLL, max(0.0, deadline - time.monotonic()))
        try:
            url = path("runs", run, "wait", timeout=f"{left:.3f}", brief=not call.as_json)
            answer: dict[str, Any] = call.client.get(url)
        except Unreachable as error:
            if not known or (deadline is not None and time.monotonic() >= deadline):
                raise
            away_since = _away(call, away_since, error)
            time.sleep(0.5)
            continue
        run, known, away_since = answer["id"], True, None  # `latest` stays the run that it was
        if answer["state"] == "finished" or (deadline is not None and time.monotonic() >= deadline):
            return answer
        time.sleep(0.05)  # a daemon that stops answers at once, over and over


def _conclude(call: Call, run: dict[str, Any]) -> None:
    took = lasting(run["started_at"], run["finished_at"], time.time())
    outcome = call.screen.paint(run["outcome"], run["outcome"])
    text = ", ".join(f"{n} {word.replace('_', ' ')}" for word, n in run["counts"].items())
    call.say(f"run {run['id']} {outcome} in {took}: {text or 'no steps'}")
    for step in run["steps"]:
        if step["outcome"] in ("failed", "timed_out", "lost"):
            call.note(f"{run['id']}/{shown(step['name'])}: {shown(step['why'] or step['outcome'])}")
            if step["attempts"]:
                call.note(f"hint: `mlpipectl logs {run['id']}/{shown(step['name'])}` shows what it printed")


# --- logs -----------------------------------------------------------------------------------------------------------
def logs(call: Call) -> int:
    a = call.args
    run, step = words.split(a.what, "a run or a step of one")
    stream = "stderr" if a.stderr else None
    try:
        _print_logs(call, path("runs", run, "logs", step=step, attempt=a.attempt, stream=stream, follow=a.follow))
    except KeyboardInterrupt:
        if a.follow:
            call.note(f"\nno longer following; run {run} goes on")
        raise
    return 0


def _print_logs(call: Call, url: str) -> None:
    """Bytes as they are to a file or pipe, harmless text to a terminal; headers on stderr, where the stream changes.

    Raises Unreachable when the daemon stops or goes away meanwhile.
    """
    untouched = getattr(call.args, "raw", False) or not call.screen.terminal
    current: tuple[Any, ...] | None = None
    one_step = "/" in str(getattr(call.args, "what", ""))
    decoders: dict[tuple[Any, ...], codecs.IncrementalDecoder] = {}
    for event, piece in call.client.events(url):
        if event == "end":
            if piece.get("reason") == "stopping":
                raise Unreachable("the daemon is stopping; what runs goes on", hint="ask again when it is back")
            return
        if call.as_json:
            call.line(piece)
            continue
        source = (piece["step"], piece["attempt"], piece["stream"])
        if piece.get("note"):
            _header(call, f"==> {shown(piece['step'])}: {shown(piece['note'])}")
        if source != current and (current is not None or not one_step):
            _header(call, f"==> {shown(piece['step'])} ({piece['stream']})")
        current = source
        if piece.get("skipped"):
            _header(call, f"\n==> {size(piece['skipped'])} of it were not kept")
        data = base64.b64decode(piece["data"]) if "data" in piece else piece["text"].encode()
        if untouched:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            decoder = decoders.setdefault(source, codecs.getincrementaldecoder("utf-8")("backslashreplace"))
            print(shown_log(decoder.decode(data)), end="", flush=True)


def _header(call: Call, text: str) -> None:
    sys.stdout.flush()
    call.note(call.screen.paint(text, "dim") if sys.stderr.isatty() else text)


# --- events ---------------------------------------------------------------------------------------------------------
def events(call: Call) -> int:
    a = call.args
    if not a.follow:
        answer = call.client.get(path("events", run=a.run, limit=a.limit))
        if call.as_json:
            return call.document(answer)
        for event in answer["events"]:
            call.say(_event_line(call, event))
        return 0
    history = call.client.get(path("events", run=a.run, limit=a.limit))["events"]
    last = history[-1]["id"] if history else 0
    for event in history:
        _tell(call, event)
    return _follow_events(call, last)


def _follow_events(call: Call, last: int) -> int:
    """On and on; over a restart of the daemon too, without a gap."""
    away_since: float | None = None
    while True:
        try:
            for name, event in call.client.events(path("events", run=call.args.run, follow=True, after=last)):
                away_since = None
                if name == "end":
                    if event.get("reason") == "stopping":
                        break
                    return 0
                last = event["id"]
                _tell(call, event)
        except Unreachable as error:
            away_since = _away(call, away_since, error)
        time.sleep(0.5)


def _away(call: Call, since: float | None, error: MlpipedError) -> float:
    if since is None:
        call.note(f"{error.message}; waiting for it to come back")
        return time.monotonic()
    if time.monotonic() - since > AWAY:
        raise error
    return since


def _tell(call: Call, event: dict[str, Any]) -> None:
    if call.as_json:
        call.line(event)
    else:
        print(_event_line(call, event), flush=True)


def _event_line(call: Call, event: dict[str, Any]) -> str:
    where = "" if event["run"] is None else f" {event['run']}" + (f"/{shown(event['step'])}" if event["step"] else "")
    data = " ".join(f"{shown(name)}={shown(value)}" for name, value in event["data"].items() if name != "token")
    word = event["data"].get("outcome") or event["kind"].rpartition(".")[2]
    kind = call.screen.paint(f"{shown(event['kind']):<18}", word)
    return f"{event['at']}  {kind}{where}  {data}".rstrip()
