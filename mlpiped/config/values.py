"""How a person writes a time span and an amount of bytes in the config: `"30s"`, `"1h 30m"`, `"500G"`."""

from __future__ import annotations

import re

FOREVER = "forever"
_SECONDS = {"ms": 0.001, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31557600}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)\s*")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?B)?\s*\Z", re.IGNORECASE)


def seconds(text: object) -> float:
    """`"30s"`, `"1h30m"`, `"180d"` -> seconds. Raises ValueError with a sentence and, after a newline, a hint."""
    if isinstance(text, bool) or not isinstance(text, str):
        given = f'"{text}s"' if isinstance(text, int | float) and not isinstance(text, bool) else '"30s"'
        raise ValueError(f"must be a time span in quotes\nwrite {given}; units are ms, s, m, h, d, w and y")
    at, total = 0, 0.0
    stripped = text.strip()
    while match := _DURATION_PART.match(stripped, at):
        if match[2] not in _SECONDS:
            break
        total += float(match[1]) * _SECONDS[match[2]]
        at = match.end()
    if not stripped or at != len(stripped):
        raise ValueError('is not a time span\nwrite "30s", "15m", "1h30m" or "180d"; units are ms, s, m, h, d, w and y')
    return total


def size(text: object) -> int:
    """`"500G"`, `"32 GiB"`, `"1.5T"` -> bytes; units are powers of 1024. Raises ValueError as `seconds` does."""
    if isinstance(text, bool) or not isinstance(text, str):
        raise ValueError('must be a size in quotes\nwrite "32G"; units are K, M, G, T and P, powers of 1024')
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError('is not a size\nwrite "500M", "32G" or "1.5T"; units are K, M, G, T and P, powers of 1024')
    return int(float(match[1]) * 1024 ** _POWERS[match[2].upper()])


def kept_seconds(text: object) -> float | None:
    """As `seconds`; None for `"forever"`."""
    return None if _forever(text) else seconds(text)


def kept_size(text: object) -> int | None:
    """As `size`; None for `"forever"`: whatever room it takes."""
    return None if _forever(text) else size(text)


def _forever(text: object) -> bool:
    return text is None or (isinstance(text, str) and text.strip() == FOREVER)
