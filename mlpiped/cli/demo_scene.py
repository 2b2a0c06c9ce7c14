"""Where the demo plays: a scratch folder with data, plugin and config, a real daemon, and `mlpipectl`."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpiped.errors import MlpipedError
from mlpiped.protocol import SOCKET_PATH_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PLUGINS = Path(__file__).parent / "templates" / "plugins"
BATCHES = (80, 140, 280, 897)
"""Samples in each batch: every one about doubles what a model has seen; the rest of the data set is held out."""
HOLDOUT = 400

CONFIG = """\
[daemon]
state_dir = "{root}/state"
runtime_dir = "{root}/run"
plugins = ["{root}/plugins"]
log = "json"
on_stop = "cancel"

[control]
socket = "{root}/run/socket"

[datastores.lab]
path = "{root}/lab"

[compute.local]
kind = "local"
slots = 2
"""


def scratch_folder() -> Path:
    """A new one, below $TMPDIR unless a socket in it would have too long a path."""
    prefix, place = "mlpiped-demo-", tempfile.gettempdir()
    longest = os.path.join(os.path.realpath(place), f"{prefix}12345678", "run", "socket")
    short = len(os.fsencode(longest)) <= SOCKET_PATH_LIMIT
    return Path(tempfile.mkdtemp(prefix=prefix, dir=place if short else "/tmp")).resolve()


class Broken(MlpipedError):
    """what the demo shows does not hold"""


class Scene:
    """The scratch folder and the daemon that works in it. `close` ends the one and removes the other."""

    def __init__(self) -> None:
        self.root = scratch_folder()
        self.incoming = self.root / "lab" / "digits" / "incoming"
        self.scripts = self.root / "plugins" / "digits"
        self.socket = self.root / "run" / "socket"
        self.log = self.root / "mlpiped.log"
        self.batches: list[Path] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("MLPIPED_")}
        self.env |= {"MLPIPED_SOCKET": str(self.socket), "NO_COLOR": "1", "COLUMNS": "110"}

    # --- what is laid out -----------------------------------------------------------------------------------
    def lay_out(self) -> None:
        """Config, plugin and the digits data set, split into batches that wait outside of the watched folder."""
        for folder in (self.incoming, self.root / "ready", self.socket.parent):
            folder.mkdir(parents=True)
        (self.root / "mlpiped.toml").write_text(CONFIG.format(root=self.root))
        shutil.copytree(PLUGINS, self.root / "plugins", ignore=shutil.ignore_patterns("__pycache__", "boxes*"))
        numpy = importlib.import_module("numpy")
        pixels, digits = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
        rows = numpy.column_stack([pixels, digits]).astype(int)
        numpy.random.default_rng(0).shuffle(rows)
        numpy.savetxt(self.incoming.parent / "holdout.csv", rows[:HOLDOUT], delimiter=",", fmt="%d")
        start = HOLDOUT
        for number, size in enumerate(BATCHES, 1):
            path = self.root / "ready" / f"batch-{number}.csv"
            numpy.savetxt(path, rows[start : start + size], delimiter=",", fmt="%d")
            self.batches.append(path)
            start += size

    def land(self, number: int, name: str | None = None) -> Path:
        """Let batch `number` (from 1) arrive as careful senders do: written elsewhere, then renamed into place."""
        source = self.batches[number - 1]
        copy = self.root / f".{source.name}.sent"
        shutil.copyfile(source, copy)
        return copy.rename(self.incoming / (name or source.name))

    def edit(self, script: str, old: str, new: str) -> None:
        """Change one script of the plugin, as an editor does."""
        path = self.scripts / script
        text = path.read_text()
        if text.count(old) != 1:
            raise Broken(f"`{script}` of the plugin is not the one that the demo knows: no {old!r} to change")
        path.write_text(text.replace(old, new))

    # --- the daemon -----------------------------------------------------------------------------------------
    def start(self) -> None:
        """`mlpiped serve` as a process of its own; returns when its socket accepts."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [program("mlpiped"), "serve", "--config", self.root / "mlpiped.toml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                cwd=self.root,
                start_new_session=True,
            )
        self.until(self._accepts, "the daemon's socket", 20, pause=0.01)

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as knock:
            return knock.connect_ex(str(self.socket)) == 0

    def stop(self) -> int:
        """SIGTERM, and the daemon's exit status."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return -signal.SIGKILL
        finally:
            self.process = None

    def close(self) -> None:
        """Leave nothing: not the daemon, not a step, not the folder. Safe to call at any time."""
        if self.process is not None:
            self.stop()
        for pid in self.leftovers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)

    def leftovers(self) -> list[int]:
        """Processes that were started below the scratch folder and still run."""
        return [pid for pid in _others() if _belongs(pid, str(self.root))]

    # --- speaking with it -----------------------------------------------------------------------------------
    def say(self, *words: object, expect: int = 0) -> str:
        """What `mlpipectl WORDS` prints for a person."""
        done = subprocess.run(
            [program("mlpipectl"), *(str(word) for word in words)],
            env=self.env,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode != expect:
            line = " ".join(str(word) for word in words)
            raise Broken(f"`mlpipectl {line}` ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def ask(self, *words: object) -> Any:
        """The JSON document of `mlpipectl WORDS --json`."""
        return json.loads(self.say(*words, "--json"))

    def until(self, look: Callable[[], Any], what: str, timeout: float, pause: float = 0.1) -> Any:
        """The first true answer of `look`. Raises Broken when there is none in time, or when the daemon has ended."""
        deadline = time.monotonic() + timeout
        while not (answer := look()):
            if self.process is not None and self.process.poll() is not None:
                raise Broken(f"the daemon ended with {self.process.returncode}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise Broken(f"waited {timeout:g} s in vain for {what}")
            time.sleep(pause)
        return answer

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-800:].strip()


def program(name: str) -> str:
    """The absolute path of one of our two programs: beside this Python, else on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Broken(f"`{name}` is not installed", hint="run `pip install mlpiped` in this environment")
    return found


def _others() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid())


def _belongs(pid: int, folder: str) -> bool:
    for name in ("cmdline", "environ"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in Path(f"/proc/{pid}/{name}").read_bytes():
                return True
    return False
