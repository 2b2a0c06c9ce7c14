"""Data inside a shell command: handed over as positional parameters, so that the shell never parses a value.

`CommandStep(f"sort {samples} > {out}")` becomes `/bin/sh -c 'sort "${1}" > "${2}"' sh SAMPLES OUT`. A value with
a blank, a quote or `$(…)` in it, from whoever starts a run, stays one word of text.
"""

from __future__ import annotations

from mlpiped.sdk.data import Placeholder

_BARE, _SINGLE, _DOUBLE, _COMMENT = range(4)


def hand_over(pieces: list[str | Placeholder]) -> tuple[str, list[Placeholder]]:
    """The command with `${N}` in place of each placeholder, quoted as its place asks for, and the N-th values.

    Raises ValueError, with a sentence, where a value cannot be handed over.
    """
    reader = _Reader()
    done: list[str] = []
    handed: list[Placeholder] = []
    for piece in pieces:
        if isinstance(piece, str):
            reader.read(piece)
            done.append(piece)
            continue
        if piece not in handed:
            handed.append(piece)
        number = f"${{{handed.index(piece) + 1}}}"
        if reader.state == _COMMENT:
            raise ValueError("it stands in a comment")
        if reader.here_document:
            raise ValueError("the command has a here-document")
        if reader.escaped:
            raise ValueError("a backslash stands before it")
        if reader.backquoted:
            raise ValueError("it stands between backquotes: write `$(…)` instead")
        done.append({_BARE: f'"{number}"', _DOUBLE: number, _SINGLE: f"'\"{number}\"'"}[reader.state])
        reader.last = "x"
    return "".join(done), handed


class _Reader:
    """Just enough of the shell's lexer to know how the next character would be quoted."""

    def __init__(self) -> None:
        self.stack = [_BARE]  # `$(` opens a context of its own, also inside double quotes
        self.last = " "
        self.escaped = False
        self.backquoted = False
        self.here_document = False

    @property
    def state(self) -> int:
        return self.stack[-1]

    def read(self, text: str) -> None:
        for character in text:
            self._step(character)
            self.last = character

    def _step(self, c: str) -> None:
        state = self.state
        if self.escaped:
            self.escaped = False
        elif state == _SINGLE:
            if c == "'":
                self.stack.pop()
        elif state == _COMMENT:
            if c == "\n":
                self.stack.pop()
        elif c == "\\":
            self.escaped = True
        elif c == "`":
            self.backquoted = not self.backquoted
        elif c == '"':
            if state == _DOUBLE:
                self.stack.pop()
            else:
                self.stack.append(_DOUBLE)
        elif c == "(" and (self.last == "$" or state == _BARE):
            self.stack.append(_BARE)
        elif state == _BARE:
            self._bare(c)

    def _bare(self, c: str) -> None:
        if c == "'":
            self.stack.append(_SINGLE)
        elif c == ")" and len(self.stack) > 1:
            self.stack.pop()
        elif c == "#" and self.last in " \t\n;&|()":
            self.stack.append(_COMMENT)
        elif c == "<" and self.last == "<":
            self.here_document = True
