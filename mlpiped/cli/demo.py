"""`mlpiped demo`: the main job, end to end, on a temporary state folder. Exit status 0 only if all of it held.

Everything that is said here is asked of a real daemon through `mlpipectl`; nothing is taken for granted.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpiped.cli.demo_chart import Point, draw
from mlpiped.cli.demo_scene import BATCHES, Broken, Scene
from mlpiped.cli.front import Parser, guarded
from mlpiped.errors import MlpipedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
PICTURE, MODEL, REPORT = "accuracy.png", "model.joblib", "report.json"
MARKS = {"succeeded": "ran", "reused": "reused"}


class Teller:
    """Lines for the person who watches: chapters, facts that hold, and where a run is just now."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.colour = self.live and "NO_COLOR" not in os.environ
        self.began = time.monotonic()
        self.chapters = 0
        self.facts = 0

    def _paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def chapter(self, title: str) -> None:
        self.chapters += 1
        print(f"\n{self._paint(f'{self.chapters}  {title}', '1')}", flush=True)

    def holds(self, what: str) -> None:
        self.facts += 1
        self._line(f"   {self._paint('✓', '32')} {what}")

    def fails(self, what: str) -> None:
        self._line(f"   {self._paint('✗', '31')} {what}")

    def notes(self, text: str) -> None:
        self._line(f"     {self._paint(text, '2')}")

    def shows(self, words: str, output: str, most: int = 12) -> None:
        """What a command printed, as it printed it."""
        self._line(f"     {self._paint('$ mlpipectl ' + words, '36')}")
        lines = output.rstrip().splitlines()
        for line in lines[:most]:
            self._line(f"       {line}")
        if len(lines) > most:
            self._line(f"       … {len(lines) - most} more lines")

    def progress(self, text: str) -> None:
        """A line that the next one takes the place of; nothing where there is no terminal."""
        if self.live:
            print(f"\r\033[K     {text}", end="", flush=True)

    def _line(self, text: str) -> None:
        print(("\r\033[K" if self.live else "") + text, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class Story:
    """The chapters, in order. Each raises Broken with a sentence when something does not hold."""

    def __init__(self, scene: Scene, teller: Teller, out: Path) -> None:
        self.scene = scene
        self.tell = teller
        self.out = out
        self.last = 0  # number of the newest run that the story knows
        self.points: list[Point] = []

    def play(self) -> None:
        self.opens()
        self.first_batch()
        self.same_again()
        self.more_batches()
        self.comment()
        self.same_output()
        self.parameter()
        self.questions()
        self.picture()
        self.closes()

    # --- chapters -------------------------------------------------------------------------------------------
    def opens(self) -> None:
        self.tell.chapter("a daemon on a scratch folder")
        self.scene.lay_out()
        self.tell.notes(f"{self.scene.root}: plugin `digits`, its data split into {len(BATCHES)} batches")
        began = time.monotonic()
        self.scene.start()
        self.tell.holds(f"`mlpiped serve` answers {time.monotonic() - began:.1f} s after its start")
        self.scene.until(self._loaded, "pipeline `digits`", 20)
        self.tell.shows("pipelines", self.scene.say("pipelines"))

    def first_batch(self) -> None:
        self.tell.chapter("data arrives: the run starts by itself")
        run = self.arrival(
            1, {"prepare": "succeeded", "holdout": "succeeded", "train": "succeeded", "evaluate": "succeeded"}
        )
        for step in run["steps"]:
            self.check(
                step["exit_code"] == 0 and step["attempts"] == 1,
                f"`{step['name']}` ran as one process that ended with 0",
                f"`{step['name']}` ended with {step['exit_code']} after {step['attempts']} attempts",
                quiet=True,
            )
        self.tell.holds("four real processes, each one attempt, each with exit status 0")
        self.tell.shows("logs latest/evaluate", self.scene.say("logs", "latest/evaluate"))

    def same_again(self) -> None:
        self.tell.chapter("the same data arrives again: nothing starts")
        self.scene.land(1, "batch-1-again.csv")
        self.tell.notes("the content of batch-1.csv has landed once more, as batch-1-again.csv")
        self.tell.progress("waiting until the daemon has looked at it …")
        self.scene.until(self._has_taken_two, "the daemon to look at the second arrival", 20)
        self.tell.holds("the daemon has looked at it: `schedules` knows 2 files now and waits for new ones")
        known = self.newest()
        self.check(known == self.last, "and no run was started", f"run {known} was started by the same content")

    def more_batches(self) -> None:
        self.tell.chapter("new batches: only what they touch runs")
        touched = {"prepare": "succeeded", "holdout": "reused", "train": "succeeded", "evaluate": "succeeded"}
        for number in range(2, len(BATCHES) + 1):
            self.arrival(number, touched)
        self.tell.shows("why latest/prepare", self.scene.say("why", "latest/prepare"))
        self.tell.shows("why latest/holdout", self.scene.say("why", "latest/holdout"))

    def comment(self) -> None:
        self.tell.chapter("a comment in train.py: nothing runs")
        self.scene.edit(
            "train.py", "    run = Run.get_context()\n", "    # fit, store, tell\n    run = Run.get_context()\n"
        )
        self.request("a comment", dict.fromkeys(("prepare", "holdout", "train", "evaluate"), "reused"))

    def same_output(self) -> None:
        self.tell.chapter("another prepare.py that makes the same bytes: one step runs, and the wave stops there")
        self.scene.edit("prepare.py", "    kept = np.sort(first)\n", "    first.sort()\n    kept = first\n")
        self.tell.shows("plan digits", self.scene.say("plan", "digits"))
        run = self.request(
            "prepare.py", {"prepare": "succeeded", "holdout": "reused", "train": "reused", "evaluate": "reused"}
        )
        why = self.step(run, "prepare")["why"] or ""
        self.check("prepare.py" in why, f"and it says why: {why}", f"`why` does not name prepare.py: {why}")

    def parameter(self) -> None:
        self.tell.chapter("another parameter: what does not use it is reused")
        self.request(
            "C = 1",
            {"prepare": "reused", "holdout": "reused", "train": "succeeded", "evaluate": "succeeded"},
            "-p",
            "C=1.0",
        )

    def questions(self) -> None:
        self.tell.chapter("what people ask")
        for words in (["status"], ["runs"], ["why", "latest/train"], ["logs", "latest/train"], ["metrics", "latest"]):
            text = self.scene.say(*words)
            self.check(bool(text.strip()), "", f"`mlpipectl {' '.join(words)}` prints nothing", quiet=True)
            self.tell.shows(" ".join(words), text)
        model = self.out / MODEL
        self.scene.say("get", "latest/train/model", model)
        classes = len(importlib.import_module("joblib").load(model).classes_)
        self.check(
            classes == 10,
            f"`get latest/train/model`: {model.stat().st_size:,} bytes, a model that knows {classes} digits",
            f"the model that `get` brought knows {classes} digits",
        )
        self.scene.say("get", "latest/evaluate/report", self.out / REPORT)
        self.tell.holds("`get latest/evaluate/report`: beside it")

    def picture(self) -> None:
        self.tell.chapter("the metric over the runs")
        path = self.out / PICTURE
        draw(self.points, path)
        self.check(path.stat().st_size > 0, f"drawn: {path}", "the picture is empty")
        arrived = [point.accuracy for point in self.points[: len(BATCHES)]]
        self.check(
            arrived[-1] > arrived[0],
            f"accuracy rose from {arrived[0]:.1%} to {arrived[-1]:.1%} as data arrived",
            f"accuracy went from {arrived[0]:.1%} to {arrived[-1]:.1%}",
        )

    def closes(self) -> None:
        self.tell.chapter("the end: nothing stays")
        status = self.scene.stop()
        self.check(status == 0, "the daemon ended at SIGTERM with 0", f"the daemon ended with {status}")
        left = self.scene.leftovers()
        self.check(not left, "no process is left", f"processes are left: {left}")
        self.scene.close()
        self.check(not self.scene.root.exists(), "the scratch folder is gone", f"`{self.scene.root}` is still there")

    # --- pieces ---------------------------------------------------------------------------------------------
    def check(self, good: bool, holds: str, broken: str, *, quiet: bool = False) -> None:
        if not good:
            raise Broken(broken)
        if not quiet:
            self.tell.holds(holds)

    def arrival(self, number: int, expected: dict[str, str]) -> dict[str, Any]:
        """Let a batch arrive, wait for the run that it fires, and hold it to `expected`."""
        began = time.monotonic()
        name = self.scene.land(number).name
        self.tell.progress(f"{name} has landed; it must hold still for 1 s …")
        fired = self.scene.until(lambda: self._newer(self.last), f"a run that {name} fires", 20)
        after = time.monotonic() - began
        self.check(
            fired["id"] == self.last + 1 and fired["cause"]["kind"] == "arrival",
            f"{name} ({BATCHES[number - 1]} samples) fired run {fired['id']} {after:.1f} s after it landed",
            f"run {fired['id']} after run {self.last} has the cause {fired['cause']}",
        )
        return self.finished(fired["id"], expected, f"{sum(BATCHES[:number])} samples")

    def request(self, label: str, expected: dict[str, str], *words: str) -> dict[str, Any]:
        """Ask for a run by hand and hold it to `expected`."""
        number = int(self.scene.ask("run", "digits", *words)["id"])
        return self.finished(number, expected, label)

    def finished(self, number: int, expected: dict[str, str], label: str) -> dict[str, Any]:
        began = time.monotonic()
        run = self.scene.until(lambda: self._watch(number), f"the end of run {number}", 60)
        self.last = number
        found = {step["name"]: step["outcome"] for step in run["steps"]}
        if found != expected:
            for step in run["steps"]:
                self.tell.fails(
                    f"{step['name']}: {step['outcome']}, expected {expected.get(step['name'])}: {step['why']}"
                )
            raise Broken(f"run {number} did not do what it should", hint=self.scene.last_words())
        accuracy = self.accuracy(number)
        line = "   ".join(f"{name} {MARKS[outcome]}" for name, outcome in found.items())
        self.tell.holds(f"run {number}: {line}   ({time.monotonic() - began:.1f} s, accuracy {accuracy:.1%})")
        self.points.append(Point(number, accuracy, label, found["evaluate"] == "succeeded"))
        return dict(run)

    def accuracy(self, number: int) -> float:
        """The accuracy of a run's model; that of the run it was reused from where evaluate did not run."""
        for step in self.scene.ask("metrics", number)["steps"]:
            if "accuracy" in step["last"]:
                return float(step["last"]["accuracy"])
        raise Broken(f"`mlpipectl metrics {number}` has no accuracy")

    def step(self, run: dict[str, Any], name: str) -> dict[str, Any]:
        return next(step for step in run["steps"] if step["name"] == name)

    def newest(self) -> int:
        return max((int(run["id"]) for run in self._runs()), default=0)

    def _has_taken_two(self) -> bool:
        """Whether the trigger has come to a decision about the second file."""
        rows = self.scene.ask("schedules")["schedules"]
        row = next(row for row in rows if row["kind"] == "arrival")
        return bool(row["cursor"]["files"] == 2 and row["waits_for"] == "new files")

    def _loaded(self) -> bool:
        return any(pipeline["name"] == "digits" for pipeline in self.scene.ask("pipelines")["pipelines"])

    def _runs(self) -> list[dict[str, Any]]:
        return list(self.scene.ask("runs", "--pipeline", "digits")["runs"])

    def _newer(self, known: int) -> dict[str, Any] | None:
        return next((run for run in reversed(self._runs()) if run["id"] > known), None)

    def _watch(self, number: int) -> dict[str, Any] | None:
        run: dict[str, Any] = self.scene.ask("show", number)
        steps = "   ".join(f"{step['name']} {step['outcome'] or step['state']}" for step in run["steps"])
        self.tell.progress(f"run {number}: {steps}")
        return run if run["state"] == "finished" else None


def main(argv: Sequence[str] = ()) -> int:
    """Play the story; 0 only if everything in it held."""
    parser = Parser(prog="mlpiped demo", description="Show the main job, end to end, on a temporary state folder.")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), metavar="DIR", help="for the picture and the model"
    )
    options = parser.parse_args(list(argv))
    return guarded(lambda: _demo(options.out.absolute()))


def _demo(out: Path) -> int:
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MlpipedError(f"the demo needs {' and '.join(missing)}", hint="run `pip install 'mlpiped[demo]'`")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (PICTURE, MODEL, REPORT):  # those of the last time; nothing else in the folder is ours
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise UsageError(f"cannot write to `{out}`: {reason}", hint="name another folder with --out") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a `finally` sees the end of either kind
    tell, scene = Teller(), Scene()
    try:
        Story(scene, tell, out).play()
    except Broken as broken:
        tell.fails(broken.message)
        raise
    finally:
        scene.close()
    print(f"\n{tell.facts} facts held in {tell.seconds:.0f} s; {out} has the picture, the model and its report")
    return 0
