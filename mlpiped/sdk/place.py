"""Where things are: the author's line that made an object, and the files that a definition reads.

The loader's child sets `folder`: relative paths in a plugin start from the plugin's own folder. Without it (a
plugin run as a plain script) they start from the folder of the file that made the object.
"""

from __future__ import annotations

import os
import sys

from mlpiped.sdk.errors import DefinitionError

Place = tuple[str, int]

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TEXT_LIMIT = 1 << 20

folder: str | None = None
reads: set[str] = set()
"""Files whose content went into a definition: the definition is stale when one changes."""
absent: set[str] = set()
"""Paths that were missing when they were looked for: worth another look when one appears."""


def here() -> Place:
    """The innermost (file, line) that is not mlpiped's own."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def absolute(path: str, where: Place) -> str:
    """`path` as an absolute one, relative to the plugin's folder."""
    start = folder if folder is not None else os.path.dirname(os.path.abspath(where[0]))
    return os.path.normpath(os.path.join(start, path))


def read_text(path: str, what: str, where: Place) -> str:
    """The text of the file `path` (absolute), which becomes part of the definition."""
    try:
        with open(path, "rb") as file:
            data = file.read(_TEXT_LIMIT + 1)
    except FileNotFoundError:
        absent.add(path)
        raise DefinitionError(f"{what} does not exist: `{path}`", where) from None
    except OSError as error:
        raise DefinitionError(f"{what} cannot be read: `{path}`: {error.strerror}", where) from None
    reads.add(path)
    if len(data) > _TEXT_LIMIT:
        raise DefinitionError(f"{what} is larger than 1 MiB: `{path}`", where)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise DefinitionError(f"{what} is not UTF-8 text: `{path}`", where) from None
