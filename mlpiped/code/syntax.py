"""What a Python file means, less how it is written: a digest of its syntax tree, and what it imports. Pure.

Comments, formatting, quotes, parentheses and type comments do not count; docstrings do (programs print them), and so
does a `#!` line. The walk names only fields that hold something, so that a Python that adds an empty one agrees.
"""

from __future__ import annotations

import ast
import warnings
from typing import NamedTuple

from blake3 import blake3

LARGEST = 256 * 1024
"""Bytes. Parsing holds the interpreter: a larger file, which nobody wrote by hand, counts by its bytes."""

_NAME = "<mlpiped code>"
_SKIPPED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})

# What the author's file makes the parser warn of is not the daemon's to print.
warnings.filterwarnings("ignore", module=_NAME)


class Import(NamedTuple):
    """`import a.b` is (0, "a.b", ()); `from ..a import b, c` is (2, "a", ("b", "c"))."""

    level: int
    module: str
    names: tuple[str, ...]


class Meaning(NamedTuple):
    """Of one file: the digest that counts, and its imports (none when it does not parse)."""

    digest: str
    imports: tuple[Import, ...]


def meaning_of(source: bytes) -> Meaning:
    """A file that does not parse counts by its bytes."""
    if len(source) <= LARGEST:
        try:
            tree = ast.parse(source, _NAME)
            return Meaning("ast:" + _digest(tree, _shebang(source)), tuple(_imports(tree)))
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            pass
    return Meaning("b3:" + blake3(source, max_threads=1).hexdigest(), ())


def _shebang(source: bytes) -> bytes:
    return source.split(b"\n", 1)[0].rstrip() if source.startswith(b"#!") else b""


def _digest(tree: ast.AST, head: bytes) -> str:
    """Over a pre-order walk with marks for where nodes, fields and lists begin and end. No recursion."""
    words: list[str] = [head.decode("latin-1")]
    pending: list[object] = [tree]
    while pending:
        item = pending.pop()
        if isinstance(item, _Mark):
            words.append(item)
        elif isinstance(item, ast.AST):
            words.append("(" + type(item).__name__)
            pending.append(_CLOSE)
            for name, value in reversed(list(ast.iter_fields(item))):
                if name in _SKIPPED or (value is None and not isinstance(item, ast.Constant)):
                    continue
                if isinstance(value, list):
                    value = _plain_parts(value) if isinstance(item, ast.JoinedStr) else value
                    if not value:
                        continue
                pending.append(value)
                pending.append(_Mark("." + name))
        elif isinstance(item, list):
            words.append("[")
            pending.append(_CLOSE_LIST)
            pending.extend(reversed(item))
        else:
            words.append(_constant(item))
    return blake3("\n".join(words).encode("utf-8", "surrogatepass"), max_threads=1).hexdigest()


class _Mark(str):
    """A word of the walk, told apart from a string in the source."""

    __slots__ = ()


_CLOSE, _CLOSE_LIST = _Mark(")"), _Mark("]")


def _constant(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"int {value:x}"  # hex: `repr` refuses numbers of thousands of digits
    return f"{type(value).__name__} {value!r}"


def _plain_parts(values: list[ast.expr]) -> list[ast.expr]:
    """Neighbouring texts of an f-string as one: parsers differ in where they cut them."""
    joined: list[ast.expr] = []
    for value in values:
        last = joined[-1] if joined else None
        if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
            joined.append(value)
        elif isinstance(last, ast.Constant) and isinstance(last.value, str):
            joined[-1] = ast.Constant(last.value + value.value)
        elif value.value:
            joined.append(value)
    return joined


def _imports(tree: ast.AST) -> list[Import]:
    """Every import statement, wherever it stands; also `import_module("a.b")` and `__import__("a.b")` of a literal."""
    found: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(Import(node.level, node.module or "", tuple(alias.name for alias in node.names)))
        elif isinstance(node, ast.Call) and node.args and _function(node.func) in ("import_module", "__import__"):
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and not first.value.startswith("."):
                found.append(Import(0, first.value, ()))
    return found


def _function(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
