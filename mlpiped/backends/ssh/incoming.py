"""What a box tells of files and folders (the format: `tree.sh`), taken apart without a connection. Blocks.

A box is not trusted: no name leads outside, and no file counts whose bytes are not those that it said it has.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from mlpiped.files.hashing import open_file
from mlpiped.files.walking import kind_of

if TYPE_CHECKING:
    from pathlib import Path

    from mlpiped.backends.ssh.progress import Moving


class Garbled(Exception):
    """what came is not what was sent"""


class Incoming:
    """Takes a stream apart into a folder. Feed it until `done`; `big`: nothing came.

    The folder is empty, or holds what another try has left: what is asked for then goes on after that. What came is
    judged by its digest either way.
    """

    def __init__(self, folder: Path, moving: Moving | None = None) -> None:
        self.folder = os.fspath(folder)
        self.done = self.big = False
        self._moving = moving
        self._buffer = b""
        self._listed: deque[tuple[str, int, str]] = deque()  # kind, size, path: their bytes come later
        self._came: deque[tuple[str, str]] = deque()  # path, sha256: what it is on the box comes later
        self._seen: set[str] = set()
        self._answers: list[bytes] = []
        self._file: int | None = None
        self._left = 0
        self._hash = hashlib.sha256()

    def feed(self, data: bytes) -> list[bytes]:
        """What is to be answered. Raises Garbled, OSError."""
        if self._moving is not None:
            self._moving.moved(len(data))
        data, at = self._buffer + data if self._buffer else data, 0
        view = memoryview(data)
        while at < len(data) and not self.done:
            if self._file is not None:
                taken = view[at : at + self._left]
                at += len(taken)
                self._write(taken)
                continue
            end = data.find(b"\n", at)
            if end < 0:
                if len(data) - at > 65536:
                    raise Garbled("a line without an end")
                break
            line, at = data[at:end], end + 1
            self._take(line.decode("ascii", "replace").split(" "))
        self._buffer = data[at:]
        answers, self._answers = self._answers, []
        return answers

    def _take(self, words: list[str]) -> None:
        match words:
            case ["end"] if self._listed or self._came:
                raise Garbled("files without their bytes or their digests")
            case ["end"]:
                self._check()
                self.done = True
            case ["t", size] if size.isdigit():
                if self._moving is not None:
                    self._moving.total = int(size)
            case ["big"]:
                self.done = self.big = True
            case ["bytes"]:
                self._next()
            case ["sum", digest] if self._came:
                path, found = self._came.popleft()
                if digest != found:
                    raise Garbled(f"`{os.path.relpath(path, self.folder)}` is not what it is on the box")
            case ["ask"]:
                self._go_on()
            case ["d", name]:
                os.makedirs(self._path(name), exist_ok=True)
            case ["l", name, target]:
                os.symlink(decoded(target), self._new(name))
            case ["s", name]:
                os.mkfifo(self._new(name))  # whoever collects it complains of it
            case [("f" | "x") as kind, size, name] if size.isdigit():
                self._listed.append((kind, int(size), self._path(name)))
            case _:
                raise Garbled(f"no entry: {words!r:.200}")

    def _go_on(self) -> None:
        """Say how many bytes of the files that were listed are here, and take the others."""
        had = 0
        while self._listed and (found := self._found(*self._listed[0])) is not None:
            here, self._hash = found
            had += here
            _, size, path = self._listed[0]
            if here < size:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
                self._left = size - here
                break
            self._came.append((path, self._hash.hexdigest()))
            self._listed.popleft()
        if self._moving is not None:
            self._moving.moved(had)
        self._answers.append(b"%d\n" % had)
        if self._file is None:
            self._next()

    def _found(self, kind: str, size: int, path: str) -> tuple[int, hashlib._Hash] | None:
        """Of a file that may be here in part: its bytes, and their hash so far."""
        try:
            fd = open_file(path)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode) or kind_of(st.st_mode) != kind or st.st_size > size:
                return None
            return st.st_size, hashlib.file_digest(file, "sha256")

    def _next(self) -> None:
        """Open the file whose bytes come now; those that are empty are done at once."""
        while self._listed:
            kind, self._left, path = self._listed[0]
            os.makedirs(os.path.dirname(path), exist_ok=True)
            _clear(path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(path, flags, 0o755 if kind == "x" else 0o644)
            self._hash = hashlib.sha256()
            if self._left:
                return
            self._close()

    def _write(self, view: memoryview) -> None:
        assert self._file is not None
        self._hash.update(view)
        self._left -= len(view)
        while view:
            view = view[os.write(self._file, view) :]
        if not self._left:
            self._close()
            self._next()

    def _close(self) -> None:
        assert self._file is not None
        os.close(self._file)
        self._file = None
        _, _, path = self._listed.popleft()
        self._came.append((path, self._hash.hexdigest()))

    def _path(self, name: str) -> str:
        plain = decoded(name)
        parts = plain.split("/")
        if not plain or "\0" in plain or any(part in ("", ".", "..") for part in parts):
            raise Garbled(f"no name for a file: {plain!r:.200}")
        # A link that came earlier leads nowhere: what lies below it is refused, by makedirs or by this.
        at = self.folder
        for part in parts[:-1]:
            at = f"{at}/{part}"
            if os.path.islink(at):
                raise Garbled(f"a file below a link: {plain!r:.200}")
            self._seen.add(at)
        at = f"{at}/{parts[-1]}"
        if at in self._seen and (os.path.islink(at) or not os.path.isdir(at)):
            raise Garbled(f"two files of one name: {plain!r:.200}")
        self._seen.add(at)
        return at

    def _new(self, name: str) -> str:
        path = self._path(name)
        _clear(path)
        return path

    def _check(self) -> None:
        """That nothing of another try is here that the box does not have."""
        for folder, _, names in os.walk(self.folder):
            for path in (folder, *(f"{folder}/{name}" for name in names)):
                if path not in self._seen and path != self.folder:
                    raise Garbled(f"`{os.path.relpath(path, self.folder)}` is not on the box")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _clear(path: str) -> None:
    """What a try before has left under that name; a folder is no file's place."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def decoded(name: str) -> str:
    if name.startswith(":"):
        if not re.fullmatch(r"(?:[0-9a-f]{2})*", name[1:]):
            raise Garbled(f"no name: {name!r:.200}")
        return os.fsdecode(bytes.fromhex(name[1:]))
    return name
