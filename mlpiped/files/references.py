"""What a reference stands for: one path or a glob below a datastore's root -> its files -> one digest. Blocking."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mlpiped.errors import MlpipedError
from mlpiped.files.hashing import Stamp, Unreadable, printable, stamp_of, tree_digest
from mlpiped.files.roots import PASSING
from mlpiped.files.walking import Beneath, Member, PathRefused, Place, is_beneath, kind_of, parts_of, walk

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlpiped.spec import Reference

Seen = tuple[str, Stamp]
"""A file to know the digest of, and what `stat` said of it."""


class Digests(NamedTuple):
    """Digest by path, with the stamp that it belongs to; and why the others have none."""

    known: dict[str, tuple[Stamp, str]]
    failed: dict[str, str]

    def of(self, path: str) -> str:
        """Raises Unreadable."""
        entry = self.known.get(path)
        if entry is None:
            raise Unreadable(f"`{printable(path)}` {self.failed.get(path, 'is gone')}")
        return entry[1]


@dataclass(frozen=True, slots=True)
class RefFact:
    """What a reference stands for now. `entries` is for explanations: printable names below the root -> digest."""

    digest: str
    paths: tuple[str, ...]
    entries: dict[str, str]
    size: int


@dataclass(frozen=True, slots=True)
class Missing:
    """A reference that cannot be used now. `sentence` says why: nothing there, unreadable, or it leads outside.

    `away`: it says nothing about what is there, for the datastore cannot be read now.
    """

    sentence: str
    away: bool = False


@dataclass(slots=True)
class Resolution:
    """A reference on its way to a fact: `look`, then `fact`, both in a thread."""

    root: str
    ref: Reference
    only: list[str] | None  # names below the root that a glob is held to
    places: list[Place] = field(default_factory=list)
    trees: dict[str, list[Member]] = field(default_factory=dict)  # by Place.rel
    fault: str | None = None
    away: bool = False

    def look(self, beneath: Beneath, away: str | None) -> list[Seen]:
        """`away`: why the datastore cannot be read now."""
        if away is not None:
            self.fault, self.away = away, True
            return []
        try:
            self._find(beneath)
            seen: list[Seen] = []
            for place in self.places:
                if stat.S_ISDIR(place.st.st_mode):
                    members = [_settled(m, place.real, beneath.root) for m in walk(place.real)]
                    self.trees[place.rel] = members
                    seen += [(m.path, m.stamp) for m in members if m.stamp is not None]
                else:
                    seen.append((place.real, stamp_of(place.st)))
            return seen
        except MlpipedError as fault:
            self.fault = fault.message
        except OSError as fault:
            name = printable(os.fsdecode(fault.filename)) if fault.filename else self.ref.path
            self.fault = f"`{name}` cannot be read: {(fault.strerror or '').lower()}"
            self.away = fault.errno in PASSING
        return []

    def _find(self, beneath: Beneath) -> None:
        parts = parts_of(self.ref.path)
        if self.only is not None:
            found = [(name, beneath.place(name.split("/"))) for name in self.only]
            gone = [name for name, place in found if place is None]
            if gone:
                raise PathRefused(f"`{printable(gone[0])}` is gone")
            self.places = [place for _, place in found if place is not None]
        elif self.ref.glob:
            self.places = beneath.glob(parts) if parts else []
        else:
            place = beneath.place(parts)
            self.places = [place] if place is not None else []
        if not self.places:
            word = "nothing matches" if self.ref.glob else "there is no"
            raise PathRefused(f"{word} `{printable(self.ref.path)}` in `{printable(self.root)}`")

    def fact(self, digests: Digests) -> RefFact | Missing:
        if self.fault is not None:
            return Missing(self.fault, self.away)
        try:
            return self._glob(digests) if self.ref.glob else self._single(digests)
        except Unreadable as fault:
            return Missing(str(fault))

    def _single(self, digests: Digests) -> RefFact:
        place = self.places[0]
        members = self.trees.get(place.rel)
        if members is None:
            digest, size = digests.of(place.real), digests.known[place.real][0][2]
            return RefFact(digest, (place.path,), {printable(place.rel): digest}, size)
        lead = f"{place.rel}/" if place.rel else ""
        entries = {
            printable(lead + m.rel): f"-> {m.target}" if m.stamp is None else digests.of(m.path)
            for m in members
            if m.kind != "d"
        }
        return RefFact(member_digest(members, digests), (place.path,), entries, _size(members))

    def _glob(self, digests: Digests) -> RefFact:
        """Names count from the pattern's first wild part on: the same files elsewhere are the same input."""
        base = _literal_base(self.ref.path)
        lines, entries, size = [], {}, 0
        for place in self.places:
            members = self.trees.get(place.rel)
            if members is None:
                digest, kind = digests.of(place.real), "f"
                size += place.st.st_size
            else:
                digest, kind = member_digest(members, digests), "d"
                size += _size(members)
            lines.append((os.fsencode(place.rel)[base:], kind, digest))
            entries[printable(place.rel)] = digest
        return RefFact(tree_digest(lines), tuple(place.path for place in self.places), entries, size)


def _literal_base(pattern: str) -> int:
    """The length in bytes of the folders before the first wild part, their last slash included."""
    length = 0
    for part in parts_of(pattern)[:-1]:
        if any(c in part for c in "*?["):
            break
        length += len(os.fsencode(part)) + 1
    return length


def _size(members: Iterable[Member]) -> int:
    return sum(m.stamp[2] for m in members if m.stamp is not None)


def _settled(member: Member, top: str, root: str) -> Member:
    """A link within the tree counts by where it leads; one to a file elsewhere below the root, by that file.

    Raises PathRefused for one that leads outside, or to a folder whose content would not be counted.
    """
    if member.kind != "l":
        return member
    real = os.path.realpath(member.path)
    if is_beneath(real, top):
        target = os.path.relpath(real, os.path.dirname(member.path)) if member.target.startswith("/") else member.target
        return member._replace(target=target)
    if not is_beneath(real, root):
        raise PathRefused(f"`{printable(member.path)}` is a link that leads outside `{printable(root)}`")
    try:
        st = os.lstat(real)
    except FileNotFoundError:
        return member
    if not stat.S_ISREG(st.st_mode):
        raise PathRefused(f"`{printable(member.path)}` is a link to a folder outside `{printable(top)}`")
    return Member(member.rel, kind_of(st.st_mode), real, stamp_of(st))


def member_digest(members: Iterable[Member], digests: Digests) -> str:
    """The digest of a tree. Raises Unreadable."""
    return tree_digest(
        (os.fsencode(m.rel), m.kind, m.target if m.stamp is None else digests.of(m.path)) for m in members
    )
