"""Checks of what authors pass: each takes a value, what it is called and where it was written; or DefinitionError."""

from __future__ import annotations

import os

from mlpiped.sdk.errors import DefinitionError
from mlpiped.sdk.place import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

MARK = "\0"
"""Encloses what stands for a data object in an f-string: no real text can hold it."""

_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_NAME = _LETTERS | frozenset("_.-")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def shown(value: object) -> str:
    """`value` for a message: short, and of one line."""
    form = repr(value)
    return form if len(form) <= 80 else form[:77] + "…"


def text(value: object, what: str, where: Place, *, empty: bool = False) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise DefinitionError(f"{what} must be a string, not {type(value).__name__}: {shown(value)}", where)
    if MARK in value:
        raise DefinitionError(
            f"{what} cannot hold a data object, a parameter or a NUL", where, "those go into `arguments` only"
        )
    if not value and not empty:
        raise DefinitionError(f"{what} is empty", where)
    return value


def name(value: object, what: str, where: Place) -> str:
    """A name by the rule of `spec.NAME`."""
    word = text(value, what, where)
    if len(word) > 64 or word[0] not in _LETTERS or not _NAME.issuperset(word):
        raise DefinitionError(
            f"{what} is not a name: {shown(word)}",
            where,
            "at most 64 of A-Z a-z 0-9 _ . - and the first a letter or digit",
        )
    return word


def name_from(word: str, otherwise: str) -> str:
    """The nearest name to `word`, for names that nobody chose."""
    made = "".join(c if c in _NAME else "_" for c in word).lstrip("_.-")[:64]
    return made or otherwise


def flag(value: object, what: str, where: Place) -> bool:
    if not isinstance(value, bool):
        raise DefinitionError(f"{what} must be True or False, not {shown(value)}", where)
    return value


def number(value: object, what: str, where: Place, *, least: float, whole: bool = False) -> float:
    right = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not right or isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = "a whole number" if whole else "a number"
        raise DefinitionError(f"{what} must be {kind}, not {shown(value)}", where)
    if not least <= value < float("inf"):
        raise DefinitionError(f"{what} must be at least {least:g}: {value}", where)
    return value


def whole(value: object, what: str, where: Place, *, least: int) -> int:
    return int(number(value, what, where, least=least, whole=True))


def seconds(value: object, what: str, where: Place, *, least: float = 0.0) -> float:
    """A duration: "2h", "10s", "1d12h", "1h 30m", "500ms", or a number of seconds."""
    total = _duration(value) if isinstance(value, str) else value
    if total is None:
        raise DefinitionError(
            f"{what} is not a duration: {shown(value)}", where, 'write it like "10s", "2h" or "1d12h"'
        )
    return float(number(total, what, where, least=least))


def _duration(form: str) -> float | None:
    rest = form.replace(" ", "").lower()
    try:
        return float(rest) if rest and rest[-1].isdigit() else _sum_of_units(rest)
    except ValueError:
        return None


def _sum_of_units(rest: str) -> float | None:
    total = 0.0
    if not rest:
        return None
    while rest:
        digits = len(rest) - len(rest.lstrip("0123456789."))
        after = rest[digits:]
        unit = after[: len(after) - len(after.lstrip("abcdefghijklmnopqrstuvwxyz"))]
        if not digits or unit not in _SECONDS:
            return None
        total += float(rest[:digits]) * _SECONDS[unit]
        rest = after[len(unit) :]
    return total


def size(value: object, what: str, where: Place) -> int:
    """Bytes: "16G", "512M", "1GiB" (powers of 1024, as for Docker, Slurm and systemd), or a number."""
    if isinstance(value, str):
        form = value.replace(" ", "").upper()
        form = form[:-2] if form.endswith("IB") else form.removesuffix("B")
        unit = form[-1:] if form[-1:] in "KMGT" else ""
        try:
            value = int(float(form.removesuffix(unit) if unit else form) * _BYTES[unit])
        except (ValueError, OverflowError):
            raise DefinitionError(
                f"{what} is not a size: {shown(value)}", where, 'write it like "512M" or "16G"'
            ) from None
    return whole(value, what, where, least=1)


def choice(value: object, allowed: Sequence[str], what: str, where: Place) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    listing = ", ".join(f"`{word}`" for word in allowed)
    raise DefinitionError(f"{what} is {shown(value)}", where, f"it is one of {listing}")


def listed(value: object, what: str, where: Place) -> list[Any]:
    """None -> [], a list or tuple -> a list, one object -> a list of it. A bare string is a slip, not a list."""
    if value is None:
        return []
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, (str, bytes, dict)):
        raise DefinitionError(f"{what} must be a list, not {type(value).__name__}: {shown(value)}", where)
    return [value]


def one(value: object, kind: type, what: str, where: Place) -> None:
    """`value` is None or of `kind`."""
    if value is not None and not isinstance(value, kind):
        form = f"`{kind.__name__}(…)`"
        raise DefinitionError(f"{what} must be {form}, not {type(value).__name__}: {shown(value)}", where)


def words(value: object, what: str, where: Place) -> list[str]:
    """One string, or a list of them."""
    return [name(word, what, where) for word in ([value] if isinstance(value, str) else listed(value, what, where))]


def pairs(value: object, what: str, where: Place) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DefinitionError(f"{what} must be a dict, not {type(value).__name__}: {shown(value)}", where)
    return {text(k, f"a key of {what}", where): text(v, f"{what}[{k!r}]", where, empty=True) for k, v in value.items()}


def only(values: Iterable[object], kind: type | tuple[type, ...], what: str, where: Place, hint: str) -> None:
    """Every one of `values` is of `kind`."""
    for value in values:
        if not isinstance(value, kind):
            raise DefinitionError(f"{what} cannot hold {shown(value)}", where, hint)
