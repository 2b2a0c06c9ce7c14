"""The base images of a Dockerfile: found, and replaced by digests; every stage labelled. Pure.

What is not understood (a FROM whose variable has no default in the file) is left to the engine, which then says what is
wrong with it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FROM = re.compile(
    r"^[ \t]*FROM[ \t]+(?:--\S+[ \t]+)*(?P<base>\S+)(?:[ \t]+AS[ \t]+(?P<stage>\S+))?[ \t\r]*$", re.I | re.M
)
COPY = re.compile(r"^[ \t]*COPY[ \t]+(?:--(?!from)\S+[ \t]+)*--from=(?P<base>\S+)", re.I | re.M)
ARG = re.compile(r"^[ \t]*ARG[ \t]+(?P<name>\w+)=(?P<value>\S*)[ \t]*$", re.I | re.M)
ESCAPE = re.compile(r"\s*#\s*escape\s*=\s*(\S)", re.I)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")


def bases(text: str) -> list[str]:
    """The names of the images that it starts from or copies from, each once; not `scratch`, not its own stages."""
    return list(dict.fromkeys(name for _, name in _found(text)))


def pinned(text: str, images: Mapping[str, str]) -> str:
    """The same with these images in place of the names."""
    done, at = [], 0
    for (start, end), name in _found(text):
        if name in images:
            done += [text[at:start], images[name]]
            at = end
    return "".join(done) + text[at:]


def labelled(text: str, name: str, value: str) -> str:
    """The same with this label on each of its stages: on all that a build leaves, be it cut off or fail."""
    begins = _instructions(text)
    ends = [match.end() for match in FROM.finditer(text) if match.start() in begins]
    for at in reversed(ends):
        text = f'{text[:at]}\nLABEL "{name}"="{value}"{text[at:]}'
    return text


def _instructions(text: str) -> set[int]:
    """Where in the text an instruction may begin: no line that goes on with the one before it."""
    found, at, goes_on = set(), 0, False
    escape = m[1] if (m := ESCAPE.match(text)) else "\\"
    for line in text.split("\n"):
        if not goes_on:
            found.add(at)
        if (words := line.strip()) and not words.startswith("#"):
            goes_on = words.endswith(escape)
        at += len(line) + 1
    return found


def _found(text: str) -> Iterator[tuple[tuple[int, int], str]]:
    """(place in the text, name of the image)."""
    head = FROM.search(text)
    arguments = {m["name"]: m["value"].strip("\"'") for m in ARG.finditer(text, 0, head.start() if head else 0)}
    stages: set[str] = {"scratch"}
    begins = _instructions(text)
    matches = [match for each in (FROM, COPY) for match in each.finditer(text) if match.start() in begins]
    for match in sorted(matches, key=lambda match: match.start()):
        is_from = match.re is FROM
        name = (
            VARIABLE.sub(lambda v: arguments.get(v[1] or v[3], v[2] or ""), match["base"]) if is_from else match["base"]
        )
        if name and name.lower() not in stages and not name.isdecimal():
            yield match.span("base"), name
        if is_from and match["stage"]:
            stages.add(match["stage"].lower())
