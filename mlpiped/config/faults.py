"""What pydantic says about a config, in sentences that name the key, its section, its line and what to write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from mlpiped.config.lines import KeyPath, line_of
from mlpiped.errors import Fault

if TYPE_CHECKING:
    from pydantic import BaseModel

_BARE = re.compile(r"[A-Za-z0-9_-]+\Z")
_WANTED = {
    "string_type": "text",
    "path_type": "text (a path)",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "mapping_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


class FaultList:
    """Collects the faults of one file.

    A section of `named_sections` that has kinds is a mapping of its key `kind` to the class of that kind.
    """

    def __init__(
        self,
        file: str,
        lines: dict[KeyPath, int],
        sections: Mapping[str, type[BaseModel]],
        named_sections: Mapping[str, type[BaseModel] | Mapping[str, type[BaseModel]]],
    ) -> None:
        self._file = file
        self._lines = lines
        self._sections = sections
        self._named = named_sections
        self._faults: dict[Fault, None] = {}

    def __bool__(self) -> bool:
        return bool(self._faults)

    def sorted(self) -> list[Fault]:
        return sorted(self._faults, key=lambda fault: fault.line)

    def add(self, path: KeyPath, message: str, hint: str | None = None) -> None:
        self._faults[Fault(self._file, line_of(self._lines, path), message, hint)] = None

    def add_unknown(self, path: KeyPath, message: str, name: str, known: Sequence[str]) -> None:
        near = get_close_matches(name, known, n=2, cutoff=0.6)
        quoted = " or ".join(f"`{n}`" for n in near) or None
        self.add(path, message, f"did you mean {quoted}?" if quoted else f"known: {_listed(known)}")

    def names_written(self, section: str) -> list[str]:
        """The names below `[section.*]` that the file has, whether or not they are well formed."""
        return [str(path[1]) for path in self._lines if len(path) == 2 and path[0] == section]

    @staticmethod
    def shown(value: Any) -> str:
        """`value` as its author would recognise it, on one line."""
        if isinstance(value, bool):
            return "true" if value else "false"
        text = f'"{value}"' if isinstance(value, str) else str(value)
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
        return text if len(text) <= 80 else text[:79] + "…"

    def add_from_pydantic(self, loc: KeyPath, kind: str, value: Any, ctx: Mapping[str, Any]) -> None:
        loc, model = self._placed(loc)
        if kind == "extra_forbidden":
            self._add_unknown_key(loc, value, model)
        elif kind == "missing":
            self._add_missing(loc, model)
        elif kind == "union_tag_not_found":
            self._add_missing((*loc, "kind"), self._first_model(loc))
        elif kind == "union_tag_invalid":
            kinds = self._named[str(loc[0])]
            loc, value = (*loc, "kind"), value.get("kind") if isinstance(value, dict) else value
            self._add_wrong_choice(loc, list(kinds) if isinstance(kinds, Mapping) else [], value)
        else:
            self._add_wrong_value(loc, kind, value, ctx, model)

    def _placed(self, loc: KeyPath) -> tuple[KeyPath, type[BaseModel] | None]:
        """`loc` less the kind that pydantic puts into it, and the class of the table that its key stands in."""
        head = str(loc[0])
        found = self._named.get(head)
        if isinstance(found, Mapping):
            model = found.get(str(loc[2])) if len(loc) > 2 else None
            return (loc[:2] + loc[3:] if model else loc), (model if len(loc) == 4 else None)
        return loc, (found if len(loc) == 3 else self._sections.get(head) if len(loc) == 2 else None)

    def _first_model(self, loc: KeyPath) -> type[BaseModel] | None:
        found = self._named.get(str(loc[0]))
        return next(iter(found.values()), None) if isinstance(found, Mapping) else found

    def _add_unknown_key(self, loc: KeyPath, value: Any, model: type[BaseModel] | None) -> None:
        key = str(loc[-1])
        if len(loc) == 1:
            return self._add_unknown_at_top(key, is_table=isinstance(value, dict | list))
        known = list(model.model_fields) if model else []
        message = f"unknown key `{key}` in `{_table(loc[:-1])}`"
        if get_close_matches(key, known, n=1, cutoff=0.8):
            return self.add_unknown(loc, message, key, known)
        if key in (*self._sections, *self._named, "pools"):
            return self.add(loc, message, f"`[{key}]` is a section of its own")
        homes = self._homes(key)
        if homes:
            return self.add(loc, message, f"`{key}` belongs to `{homes[0]}`")
        self.add_unknown(loc, message, key, known)

    def _add_unknown_at_top(self, key: str, *, is_table: bool) -> None:
        if is_table:
            known = [*self._sections, *self._named, "pools"]
            return self.add_unknown((key,), f"unknown section `[{key}]`", key, known)
        keys = {k for _, model in self._models() for k in model.model_fields}
        near = get_close_matches(key, keys, n=1, cutoff=0.6)
        hint = f"did you mean `{near[0]}` below `{self._homes(near[0])[0]}`?" if near else "put it below a section"
        self.add((key,), f"`{key}` stands in no section", hint)

    def _add_missing(self, loc: KeyPath, model: type[BaseModel] | None) -> None:
        key = str(loc[-1])
        annotation = model.model_fields[key].annotation if model else None
        choices = get_args(annotation)
        example = f"add `{key} = 4`" if annotation is int else f'add `{key} = "…"`'
        if choices and isinstance(choices[0], str):
            example = f'write `{key} = "{choices[0]}"`'
        self.add(loc[:-1], f"`{_table(loc[:-1])}` needs `{key}`", example)

    def _add_wrong_choice(self, loc: KeyPath, choices: Sequence[str], value: Any) -> None:
        message = f"{self._subject(loc)} must be one of {_listed(choices)}, not {self.shown(value)}"
        near = get_close_matches(value, choices, n=1, cutoff=0.5) if isinstance(value, str) else []
        self.add(loc, message, f'did you mean "{near[0]}"?' if near else None)

    def _add_wrong_value(
        self, loc: KeyPath, kind: str, value: Any, ctx: Mapping[str, Any], model: type[BaseModel] | None
    ) -> None:
        subject, shown = self._subject(loc), self.shown(value)
        if kind == "literal_error":
            annotation = model.model_fields[str(loc[-1])].annotation if model else None
            choices = [choice for choice in get_args(annotation) if isinstance(choice, str)]
            return self._add_wrong_choice(loc, choices, value)
        if kind == "value_error" and "error" in ctx:
            sentence, _, advice = str(ctx["error"]).partition("\n")
            return self.add(loc, f"{subject} {sentence}: {shown}", advice or None)
        if kind in _BOUNDS:
            name, words = _BOUNDS[kind]
            return self.add(loc, f"{subject} must be {words} {ctx[name]}: {shown}")
        wanted = _WANTED.get(kind)
        if wanted is None:
            return self.add(loc, f"{subject} has a value that does not fit: {shown}")
        hint = None if isinstance(loc[-1], int) else _wanted_hint(loc[-1], wanted, value)
        if len(loc) == 2 and loc[0] in self._named and wanted == "a table":
            hint = f"name it: `[{loc[0]}.NAME]`"
        self.add(loc, f"{subject} must be {wanted}, not {_kind(value)}: {shown}", hint)

    def _homes(self, key: str) -> list[str]:
        return [home for home, model in self._models() if key in model.model_fields]

    def _models(self) -> Iterator[tuple[str, type[BaseModel]]]:
        """Every class that has keys, and how its table is written."""
        for name, model in self._sections.items():
            yield f"[{name}]", model
        for name, found in self._named.items():
            if not isinstance(found, Mapping):
                yield f"[{name}.NAME]", found
                continue
            for kind, model in found.items():
                yield f'[{name}.NAME]` with `kind = "{kind}"', model

    @staticmethod
    def _subject(loc: KeyPath) -> str:
        """`slots` in `[compute.local]`; for an element of a list, the list that it is in."""
        keys = list(loc)
        while len(keys) > 1 and isinstance(keys[-1], int):
            keys.pop()
        return f"`{keys[-1]}` in `{_table(keys[:-1])}`" if len(keys) > 1 else f"`{keys[0]}`"


def _table(path: Sequence[str | int]) -> str:
    return f"[{'.'.join(str(part) if _BARE.match(str(part)) else json.dumps(str(part)) for part in path)}]"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _kind(value: Any) -> str:
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "true or false"),  # before int, which it is a kind of
        (int, "a whole number"),
        (float, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "a table"),
    )
    return next((words for kind, words in kinds if isinstance(value, kind)), "a date or time")


def _wanted_hint(key: str, wanted: str, value: Any) -> str | None:
    if wanted == "a list" and isinstance(value, str):
        return f'write `{key} = ["{value}"]`'
    if wanted in ("a whole number", "a number") and isinstance(value, str):
        return f"write `{key} = {value}`, without quotes" if value.strip().isdigit() else None
    if wanted.startswith("text") and isinstance(value, int | float) and not isinstance(value, bool):
        return f'write `{key} = "{value}"`, with quotes'
    return None
