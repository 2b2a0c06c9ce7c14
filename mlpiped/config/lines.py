"""Where each key of a TOML text stands. `tomllib` gives values without positions; this gives positions without values.

Only for a text that `tomllib` has accepted: what it would refuse is not looked at again here.
"""

from __future__ import annotations

import re

KeyPath = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^\s,\]}#][^,\]}#\n]*")
_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)+")
_ESCAPE = re.compile(r"\\(?:u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", re.DOTALL)


def scan(text: str) -> dict[KeyPath, int]:
    """Every key, table and array element -> its line, counted from 1."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int:
    """The line of `path`, or of the nearest thing around it; 0 when there is none."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return 0


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.counts: dict[KeyPath, int] = {}  # elements of each [[array of tables]] so far
        self._line, self._counted = 1, 0

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self._skip_blank():
            if self._peek("[["):
                table = self._header(2)
                index = self.counts.get(table, 0)
                self.counts[table] = index + 1
                table = (*table, index)
                self._mark(table)
            elif self._peek("["):
                table = self._header(1)
                self._mark(table)
            else:
                self._pair(table)
        return self.lines

    def _header(self, brackets: int) -> KeyPath:
        self.at += brackets
        parts = self._key()
        self._mark_all((), parts)
        self._skip_blank()
        self.at += brackets
        return self._within(parts)

    def _within(self, parts: KeyPath) -> KeyPath:
        """`[a.b]` below `[[a]]` means the last element of `a`."""
        path: KeyPath = ()
        for i, part in enumerate(parts):
            path = (*path, part)
            if path in self.counts and i < len(parts) - 1:
                path = (*path, self.counts[path] - 1)
        return path

    def _pair(self, table: KeyPath) -> None:
        parts = self._key()
        self._mark_all(table, parts)
        self._skip_blank()
        self.at += 1  # =
        self._value((*table, *parts))

    def _key(self) -> KeyPath:
        parts: list[str] = []
        while True:
            self._skip_blank()
            if self.text[self.at] in "\"'":
                parts.append(self._string())
            else:
                match = _BARE.match(self.text, self.at)
                assert match is not None, f"no key at line {self._here()}"
                parts.append(match[0])
                self.at = match.end()
            self._skip_blank()
            if not self._peek("."):
                return tuple(parts)
            self.at += 1

    def _value(self, path: KeyPath) -> None:
        self._skip_blank()
        char = self.text[self.at]
        if char in "\"'":
            self._string()
        elif char == "[":
            self.at += 1
            index = 0
            while self._more("]"):
                self._mark((*path, index))
                self._value((*path, index))
                index += 1
        elif char == "{":
            self.at += 1
            while self._more("}"):
                self._pair(path)
        else:
            match = _SCALAR.match(self.text, self.at)
            self.at = match.end() if match else self.at + 1

    def _more(self, closing: str) -> bool:
        """Skips to the next element; False, and past `closing`, when there is none."""
        while self._skip_blank():
            if self._peek(closing):
                self.at += 1
                return False
            if not self._peek(","):
                return True
            self.at += 1
        return False

    def _string(self) -> str:
        quote = self.text[self.at]
        fence = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(fence)
        start = self.at
        while not self.text.startswith(fence, self.at):
            escape = _ESCAPE.match(self.text, self.at) if quote == '"' else None
            self.at = escape.end() if escape else self.at + 1
        content = self.text[start : self.at]
        self.at += len(fence)
        while len(fence) == 3 and self._peek(quote):  # a multi-line string may end in up to two quotes more
            self.at += 1
        return _ESCAPE.sub(_unescape, content) if quote == '"' else content

    def _skip_blank(self) -> bool:
        match = _BLANK.match(self.text, self.at)
        if match:
            self.at = match.end()
        return self.at < len(self.text)

    def _peek(self, what: str) -> bool:
        return self.text.startswith(what, self.at)

    def _here(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def _mark(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self._here())

    def _mark_all(self, table: KeyPath, parts: KeyPath) -> None:
        for n in range(1, len(parts) + 1):
            self._mark((*table, *parts[:n]))


_SHORT = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r"}


def _unescape(match: re.Match[str]) -> str:
    body = match[0][1:]
    return chr(int(body[1:], 16)) if body[0] in "uU" else _SHORT.get(body, body)
