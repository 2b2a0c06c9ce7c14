"""What a box kept, taken into the store when it has come home. Blocking.

It lies in the place of its own digest, which is not one that stamps vouch for; a link beside it says which one is.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from mlpiped.artifacts.copying import discard, protect, sync
from mlpiped.artifacts.places import MARKER, measure, place_of, placing
from mlpiped.errors import MlpipedError
from mlpiped.files.hashing import Unreadable
from mlpiped.files.portable import portable_digest
from mlpiped.files.walking import walk

if TYPE_CHECKING:
    from mlpiped.model import OutputFact


def came_home(path: str) -> str | None:
    """By which digest the store knows what lies at `path`; "" when nobody can tell, None when nothing lies there."""
    if not os.path.lexists(path):
        return None
    with suppress(OSError):
        return os.readlink(f"{os.path.dirname(path)}/{MARKER}")
    return ""


def admit(came: str, fact: OutputFact, state: str) -> bool:
    """Move `came`, on the file system of the store, to `fact.path`; durable. False: it is not that content."""
    try:
        if portable_digest(came) != fact.digest:
            return False
        known = measure(came, fact.kind, lambda path, stamp: None)[1]
    except (OSError, MlpipedError, Unreadable):
        return False
    if known is None:
        return False
    place = place_of(f"{state}/artifacts", fact.digest)
    final, marker = f"{place}/{os.path.basename(fact.path)}", f"{place}/{MARKER}"
    protect(came)
    for path in [came] if fact.kind == "file" else [*(m.path for m in walk(came) if m.kind != "l"), came]:
        sync(path)
    with placing(fact.digest):
        os.makedirs(place, exist_ok=True)
        if os.path.lexists(final):
            discard(final, f"{state}/incoming")
        with suppress(FileNotFoundError):
            os.unlink(f"{marker}.new")
        os.symlink(known, f"{marker}.new")
        os.rename(f"{marker}.new", marker)  # never away: it vouches for other names of the content too
        os.rename(came, final)
        if fact.kind == "folder":
            os.chmod(final, 0o555)
        for folder in (place, os.path.dirname(place), f"{state}/artifacts"):
            sync(folder)
    return True
