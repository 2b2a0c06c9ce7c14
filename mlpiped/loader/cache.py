"""What the registry knew, over a restart: one JSON file, replaced by rename. Losing it costs the imports again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_VERSION = 2
_log = logging.getLogger("mlpiped.loader")


def identity() -> str:
    """Of what turns a plugin into a spec: Python and our own files. With another one every plugin is imported again."""
    package = Path(__file__).resolve().parent.parent
    hashed = hashlib.sha256(sys.version.encode())
    for path in sorted([*package.glob("sdk/*.py"), package / "spec.py", package / "loader" / "child.py"]):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()


def read(path: Path) -> tuple[bool, dict[str, Any]]:
    """(whether the entries were made by this very version, entries by plugin file). Never raises: no cache is {}."""
    try:
        found = json.loads(path.read_bytes())
        if found["v"] == _VERSION:
            return found["identity"] == identity(), dict(found["plugins"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _log.warning("the plugin cache cannot be read, every plugin is imported again: %s: %s", path, error)
    return False, {}


def write(path: Path, entries: Mapping[str, Any]) -> None:
    """Replace the cache; a full disk is logged and no more."""
    temporary = path.with_name(path.name + ".new")
    text = json.dumps({"v": _VERSION, "identity": identity(), "plugins": entries}, separators=(",", ":"))
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(file, "w", encoding="utf-8") as opened:
            opened.write(text)
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("the plugin cache cannot be written: %s: %s", path, error)
