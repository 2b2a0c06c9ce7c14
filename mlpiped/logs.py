"""What the daemon logs, and how: one pipeline for structlog and the standard library, to stderr.

Step output never passes through here. Local variables are never shown: they may hold secrets.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from mlpiped import journal

if TYPE_CHECKING:
    from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

LogFormat = Literal["journal", "json", "console"]

FIELD_LIMIT = 2048
"""Bytes of one value. journalctl shows `null` for a field above 4 KiB, so a message has to stay well below."""
MAX_FRAMES = 20
MAX_CHAIN = 5
MAX_ITEMS = 50
MAX_DEPTH = 6

_PRIORITY = {"critical": 2, "error": 3, "exception": 3, "warning": 4, "warn": 4, "info": 6, "debug": 7}
_QUIET = ("asyncssh", "apscheduler", "aiosqlite", "watchfiles", "aiohttp.access", "asyncio")


def setup(log: LogFormat, *, stream: TextIO | None = None, level: int | None = None) -> None:
    """Sends all logs of this process to `stream` (stderr) as `log` says. May be called again.

    `journal` is `json` with the priority in front as journald reads it from a service's stderr; where stderr does go to
    journald, it also gets each field by itself. The level is INFO, or DEBUG when `$MLPIPED_DEBUG` is set.
    """
    out = stream or sys.stderr
    if level is None:
        level = logging.DEBUG if os.environ.get("MLPIPED_DEBUG") else logging.INFO
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_ending(log, out)],
        use_get_message=True,
    )
    native = log == "journal" and journal.reads(out)
    handler: logging.Handler = journal.JournalHandler(out) if native else logging.StreamHandler(out)
    handler.setFormatter(formatter)
    logging.raiseExceptions = False  # a closed stderr is no reason for a traceback on it
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # loggers made at import time must follow a later set-up
    )


def _ending(log: LogFormat, out: TextIO) -> list[Processor]:
    if log == "console":
        colors = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return [
            _plain_and_short,
            _one_line,
            _exceptions_as_text,
            structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback),
        ]
    line = _journal_line if log == "journal" else _json_line
    return [_exceptions_as_data, _plain_and_short, line]


_transform = ExceptionDictTransformer(show_locals=False, max_frames=MAX_FRAMES)


def _exceptions_as_data(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    info = _raised(event.pop("exc_info", None))
    if info:
        event["exception"] = [_compact(stack) for stack in _transform(info)[:MAX_CHAIN]]
    return event


def _raised(given: object) -> ExcInfo | None:
    """What `exc_info=` may be: an exception, the three of `sys.exc_info()`, or a flag that says to take them."""
    if isinstance(given, BaseException):
        return (type(given), given, given.__traceback__)
    info = given if isinstance(given, tuple) else sys.exc_info() if given else None
    return cast("ExcInfo", info) if info and info[1] is not None else None


def _compact(stack: Mapping[str, Any]) -> dict[str, Any]:
    """One exception of a chain; a group keeps those that it holds."""
    frames = [f"{f['filename']}:{f['lineno']} {f['name']}" for f in stack["frames"]]
    plain = {"type": stack["exc_type"], "message": stack["exc_value"], "frames": frames}
    members = [[_compact(inner) for inner in member] for member in (stack.get("exceptions") or ())[:MAX_CHAIN]]
    return {**plain, "members": members} if members else plain


def _exceptions_as_text(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    info = _raised(event.pop("exc_info", None))
    if info:
        text = "".join(traceback.format_exception(info[1], limit=MAX_FRAMES)).rstrip()
        event["exception"] = "\n".join(_harmless(line) for line in text.split("\n"))
    return event


def _plain_and_short(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {key: value if key == "exc_info" else _plain(value, 0) for key, value in event.items()}


def _plain(value: Any, depth: int) -> Any:
    """JSON-able, a path as its text, nothing longer than FIELD_LIMIT bytes."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str):
        return _cut(str(value))
    if isinstance(value, bytes):
        return _cut(value[: FIELD_LIMIT + 1].decode("utf-8", "backslashreplace"))
    if isinstance(value, os.PathLike):
        return _cut(os.fsdecode(value))
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        return {_cut(str(k)): _plain(v, depth + 1) for k, v in list(value.items())[:MAX_ITEMS]}
    if depth < MAX_DEPTH and isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return _cut(str(value) if isinstance(value, BaseException) else repr(value))


def _cut(text: str) -> str:
    if len(text) * 4 <= FIELD_LIMIT:
        return text
    data = text.encode("utf-8", "surrogateescape")
    return text if len(data) <= FIELD_LIMIT else data[: FIELD_LIMIT - 3].decode("utf-8", "ignore") + "…"


def _ordered(event: MutableMapping[str, Any]) -> dict[str, Any]:
    first = {key: event.pop(key) for key in ("timestamp", "level", "event", "logger") if key in event}
    return {**first, **event}


def _json_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    line = json.dumps(_ordered(event), default=str, ensure_ascii=False, separators=(",", ":"))
    return line.encode("utf-8", "backslashreplace").decode()


def _journal_line(_logger: WrappedLogger, method: str, event: EventDict) -> str:
    return f"<{_PRIORITY.get(event.get('level', method), 6)}>" + _json_line(_logger, method, event)


def _one_line(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A terminal does what control characters say, so none of a name or a message reaches it."""
    return {key: value if key == "exc_info" else _harmless(value) for key, value in event.items()}


def _harmless(value: Any) -> Any:
    if isinstance(value, str):
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
    return value
