"""`mlpipectl`: everyone's command. Words in; the verb's module is imported, asks the daemon, and prints what it says.

Starts fast: argparse, json and a socket. A test holds the list of what is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlpiped.cli.client import Client, find_socket
from mlpiped.cli.front import Parser, guarded
from mlpiped.cli.render import Screen

if TYPE_CHECKING:
    from collections.abc import Sequence


class Call:
    """One call of one verb: its words, the daemon, and where answers go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.client = Client(find_socket(args.socket, os.environ))
        self.screen = Screen()

    @property
    def as_json(self) -> bool:
        return bool(self.args.json)

    def document(self, value: Any) -> int:
        """Print one JSON document. On a terminal it is indented, and nothing in it can act there."""
        if self.screen.terminal:
            print(json.dumps(value, indent=2))
        else:
            print(json.dumps(value, ensure_ascii=False))
        sys.stdout.flush()
        return 0

    def line(self, value: Any) -> None:
        """Print one document of a stream, on one line."""
        print(json.dumps(value, ensure_ascii=self.screen.terminal), flush=True)

    def say(self, text: str) -> int:
        """Print text that is data; nothing when there is none."""
        if text:
            print(text)
        return 0

    def note(self, text: str) -> None:
        """A word beside the data."""
        print(text, file=sys.stderr, flush=True)


class _Formatter(argparse.HelpFormatter):
    """As argparse's, which makes one for each argument and would import `shutil` to ask for the terminal's width."""

    def __init__(self, prog: str, **more: Any) -> None:
        if more.get("width") is None:
            try:
                more["width"] = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns) - 2
            except (OSError, ValueError):
                more["width"] = 78
        super().__init__(prog, **more)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more: `{text}`")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: 0 done, 1 not succeeded, 2 wrong usage or name, 3 no daemon, 4 not permitted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    return guarded(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    top = parser()
    args = top.parse_args(argv)
    if args.version:
        from importlib.metadata import version

        print(f"mlpipectl {version('mlpiped')}")
        return 0
    if args.verb is None:
        top.print_help(sys.stderr)
        return 2
    module, _, name = args.call.partition(":")
    verb = getattr(import_module(f"mlpiped.cli.verbs.{module}"), name)
    return int(verb(Call(args)))


def parser() -> argparse.ArgumentParser:
    top = Parser(
        formatter_class=_Formatter,
        prog="mlpipectl",
        description="Ask the ML-pipeline daemon, and make it do things.",
        epilog="RUN is a run's number, `latest` or `PIPELINE:latest`. Exit status: 0 done, 1 the run did not succeed "
        "or faults were found, 2 wrong usage or unknown name, 3 the daemon cannot be reached, 4 not permitted.",
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    top.add_argument("--socket", metavar="SOCKET", help="the daemon's socket (default: $MLPIPED_SOCKET, the config's)")
    top.add_argument("--json", action="store_true", help="print JSON: one document, or one a line for a stream")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser, prog="mlpipectl")

    def add(name: str, call: str, text: str, **more: Any) -> argparse.ArgumentParser:
        verb: argparse.ArgumentParser = verbs.add_parser(
            name, help=text, description=text, formatter_class=_Formatter, **more
        )
        verb.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        verb.add_argument("--socket", metavar="SOCKET", default=argparse.SUPPRESS, help="the daemon's socket")
        verb.set_defaults(call=call)
        return verb

    _add_looks(add)
    _add_runs(add)
    _add_deeds(add)
    return top


def _add_looks(add: Any) -> None:
    status = add("status", "overview:status", "daemon, next fires, active runs, compute in use, last failures")
    status.add_argument("--watch", action="store_true", help="draw it again every two seconds")
    add("pipelines", "overview:pipelines", "what is loaded: version, triggers, next fire, last outcome; what is broken")
    add("schedules", "overview:schedules", "every trigger: next and last fire, what it waits for, its cursor")
    show = add("show", "graphs:show", "a pipeline or a run: graph, steps, parameters, what is stale")
    show.add_argument("what", metavar="PIPELINE|RUN", help="a pipeline's name, or a run")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--dot", action="store_true", help="the graph for Graphviz")
    form.add_argument("--mermaid", action="store_true", help="the graph for Mermaid")
    plan = add("plan", "graphs:plan", "what would run and what would be reused, why, and what it would cost")
    plan.add_argument("what", metavar="PIPELINE|FILE.py", help="a pipeline's name, or a file")
    _add_choice(plan)
    events = add("events", "follow:events", "what happened")
    events.add_argument("-f", "--follow", action="store_true", help="go on with what happens")
    events.add_argument("--run", metavar="RUN", help="of one run only")
    events.add_argument("-n", dest="limit", type=_count, default=100, metavar="N", help="so many (default: 100)")
    _add_compute(add)
    gc = add("gc", "overview:gc", "remove what is older than `[retention]` allows, as the daemon does every hour")
    gc.add_argument("--plan", action="store_true", help="only say what would be removed, and what it took to make")
    add("doctor", "overview:doctor", "find what is wrong; 1 when something is")
    completion = add("completion", "overview:completion", "print the completion script of a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")


def _add_compute(add: Any) -> None:
    compute = add("compute", "overview:compute", "slots and GPUs, who holds them, health of each compute")
    deeds = compute.add_subparsers(metavar="DEED", parser_class=Parser)
    texts = {"drain": "its steps finish, nothing new starts there", "undrain": "steps start there again"}
    for name, text in texts.items():
        deed = deeds.add_parser(name, help=text, description=text, formatter_class=_Formatter)
        deed.add_argument("compute", metavar="NAME", help="a compute of the config")
        deed.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        deed.add_argument("--socket", metavar="SOCKET", default=argparse.SUPPRESS, help="the daemon's socket")
        deed.set_defaults(call=f"act:{name}")


def _add_runs(add: Any) -> None:
    runs = add("runs", "runs:runs", "runs, the newest first")
    runs.add_argument("--pipeline", metavar="PIPELINE", help="of one pipeline")
    runs.add_argument("--state", choices=("queued", "running", "finished"), help="in one state")
    runs.add_argument("--outcome", choices=("succeeded", "failed", "cancelled"), help="that ended so")
    runs.add_argument("--tag", action="append", default=[], metavar="K=V", help="with this tag; may be repeated")
    runs.add_argument("--since", metavar="T", help="made since `2026-11-23`, `2026-11-23T10:00:00Z` (UTC) or `2d` ago")
    runs.add_argument("-n", dest="limit", type=_count, default=20, metavar="N", help="so many (default: 20)")
    logs = add("logs", "follow:logs", "what the steps of a run printed")
    logs.add_argument("what", metavar="RUN[/STEP]", help="a run, or one step of it")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until it has ended")
    logs.add_argument("--attempt", type=int, metavar="N", help="an earlier attempt of the step")
    logs.add_argument("--stderr", action="store_true", help="only what went to stderr")
    logs.add_argument("--raw", action="store_true", help="escape sequences too (a terminal would obey them)")
    why = add("why", "runs:why", "why a step ran, why it was reused, or why it is not running yet")
    why.add_argument("what", metavar="RUN/STEP", help="a step of a run")
    wait = add("wait", "follow:wait", "wait for a run; 1 unless it succeeded")
    wait.add_argument("run", metavar="RUN")
    wait.add_argument("--timeout", metavar="T", help="at most so long: `30s`, `2h`")
    metrics = add("metrics", "runs:metrics", "what the steps of a run measured")
    metrics.add_argument("run", metavar="RUN")
    get = add("get", "files:get", "copy an output out of the store")
    get.add_argument("what", metavar="RUN[/STEP]/OUTPUT", help="an output of a run")
    get.add_argument("dest", metavar="DEST", nargs="?", help="a path, a folder, or `-` (default: its name, here)")
    get.add_argument("--force", action="store_true", help="replace DEST when it is there")


def _add_deeds(add: Any) -> None:
    run = add("run", "act:run", "start a pipeline")
    run.add_argument("pipeline", metavar="PIPELINE")
    submit = add("submit", "act:submit", "run a pipeline that is not installed, from a file")
    submit.add_argument("file", metavar="FILE.py")
    for verb in (run, submit):
        _add_choice(verb)
        verb.add_argument("--tag", action="append", default=[], metavar="K=V", help="to find it by; may be repeated")
        verb.add_argument("--wait", action="store_true", help="wait for its end; 1 unless it succeeded")
        verb.add_argument("--follow", action="store_true", help="print its logs until it has ended; then as --wait")
    cancel = add("cancel", "act:cancel", "end a run, or one step of it")
    cancel.add_argument("what", metavar="RUN[/STEP]")
    retry = add("retry", "act:retry", "run it again as it was: what succeeded is reused")
    retry.add_argument("run", metavar="RUN")
    retry.add_argument("--wait", action="store_true", help="wait for its end; 1 unless it succeeded")
    retry.add_argument("--follow", action="store_true", help="print its logs until it has ended; then as --wait")
    for name, text in (("pause", "fire no more, over restarts too"), ("resume", "fire again")):
        add(name, f"act:{name}", text).add_argument("pipeline", metavar="PIPELINE")
    add("reload", "act:reload", "read the plugins again, and check the config")


def _add_choice(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="K=V", help="a parameter; may be repeated"
    )
    verb.add_argument("--force", nargs="*", metavar="STEP", help="run these steps, or all, whatever could be reused")
    verb.add_argument("--target", metavar="STEP", help="only this step and what it needs")
    # The generated line would put the name last, where a bare `--force` would take it for a step.
    verb.usage = (
        f"{verb.prog} {verb._get_positional_actions()[0].metavar} [-p K=V ...] [--force [STEP ...]] [OPTION ...]"
    )
