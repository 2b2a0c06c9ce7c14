"""What a script may say while it runs: metrics, progress, tags. Without the daemon the same calls print.

One JSON line a call is appended to `$MLPIPED_METRICS`:

    {"kind": "metric", "name": "accuracy", "value": 0.97, "step": 3, "time": 1795428000.123}
    {"kind": "table", "name": …, "value": {"column": […]}}      {"kind": "image", "name": …, "path": "/…"}
    {"kind": "progress", "done": 3, "total": 10}                {"kind": "tag", "name": …, "value": "…"}

A line without `kind` is a metric. A number that JSON has no form for is the text "NaN", "Infinity" or "-Infinity".
Trouble with the file is said once on stderr and never stops the script.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_PROGRESS_PAUSE = 0.2  # seconds between two progress lines: a tight loop must not fill the disk

_current: Run | None = None


class Run:
    """The step that this script is."""

    def __init__(self, metrics: str | None) -> None:
        self._metrics = metrics
        self._complained = False
        self._last_progress = 0.0
        self.token = os.environ.get("MLPIPED_TOKEN")
        self.attempt = int(os.environ.get("MLPIPED_ATTEMPT") or 1)

    @classmethod
    def get_context(cls, allow_offline: bool = True) -> Run:
        """The run of this process: one object, however often it is asked for."""
        global _current
        if _current is None:
            _current = cls(os.environ.get("MLPIPED_METRICS") or None)
        if _current._metrics is None and not allow_offline:
            raise RuntimeError("this script does not run as a step of mlpiped: `$MLPIPED_METRICS` is not set")
        return _current

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that the step uses; empty without the daemon."""
        path = os.environ.get("MLPIPED_PARAMS")
        if not path:
            return {}
        import json

        with open(path, encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
        return found

    def log(self, name: str, value: object, step: int | None = None) -> None:
        """A number (or a short text) under a name; `step` counts epochs or the like."""
        line: dict[str, object] = {"kind": "metric", "name": name, "value": _plain(value)}
        if step is not None:
            line["step"] = _plain(step)
        self._say(line, f"{name} = {line['value']}" + (f" (step {step})" if step is not None else ""))

    def log_table(self, name: str, value: Mapping[str, Sequence[object]]) -> None:
        """Columns of equal length."""
        table = {str(column): [_plain(cell) for cell in cells] for column, cells in value.items()}
        self._say({"kind": "table", "name": name, "value": table}, f"{name}: {table}")

    def log_image(self, name: str, path: str | os.PathLike[str]) -> None:
        """An image file that the script has written, best into one of its outputs."""
        full = os.path.abspath(os.fspath(path))
        if not os.path.isfile(full):
            self._complain(f"no image to log as {name}: {full}")
        self._say({"kind": "image", "name": name, "path": full}, f"{name}: {full}")

    def progress(self, done: float, total: float | None = None) -> None:
        """How far it is. Cheap in a tight loop: a few lines a second are written, and always the last."""
        import time

        now = time.monotonic()
        finished = total is not None and done >= total
        if now - self._last_progress < _PROGRESS_PAUSE and not finished:
            return
        self._last_progress = now
        of = f" of {total}" if total is not None else ""
        self._say({"kind": "progress", "done": _plain(done), "total": _plain(total)}, f"progress: {done}{of}")

    def set_tag(self, name: str, value: object = "") -> None:
        """A word about the run, to find it by."""
        self._say({"kind": "tag", "name": name, "value": str(value)}, f"tag {name}: {value}")

    def _say(self, line: dict[str, object], offline: str) -> None:
        if self._metrics is None:
            print(offline, flush=True)  # noqa: T201 - that is what a script without the daemon is promised
            return
        import json
        import time

        line["time"] = round(time.time(), 3)
        data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace")
        try:
            file = os.open(self._metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, data)  # one write a line: processes of one step may share the file
            finally:
                os.close(file)
        except OSError as error:
            self._complain(f"metrics cannot be written: {error}")

    def _complain(self, sentence: str) -> None:
        if not self._complained:
            self._complained = True
            print(f"mlpiped: {sentence}", file=sys.stderr, flush=True)  # noqa: T201


def _plain(value: Any) -> object:
    """`value` as JSON knows it: NumPy and torch scalars become numbers, what is unknown becomes text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if not isinstance(value, float):
        item = getattr(value, "item", None)
        try:
            return _plain(item()) if callable(item) else _plain(float(value))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            return str(value)
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)
