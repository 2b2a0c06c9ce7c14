"""Which files are a step's code: ignore rules for a whole tree, or what a script reaches by its imports. Blocking."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from pathspec import GitIgnoreSpec

from mlpiped.errors import MlpipedError
from mlpiped.files.hashing import printable, stamp_of
from mlpiped.files.walking import Beneath, Member, is_beneath, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlpiped.code.syntax import Import

MOST_FILES = 50_000
MOST_BYTES = 1 << 30
IGNORE_FILES = (".gitignore", ".amlignore")

_IGNORED_NAMES = frozenset(
    """.git .hg .svn .bzr __pycache__ .mypy_cache .ruff_cache .pytest_cache .hypothesis .ipynb_checkpoints .tox .nox
    .venv .eggs .idea .vscode .DS_Store .gitignore .amlignore .gitattributes .coverage node_modules .dvc""".split()
)
_IGNORED_ENDS = re.compile(r"\.py[co]\Z|\.sw[op]\Z|~\Z|\.egg-info\Z|\A\.#|\A#.*#\Z|\.tmp\Z")
_EXTENSION = re.compile(r"(\.[\w-]+)?\.(so|pyd)\Z")


class SourceFault(MlpipedError):
    """a step's code cannot be used"""

    http_status = 400


class CodeChanged(SourceFault):
    """the code is not what it was"""


def list_code(directory: str) -> list[Member]:
    """The files and links of a source folder that are not ignored; empty folders do not count.

    `.gitignore` and `.amlignore` of each folder hold for what is below it; the deepest folder that has an opinion
    wins, the built-in rules come last, so `!*.pyc` brings something back. Raises SourceFault.
    """
    top = os.path.realpath(directory)
    if not os.path.isdir(top):
        raise SourceFault(f"the source directory `{printable(directory)}` is not there")
    found: list[Member] = []
    size = 0
    pending: list[tuple[str, str, tuple[_Rules, ...]]] = [("", top, ())]
    while pending:
        prefix, folder, rules = pending.pop()
        with os.scandir(folder) as listing:
            entries = list(listing)
        names = {entry.name for entry in entries}
        if prefix and "pyvenv.cfg" in names:
            continue  # a virtual environment, whatever it is called
        own = _Rules.of(prefix, folder, names)
        rules = (own, *rules) if own is not None else rules
        for entry in entries:
            rel = prefix + entry.name
            is_dir = entry.is_dir(follow_symlinks=False)
            if _ignored(rel, entry.name, is_dir or (entry.is_symlink() and entry.is_dir()), rules):
                continue
            if is_dir:
                pending.append((rel + "/", entry.path, rules))
            elif entry.is_symlink():
                found.append(_link(rel, entry.path, top, directory))
            elif entry.is_file(follow_symlinks=False):
                st = entry.stat(follow_symlinks=False)
                size += st.st_size
                found.append(Member(rel, kind_of(st.st_mode), entry.path, stamp_of(st)))
        if len(found) > MOST_FILES or size > MOST_BYTES:
            raise SourceFault(
                f"the source directory `{printable(directory)}` holds more than {MOST_FILES} files or 1 GiB",
                hint="list data in an `.amlignore` there, and pass it as a DataReference",
            )
    return found


def _link(rel: str, path: str, top: str, directory: str) -> Member:
    target = os.readlink(path)
    real = os.path.realpath(path)
    if not is_beneath(real, top):
        raise SourceFault(
            f"`{printable(rel)}` in `{printable(directory)}` is a link that leads outside",
            hint=f"list `{printable(rel)}` in an `.amlignore` there, or copy what it names",
        )
    if target.startswith("/"):
        target = os.path.relpath(real, os.path.dirname(path))
    return Member(rel, "l", path, None, target)


class _Rules:
    """The ignore rules written in one folder."""

    __slots__ = ("_prefix", "_spec")

    def __init__(self, prefix: str, spec: GitIgnoreSpec) -> None:
        self._prefix = prefix
        self._spec = spec

    @classmethod
    def of(cls, prefix: str, folder: str, names: set[str]) -> _Rules | None:
        text = ""
        for name in IGNORE_FILES:
            if name in names and os.path.isfile(f"{folder}/{name}"):
                with open(f"{folder}/{name}", errors="surrogateescape") as file:
                    text += file.read(1 << 20) + "\n"
        return cls(prefix, _compiled(text)) if text.strip() else None

    def verdict(self, rel: str) -> bool | None:
        """True: ignored; False: explicitly not; None: says nothing."""
        return self._spec.check_file(rel[len(self._prefix) :]).include


@lru_cache(maxsize=256)
def _compiled(text: str) -> GitIgnoreSpec:
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError as fault:
            raise SourceFault(f"line {number} of an ignore file is no pattern: {line}") from fault
        lines.append(line)
    return GitIgnoreSpec.from_lines(lines)


def _ignored(rel: str, name: str, is_dir: bool, rules: Sequence[_Rules]) -> bool:
    path = rel + "/" if is_dir else rel
    for rule in rules:
        verdict = rule.verdict(path)
        if verdict is not None:
            return verdict
    return name in _IGNORED_NAMES or _IGNORED_ENDS.search(name) is not None


# --- what a script reaches --------------------------------------------------------------------------------------
class Reach:
    """The modules below one folder that a script can import. `script` is relative to it.

    A module is looked for beside the script (where Python looks first) and at the top of the folder. What is named
    only while the program runs, and files that it reads, cannot be seen.
    """

    def __init__(self, directory: str, script: str) -> None:
        self._beneath = Beneath(directory)
        self._roots = list(dict.fromkeys([os.path.dirname(script), ""]))

    def member(self, rel: str) -> Member | None:
        """The file, with what `stat` says. Raises PathRefused for a link that leads outside."""
        place = self._beneath.place(rel.split("/"))
        if place is None or not os.path.isfile(place.real):
            return None
        return Member(rel, kind_of(place.st.st_mode), place.real, stamp_of(place.st))

    def imported(self, importer: str, item: Import) -> Iterator[str]:
        """The files below the folder that this import, written in the file `importer`, may load."""
        if item.level:
            folder = os.path.dirname(importer)
            for _ in range(item.level - 1):
                if not folder:
                    return
                folder = os.path.dirname(folder)
            yield from self._package(folder)
            yield from self._module(folder, [p for p in item.module.split(".") if p], item.names)
            return
        for root in self._roots:
            yield from self._module(root, item.module.split("."), item.names)

    def _package(self, folder: str) -> Iterator[str]:
        init = _join(folder, "__init__.py")
        if folder and self._is_file(init):
            yield init

    def _module(self, folder: str, parts: Sequence[str], names: Sequence[str]) -> Iterator[str]:
        for part in parts:
            below = _join(folder, part)
            if self._is_file(f"{below}/__init__.py"):
                yield f"{below}/__init__.py"
            elif self._is_file(f"{below}.py"):
                yield f"{below}.py"
                return
            elif not os.path.isdir(self._path(below)):
                yield from self._extension(folder, part)
                return
            folder = below
        for name in names:
            if name == "*":
                yield from self._all(folder)
            else:
                yield from self._module(folder, [name], ())

    def _extension(self, folder: str, part: str) -> Iterator[str]:
        for name in self._names(folder):
            if name.startswith(part) and _EXTENSION.fullmatch(name[len(part) :]):
                yield _join(folder, name)

    def _all(self, folder: str) -> Iterator[str]:
        """`import *` takes what `__all__` says, which may be any of the package's modules."""
        for name in self._names(folder):
            if name.endswith(".py"):
                yield _join(folder, name)
            elif self._is_file(f"{_join(folder, name)}/__init__.py"):
                yield f"{_join(folder, name)}/__init__.py"

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._path(folder)))
        except OSError:
            return []

    def _path(self, rel: str) -> str:
        return f"{self._beneath.root}/{rel}"

    def _is_file(self, rel: str) -> bool:
        return os.path.isfile(self._path(rel))


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
