"""What the daemon has to do while it dies: a fan-out, a chain with a retry, arrivals, and two clocks.

Each step appends `TOKEN PIPELINE RUN STEP SEED WORD` to the effects file when it starts and when it ends: one write
with O_APPEND, and an fsync. The words are `start`, `end`, and `fail` for the attempt that fails as its author meant it.
"""

from __future__ import annotations

from typing import NamedTuple

from harness import SDK, Daemon, lines

ASKED = {"fan": ("src", "left", "right", "join"), "chain": ("first", "second", "third")}
"""Pipelines that are asked for by the API, and their steps."""

ARRIVING = {"land": ("keep", "tell")}
TICKING = {"tick": ("beat",), "tock": ("beat",)}
STEPS = {**ASKED, **ARRIVING, **TICKING}
LAST = {"fan": "join", "chain": "third", "land": "tell"}
FLAKY = ("chain", "second")
"""This step fails once."""

PERIOD = 1.0  # seconds, of both clocks

MARK = """\
#!/bin/sh
# mark SEED STEP WORD
printf '%s %s %s %s %s %s\\n' "$MLPIPED_TOKEN" "$MLPIPED_PIPELINE" "$MLPIPED_RUN_ID" "$2" "$1" "$3" |
    dd of={effects} oflag=append conv=notrunc,fsync status=none
"""

FAN = """
seed = PipelineParameter("seed", default="")
raw, left, right = PipelineData("raw"), PipelineData("left"), PipelineData("right")
whole, tree = PipelineData("whole"), PipelineData("tree", kind="folder")
made = f"echo {seed} $MLPIPED_TOKEN"
steps = [
    CommandStep(f"{mark} {seed} src start; {made} > {raw}; {mark} {seed} src end", name="src", outputs=[raw]),
    CommandStep(
        f"{mark} {seed} left start; sleep 0.05; cat {raw} > {left}; {made} >> {left}; {mark} {seed} left end",
        name="left", outputs=[left],
    ),
    CommandStep(
        f"{mark} {seed} right start; sleep 0.2; cat {raw} > {right}; {made} >> {right}; {mark} {seed} right end",
        name="right", outputs=[right],
    ),
    CommandStep(
        f"{mark} {seed} join start; cat {left} {right} > {whole}; {made} >> {whole};"
        f" mkdir -p {tree}/in; {made} > {tree}/in/one; {made} > {tree}/two; {mark} {seed} join end",
        name="join", outputs=[whole, tree],
    ),
]
pipeline = Pipeline("fan", steps=steps, overlap="parallel")
"""

CHAIN = """
seed = PipelineParameter("seed", default="")
one, two = PipelineData("one"), PipelineData("two")
steps = [
    CommandStep(
        f"{mark} {seed} first start; echo {seed} > {one}; {mark} {seed} first end", name="first", outputs=[one]
    ),
    CommandStep(
        f"{mark} {seed} second start; cat {one} > {two}; if mkdir {flags}/{seed} 2>/dev/null;"
        f" then {mark} {seed} second fail; exit 3; fi; {mark} {seed} second end",
        name="second", outputs=[two], retry=Retry(attempts=3, delay=0),
    ),
    CommandStep(
        f"{mark} {seed} third start; sleep 0.1; test -s {two}; {mark} {seed} third end", name="third", effect=True
    ),
]
pipeline = Pipeline("chain", steps=steps, overlap="parallel")
"""

LAND = """
files = DataReference(lab, "land/*.txt")
which, kept = PipelineParameter("which", default=""), PipelineData("kept")
name = f"$(basename {which})"
steps = [
    CommandStep(
        f"{mark} {name} keep start; cat {which} > {kept}; {mark} {name} keep end", name="keep", outputs=[kept]
    ),
    CommandStep(f"{mark} {name} tell start; test -s {kept}; {mark} {name} tell end", name="tell", effect=True),
]
trigger = OnArrival(files, settle="0.1s", batch="file", parameter=which)
pipeline = Pipeline("land", steps=steps, triggers=[trigger], overlap="parallel")
"""

CLOCK = """
beat = CommandStep(f"{mark} - beat start; sleep {pause}; {mark} - beat end", name="beat", effect=True)
trigger = Every("1s", catch_up={catch_up!r})
pipeline = Pipeline({name!r}, steps=[beat], triggers=[trigger], overlap={overlap!r})
"""


class Mark(NamedTuple):
    """One line of the effects file."""

    token: str
    pipeline: str
    run: str
    step: str
    seed: str
    word: str


class Scenario:
    """Put into a daemon's plugin folder; the effects file lies outside of its state folder."""

    def __init__(self, daemon: Daemon, *, repeatable: bool = False, prelude: str = "") -> None:
        """With `repeatable`, a step that was lost may be run again; by its author's word some may not.

        `prelude` comes before each plugin's own text: it may say what a step is.
        """
        self.daemon = daemon
        self._prelude = prelude
        self._read, self._done = 0, set[tuple[str, str]]()
        self.effects, self.land = daemon.root / "effects", daemon.lab / "land"
        mark, flags = daemon.root / "mark", daemon.root / "flags"
        mark.write_text(MARK.format(effects=self.effects))
        mark.chmod(0o755)
        self.effects.touch()
        for folder in (flags, self.land):
            folder.mkdir()
        known = f'mark, flags = "{mark}", "{flags}"\n'
        for name, body in {"fan": FAN, "chain": CHAIN, "land": LAND}.items():
            self._plugin(name, known + body, repeatable)
        tick = {"{name!r}": "'tick'", "{catch_up!r}": "'all'", "{overlap!r}": "'parallel'", "{pause}": "0.3"}
        tock = {"{name!r}": "'tock'", "{catch_up!r}": "'latest'", "{overlap!r}": "'skip'", "{pause}": "0.6"}
        for values in (tick, tock):
            body = CLOCK
            for field, value in values.items():
                body = body.replace(field, value)
            self._plugin(values["{name!r}"].strip("'"), known + body, repeatable)

    def _plugin(self, name: str, body: str, repeatable: bool) -> None:
        self.daemon.plugin(
            name, SDK + self._prelude + (body.replace("effect=True", "allow_reuse=False") if repeatable else body)
        )

    def drop(self, name: str) -> None:
        """A file arrives, with a content of its own."""
        fresh = self.daemon.root / ".fresh"
        fresh.write_text(f"{name}\n")
        fresh.rename(self.land / name)

    def marks(self) -> list[Mark]:
        return [Mark(*line.split(" ")) for line in lines(self.effects)]

    def done(self) -> set[tuple[str, str]]:
        """(pipeline, seed) of each run whose last step has ended. Reads what is new only: a soak goes on for hours."""
        with self.effects.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode().splitlines():
            mark = Mark(*line.split(" "))
            if mark.word == "end" and LAST.get(mark.pipeline) == mark.step:
                self._done.add((mark.pipeline, mark.seed))
        return self._done
