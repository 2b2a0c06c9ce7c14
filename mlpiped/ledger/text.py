"""How values become what SQLite can hold."""

from __future__ import annotations

import json
import os
from typing import Any, overload


@overload
def clean(text: str) -> str: ...
@overload
def clean(text: None) -> None: ...
def clean(text: str | None) -> str | None:
    r"""`text` without lone surrogates, which SQLite refuses: a name that is not UTF-8 gets `\udcff` and the like.

    In JSON text that is the escape that stands for the same string.
    """
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def fs_bytes(path: str) -> bytes:
    return os.fsencode(path)


def fs_text(path: bytes) -> str:
    return os.fsdecode(path)
