"""How things look on a terminal: nothing acts there, columns line up, colour says how it ended, times are for people.

Whatever comes from outside (names, sentences, logs) is shown by `shown`: control characters, escape sequences and
characters that turn the direction of writing come out as `\\x1b`, `\\u202e`.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# C0, DEL, C1, lone surrogates, line and paragraph separators, and everything that marks or turns a direction.
_ACTING = "\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufff9-\ufffb"
_ACTS = re.compile(f"[{_ACTING}]")
_ACTS_IN_LOG = re.compile(f"(?![\n\t])[{_ACTING}]")
_WIDE = re.compile(
    "[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\U0001f300-\U0001faff]"
)
_COLOURS = {
    "succeeded": "32", "reused": "36", "failed": "31", "timed_out": "31", "lost": "31", "cancelled": "33",
    "skipped": "90", "running": "34", "collecting": "34", "submitting": "34", "queued": "33", "waiting": "90",
    "ok": "32", "warn": "33", "fail": "31", "run": "33", "reuse": "36", "skip": "90", "unknown": "35",
    "paused": "33", "broken": "31", "bold": "1", "dim": "90",
}  # fmt: skip


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is no UTF-8
        code -= 0xDC00
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(code) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def shown(text: object) -> str:
    """`text` in one line, harmless."""
    return _ACTS.sub(_escape, str(text))


def shown_log(text: str) -> str:
    """A piece of a log: new lines and tabs are kept; so is a carriage return before a new line, less its effect."""
    return _ACTS_IN_LOG.sub(_escape, text.replace("\r\n", "\n"))


def counted(number: int, what: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


class Screen:
    """stdout as it is: a terminal with colour, one without, or a pipe."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def paint(self, text: str, kind: str | None) -> str:
        code = _COLOURS.get(kind or "")
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code else text

    def state(self, thing: dict[str, Any]) -> Cell:
        """The outcome of a run or step or, before there is one, its state."""
        word = thing.get("outcome") or thing.get("state") or ""
        return Cell(str(word).replace("_", " "), str(word))

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]], *, indent: str = "") -> str:
        """Columns that line up; the last one is not padded. Cells are made harmless here."""
        cells = [[_cell(value) for value in row] for row in rows]
        if not cells:
            return ""
        titles = [Cell(title, "dim") for title in head]
        lines = ([titles] if any(head) else []) + cells
        widths = [max(width(line[i].text) for line in lines) for i in range(len(head))]
        out = []
        for line in lines:
            parts = [self.paint(c.text, c.kind) + " " * (widths[i] - width(c.text)) for i, c in enumerate(line[:-1])]
            last = line[-1]
            out.append((indent + "  ".join([*parts, self.paint(last.text, last.kind)])).rstrip())
        return "\n".join(out)

    def bar(self, done: int, total: int, size: int = 20) -> str:
        filled = size * done // total if total else 0
        return "[" + "#" * filled + "." * (size - filled) + f"] {done}/{total}"


class Cell:
    """A text that was made harmless, and what it means (a key of the colours)."""

    __slots__ = ("kind", "text")

    def __init__(self, text: object, kind: str | None = None) -> None:
        self.text = shown(text)
        self.kind = kind


def _cell(value: object) -> Cell:
    return value if isinstance(value, Cell) else Cell("-" if value is None or value == "" else value)


def width(text: str) -> int:
    """Columns on a terminal."""
    return len(text) if text.isascii() else len(text) + len(_WIDE.findall(text))


def cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"


# --- times and sizes ------------------------------------------------------------------------------------------------
def seconds_of(stamp: str | None) -> float | None:
    """RFC 3339 in UTC -> seconds since the epoch. By hand: `datetime` need not be imported."""
    match = re.match(r"(\d+)-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(\.\d+)?Z\Z", stamp or "")
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    y = year - (month <= 2)
    days = 365 * y + y // 4 - y // 100 + y // 400 + (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 719469
    return ((days * 24 + hour) * 60 + minute) * 60 + second + float(match[7] or 0)


def ago(stamp: str | None, now: float) -> str:
    """`3 min ago`, `in 2 h`, `just now`; `-` for no time."""
    then = seconds_of(stamp)
    if then is None:
        return "-"
    gap = now - then
    if abs(gap) < 1:
        return "just now" if gap >= 0 else "now"
    return f"{_span(gap)} ago" if gap > 0 else f"in {_span(-gap)}"


def _span(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size * (2 if unit == "d" else 1):
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def lasting(begin: str | None, end: str | None, now: float) -> str:
    """How long it took, or has taken until now; `-` before it began."""
    start = seconds_of(begin)
    return "-" if start is None else duration((seconds_of(end) or now) - start)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(count: int | None) -> str:
    if count is None:
        return "-"
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def number(value: object) -> str:
    """A metric or a parameter as people read it, and as they would write it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)
