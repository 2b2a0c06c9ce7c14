"""What people write on the command line: `RUN/STEP`, `k=v`, files, spans of time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mlpiped.config import values as config_values
from mlpiped.errors import UsageError
from mlpiped.protocol import as_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable


def split(text: str, kind: str) -> tuple[str, str | None]:
    """`12/train` -> ("12", "train"); `12` -> ("12", None). Raises UsageError."""
    run, slash, rest = text.partition("/")
    if not run or (slash and (not rest or "/" in rest)):
        raise UsageError(f"not {kind}: `{text}`", hint="as in `12/train`, `latest/train` or `digits:latest/train`")
    return run, rest or None


def pairs(words: Iterable[str], what: str) -> dict[str, str]:
    """`k=v` words; the last one of a name wins. Raises UsageError."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise UsageError(f"not a {what}: `{word}`", hint=f"a {what} is `name=value`")
        found[name] = value
    return found


def choice(args: argparse.Namespace) -> dict[str, Any]:
    """The body's words for `-p`, `--force` and `--target`. Bare `--force` means all steps."""
    return {
        "parameters": {name: as_text(value) for name, value in pairs(args.parameter, "parameter").items()},
        "force": False if args.force is None else (args.force or True),
        "target": args.target,
    }


def plugin_file(text: str) -> str:
    """The absolute path of a file that is there. Raises UsageError."""
    path = os.path.abspath(text)
    if not os.path.exists(path):
        raise UsageError(f"no file at `{text}`")
    return path


def is_file(text: str) -> bool:
    return text.endswith(".py") or "/" in text


def span(text: str | None) -> float | None:
    """`30`, `30s`, `1h30m` -> seconds. Raises UsageError."""
    if text is None:
        return None
    try:
        return float(text) if text.replace(".", "", 1).isdigit() else config_values.seconds(text)
    except ValueError as error:
        message, _, hint = str(error).partition("\n")
        raise UsageError(f"`{text}` {message}", hint=hint or None) from None
