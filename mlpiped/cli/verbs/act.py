"""Verbs that change something: run, submit, cancel, retry, pause, resume, drain, undrain, reload."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlpiped.cli.render import counted, shown
from mlpiped.cli.verbs import words
from mlpiped.protocol import path

if TYPE_CHECKING:
    from mlpiped.cli.ctl import Call


def run(call: Call) -> int:
    body = {**words.choice(call.args), "tags": words.pairs(call.args.tag, "tag")}
    answer = call.client.post(path("pipelines", call.args.pipeline, "runs"), body)
    return _started(call, answer, f"of `{shown(call.args.pipeline)}` has started")


def submit(call: Call) -> int:
    body = {**words.choice(call.args), "tags": words.pairs(call.args.tag, "tag")}
    body["file"] = words.plugin_file(call.args.file)
    answer = call.client.post(path("submit"), body, timeout=300)
    return _started(call, answer, f"of `{shown(call.args.file)}` has started")


def retry(call: Call) -> int:
    answer = call.client.post(path("runs", call.args.run, "retry"))
    return _started(call, answer, f"has started: it tries run {answer['retry_of']} again")


def _started(call: Call, answer: dict[str, Any], what: str) -> int:
    """Say the number, on stdout for programs; then wait or follow if that is asked for."""
    number = answer["id"]
    if not (call.args.wait or call.args.follow):
        if call.as_json:
            return call.document(answer)
        call.say(str(number))
        call.note(f"run {number} {what}; `mlpipectl logs {number} -f` follows it")
        return 0
    from mlpiped.cli.verbs import follow

    call.note(f"run {number} {what}")
    return follow.to_the_end(call, number, logs=call.args.follow)


def cancel(call: Call) -> int:
    number, step = words.split(call.args.what, "a run or a step of one")
    answer = call.client.post(path("runs", number, "cancel"), {"step": step})
    if call.as_json:
        return call.document(answer)
    what = f"step `{shown(step)}` of run {answer['id']}" if step else f"run {answer['id']}"
    call.note(f"{what} is being cancelled")
    return 0


def pause(call: Call) -> int:
    return _switch(call, "pipelines", "pipeline", "pause", "fires no more until it is resumed")


def resume(call: Call) -> int:
    return _switch(call, "pipelines", "pipeline", "resume", "fires again")


def drain(call: Call) -> int:
    return _switch(call, "compute", "compute", "drain", "is drained: its steps finish, nothing new starts")


def undrain(call: Call) -> int:
    return _switch(call, "compute", "compute", "undrain", "takes steps again")


def _switch(call: Call, where: str, kind: str, verb: str, sentence: str) -> int:
    answer = call.client.post(path(where, getattr(call.args, kind), verb))
    if call.as_json:
        return call.document(answer)
    call.note(f"`{shown(answer[kind])}` {sentence}")
    return 0


def reload(call: Call) -> int:
    answer = call.client.post(path("reload"), timeout=300)
    broken, config = answer.get("broken", []), str(answer.get("config", "-"))
    word, _, faults = config.partition(": ") if config.startswith("refused") else (config, "", "")
    if call.as_json:
        call.document(answer)
        return 1 if broken or faults else 0
    for fault in broken:
        place = f"{fault['file']}:{fault['line']}" if fault["line"] else fault["file"]
        call.say(f"{shown(place)}: {shown(fault['message'])}")
        if fault["hint"]:
            call.say(f"  hint: {shown(fault['hint'])}")
    for line in faults.splitlines():
        call.say(shown(line))
    call.note(
        f"{counted(answer.get('pipelines', 0), 'pipeline')}, {counted(len(broken), 'fault')}; "
        f"config: {shown(word)}{', what the daemon has stays in use' if faults else ''}"
    )
    return 1 if broken or faults else 0
