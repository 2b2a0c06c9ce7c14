"""A step's code: what it is now, a copy of it that stays, and what changed in it.

With mode "tree" it is the source folder less what is ignored; with mode "imports" the script and the modules below the
folder that it imports, found without running anything. Its key takes Python files by their syntax tree; its raw
digest takes every byte and addresses the copy in state/code.
"""

from __future__ import annotations

import difflib
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from mlpiped.code.sources import CodeChanged, Reach, SourceFault, list_code
from mlpiped.code.syntax import LARGEST, Meaning, meaning_of
from mlpiped.errors import StorageAway
from mlpiped.files.hashing import Unreadable, copy_fd, open_file, printable, tree_digest
from mlpiped.files.roots import PASSING
from mlpiped.files.walking import Member, PathRefused, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mlpiped.code.syntax import Import
    from mlpiped.files.fingerprint import Fingerprinter
    from mlpiped.files.references import Digests, Seen
    from mlpiped.spec import SourceSpec

TRIES = 5
NAMED_FILES = 3
MEANINGS_KEPT = 20_000
LINES_COUNTED = 5_000
"""Of a longer file the lines are not compared: that takes time in the square of them."""


class Piece(NamedTuple):
    """One file of the code. `raw` is the digest of its bytes; of a link, where it leads."""

    rel: str
    kind: str  # f, x, l
    path: str
    raw: str


@dataclass(frozen=True, slots=True)
class CodeFact:
    """`key` is the identity; `raw` addresses the copy; `files` maps printable names to what each adds to the key."""

    key: str
    raw: str
    files: dict[str, str]
    pieces: tuple[Piece, ...] = ()


class _Reading(NamedTuple):
    piece: Piece
    digest: str  # what counts for the key
    imports: tuple[Import, ...] = ()


class _Changed(Exception):
    """The tree is not what it was a moment ago: look again."""


class CodeReader:
    def __init__(self, fingerprinter: Fingerprinter, state_dir: Path) -> None:
        self._fingerprinter = fingerprinter
        self._store = Path(state_dir) / "code"
        self._meanings: dict[str, Meaning] = {}  # by raw digest, so never stale
        self.files_read = 0  # parsed since the start, for tests and metrics

    async def read(self, source: SourceSpec) -> CodeFact:
        """The code as it is now. Raises SourceFault."""
        for _ in range(TRIES):
            try:
                if source.mode == "imports":
                    return await self._read_imports(source)
                return await self._read_tree(source)
            except _Changed:
                continue
            except PathRefused as fault:
                raise SourceFault(
                    f"code in `{printable(source.directory)}`: {fault.message}", hint=fault.hint
                ) from fault
            except OSError as fault:
                name = printable(os.fsdecode(fault.filename or source.directory))
                raise SourceFault(f"its code cannot be read: `{name}`: {(fault.strerror or '').lower()}") from fault
        raise _unsteady(source)

    async def snapshot(self, source: SourceSpec, fact: CodeFact) -> Path:
        """A copy of the code that stays as it is, as an absolute folder.

        It has the digests of `fact`, byte for byte, or (when only comments changed since) the same key. Raises
        CodeChanged when the code is another by now, or gone: `fact` must then be read again, and with it the step's
        key; StorageAway, SourceFault.
        """
        now = fact
        for _ in range(TRIES):
            pieces, target = now.pieces, self.place(now.raw)
            try:
                await self._fingerprinter.hop(lambda p=pieces, t=target: _keep(p, t))  # type: ignore[misc]
                return target
            except _Changed:
                try:
                    now = await self.read(source)
                except SourceFault as fault:
                    raise CodeChanged(fault.message, hint=fault.hint) from fault
                if now.key != fact.key:
                    break
            except OSError as fault:
                name = printable(os.fsdecode(fault.filename or target))
                said = f"its code cannot be copied: `{name}`: {(fault.strerror or '').lower()}"
                raise (StorageAway if fault.errno in PASSING else SourceFault)(said) from fault
        raise _unsteady(source)

    async def diff(self, old_raw: str | None, old_files: Mapping[str, str], fact: CodeFact) -> str:
        """`train.py (+3 -1), utils.py new, old.py gone`: 3 files at most, then `and 4 more`; empty when equal."""
        before = self.place(old_raw) if old_raw else None
        pieces = {printable(piece.rel): piece for piece in fact.pieces}
        changed = sorted(
            name for name in old_files.keys() | fact.files.keys() if old_files.get(name) != fact.files.get(name)
        )

        def sentence() -> str:
            words = [_change(name, old_files, fact.files, before, pieces.get(name)) for name in changed[:NAMED_FILES]]
            if len(changed) > NAMED_FILES:
                words.append(f"and {len(changed) - NAMED_FILES} more")
            return ", ".join(words).replace(", and ", " and ")

        return await self._fingerprinter.hop(sentence) if changed else ""

    # --- reading --------------------------------------------------------------------------------------------
    def place(self, raw: str) -> Path:
        """Where the snapshot with this raw digest is, if there is one."""
        digest = raw.rpartition(":")[2]
        return self._store / digest[:2] / digest[2:]

    async def _read_tree(self, source: SourceSpec) -> CodeFact:
        members: list[Member] = []

        def look() -> list[Seen]:
            members.extend(list_code(source.directory))
            return [(m.path, m.stamp) for m in members if m.stamp is not None]

        def use(digests: Digests) -> CodeFact:
            return _assembled([self._reading(member, digests) for member in members])

        fact = await self._fingerprinter.survey(look, use)
        script = "/".join(parts_of(source.script or ""))
        if script and printable(script) not in fact.files:
            raise SourceFault(
                f"the script `{printable(script)}` is not in `{printable(source.directory)}`",
                hint="if it is there, an ignore file leaves it out",
            )
        return fact

    async def _read_imports(self, source: SourceSpec) -> CodeFact:
        """Level by level of the import graph; what was read before costs a `stat`."""
        script = "/".join(parts_of(source.script or ""))
        if not script:
            raise SourceFault(f"a step with code from `{printable(source.directory)}` by imports has no script")
        reach = await self._fingerprinter.hop(lambda: Reach(source.directory, script))
        found: dict[str, Member] = {}
        known: dict[str, _Reading] = {}
        wave = [script]
        while wave:
            asked = tuple(wave)

            def look(asked: Sequence[str] = asked) -> list[Seen]:
                here = {rel: member for rel in asked if (member := reach.member(rel)) is not None}
                found.update(here)
                return [(m.path, m.stamp) for m in here.values() if m.stamp is not None]

            def use(digests: Digests, asked: Sequence[str] = asked) -> list[str]:
                following: dict[str, None] = {}
                for rel in asked:
                    if rel in found:
                        known[rel] = self._reading(found[rel], digests)
                        for item in known[rel].imports:
                            following.update(dict.fromkeys(reach.imported(rel, item)))
                return [rel for rel in following if rel not in found]

            wave = await self._fingerprinter.survey(look, use)
        if script not in known:
            raise SourceFault(f"the script `{printable(script)}` is not in `{printable(source.directory)}`")
        return _assembled(known.values())

    def _reading(self, member: Member, digests: Digests) -> _Reading:
        """A file, and what counts of it. Raises _Changed."""
        if member.stamp is None:
            return _Reading(Piece(member.rel, "l", member.path, member.target), member.target)
        try:
            raw = digests.of(member.path)
        except Unreadable as fault:
            if not os.path.lexists(member.path) or "changes" in str(fault):
                raise _Changed from fault
            raise SourceFault(f"its code cannot be used: {fault}") from fault
        piece = Piece(member.rel, member.kind, member.path, raw)
        if member.rel.endswith(".py") and member.stamp[2] <= LARGEST:
            return _Reading(piece, *self._meaning(piece))
        return _Reading(piece, raw)

    def _meaning(self, piece: Piece) -> Meaning:
        meaning = self._meanings.get(piece.raw)
        if meaning is None:
            meaning = meaning_of(_read(piece))
            self.files_read += 1
            if len(self._meanings) >= MEANINGS_KEPT:
                self._meanings.clear()
            self._meanings[piece.raw] = meaning
        return meaning


def _assembled(found: Iterable[_Reading]) -> CodeFact:
    parts = sorted(found, key=lambda reading: os.fsencode(reading.piece.rel))
    files = {}
    for piece, digest, _ in parts:
        files[printable(piece.rel)] = {"f": digest, "x": f"{digest}+x", "l": f"-> {digest}"}[piece.kind]
    return CodeFact(
        key=tree_digest((os.fsencode(p.rel), p.kind, digest) for p, digest, _ in parts),
        raw=tree_digest((os.fsencode(p.rel), p.kind, p.raw) for p, _, _ in parts),
        files=files,
        pieces=tuple(reading.piece for reading in parts),
    )


def _unsteady(source: SourceSpec) -> CodeChanged:
    return CodeChanged(
        f"the code in `{printable(source.directory)}` changed while it was read",
        hint="run it again when whatever writes there is done",
    )


def _read(piece: Piece) -> bytes:
    """The bytes that have the piece's digest. Raises _Changed when they are others by now."""
    try:
        with open(open_file(piece.path), "rb") as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise _Changed from fault
    if "b3:" + blake3(content, max_threads=1).hexdigest() != piece.raw:
        raise _Changed
    return content


# --- the copy ---------------------------------------------------------------------------------------------------
def _keep(pieces: Sequence[Piece], target: Path) -> None:
    """Copy, make durable, rename into place. Raises _Changed; leaves nothing half done under the final name."""
    try:
        os.utime(target)  # it is used: whoever removes old ones looks at that
        return
    except FileNotFoundError:
        pass
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.parent / f"{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        staged.mkdir()
        files = [_copy(piece, staged) for piece in pieces]
        folders = {staged} | {parent for file in files for parent in file.parents if parent.is_relative_to(staged)}
        _sync([file for file in files if not file.is_symlink()], sorted(folders))
        try:
            staged.rename(target)
        except OSError:
            if not target.is_dir():  # else somebody else was first, with the same content
                raise
        _sync([], [target.parent, target.parent.parent])
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _copy(piece: Piece, staged: Path) -> Path:
    file = staged / piece.rel
    file.parent.mkdir(parents=True, exist_ok=True)
    if piece.kind == "l":
        if not os.path.islink(piece.path):
            raise _Changed
        file.symlink_to(piece.raw)
        return file
    mode = 0o755 if piece.kind == "x" else 0o644
    try:
        source = open_file(piece.path)
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise _Changed from fault
    with open(source, "rb") as old, open(file, "xb") as new:
        if copy_fd(old.fileno(), new.fileno()) != piece.raw:
            raise _Changed
        os.fchmod(new.fileno(), mode)
    return file


def _sync(files: Iterable[Path], folders: Iterable[Path]) -> None:
    """All are written before the first is waited for: most of them then go out together."""
    for path in [*files, *folders]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# --- the difference ---------------------------------------------------------------------------------------------
def _change(name: str, old: Mapping[str, str], new: Mapping[str, str], before: Path | None, piece: Piece | None) -> str:
    if name not in old:
        return f"{name} new"
    if name not in new or piece is None:
        return f"{name} gone"
    if old[name].removesuffix("+x") == new[name].removesuffix("+x"):
        return f"{name} is {'now' if new[name].endswith('+x') else 'no longer'} executable"
    was = None if before is None else _lines(before / piece.rel)
    now = _lines(Path(piece.path))
    if was is None or now is None:
        return f"{name} changed"
    added = removed = 0
    for tag, a, b, c, d in difflib.SequenceMatcher(None, was, now).get_opcodes():
        if tag != "equal":
            removed, added = removed + b - a, added + d - c
    return f"{name} (+{added} -{removed})"


def _lines(path: Path) -> list[bytes] | None:
    try:
        with open(open_file(str(path)), "rb") as file:
            content = file.read(4 << 20)
    except OSError:
        return None
    lines = content.splitlines()
    return None if b"\0" in content or len(lines) > LINES_COUNTED else lines
