"""The one exception of the SDK."""

from __future__ import annotations


class DefinitionError(Exception):
    """A definition is wrong: a sentence, the (file, line) that the author wrote, and the next action.

    `more` holds the other faults that were found with it, if any.
    """

    def __init__(self, message: str, where: tuple[str, int], hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        self.more: tuple[DefinitionError, ...] = ()
        super().__init__(f"{where[0]}:{where[1]}: {message}" + (f"\n  hint: {hint}" if hint else ""))
