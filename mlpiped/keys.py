"""A step's identity: named parts, their hash, and the sentence that says which of them changed. Pure.

The key is `b3:` + BLAKE3 over canonical JSON of SCHEME and the seven parts

    command      arguments, with data and parameters as typed placeholders
    code         digest of the step's source (Python by its syntax tree)
    parameters   the values of those that it uses
    environment  requirements, interpreter, variables; of a container the identity of its image, not its name
    inputs       content digest by port
    outputs      declared names, kinds and file names
    salt         the author's `version=`

Inputs that stand in the arguments are named by their place there (`@0`, `@1`, …), not by the name that the
author's variable happens to have; so the names of steps, pipelines and variables are no part of it, nor are compute,
resources, timeouts, retries, owners, times and absolute paths.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlpiped.spec import Scalar, StepSpec

SCHEME = 1
"""The version of the key scheme, a part of every key: raising it makes every step run again, and `why` says so."""

ENTRIES_KEPT = 1000
"""Of a larger input only the digest is kept for explanations, not the list of its files."""


@dataclass(frozen=True, slots=True)
class InputPart:
    """One input as it enters a key. `label` and `entries` serve explanations only."""

    digest: str
    label: str
    entries: Mapping[str, str] | None = None  # relative name -> digest, of a glob or folder
    upstream: str | None = None  # the step that made it


@dataclass(frozen=True, slots=True)
class CodePart:
    digest: str
    raw: str
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A container's image as it enters a key: `identity`. `run` is what an engine starts, for who goes on with the
    attempt; `label` ("app:latest", or "" of a Dockerfile) and `source`, the digest of a Dockerfile, serve explanations.
    """

    identity: str
    run: str
    label: str
    source: str | None = None


class StaticParts:
    """What of a step's key follows from its definition alone: computed once per version of a pipeline."""

    __slots__ = ("head", "ports", "step")

    def __init__(self, step: StepSpec) -> None:
        self.step = step
        places: dict[str, str] = {}
        named = self._named(places)
        self.ports = {port.name: places.get(port.name, port.name) for port in step.inputs}
        self.head = _json([SCHEME, *named.values()])

    def _named(self, places: dict[str, str]) -> dict[str, Any]:
        step = self.step
        environment = {name: value for name, value in step.environment.model_dump().items() if value}
        contained = environment.pop("image", None) or environment.pop("dockerfile", None)
        if _runs_python(step) and "python" not in environment and not contained:
            environment["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
        return {
            "command": {"shell": step.shell, "arguments": [_placeholder(a, places) for a in step.arguments]},
            "environment": environment,
            "outputs": {o.name: [o.output_kind, o.file_name] for o in step.outputs},
            "salt": step.salt,
        }

    def key(
        self,
        code: str | None,
        parameters: Mapping[str, Scalar],
        inputs: Mapping[str, InputPart],
        image: ImagePart | None = None,
    ) -> str:
        """`b3:<hex>`; `inputs` by port name; `image` of a step that runs in a container."""
        head = self.head if image is None else _json([SCHEME, *self._with(image).values()])
        digests = sorted((self.ports[name], part.digest) for name, part in inputs.items())
        dynamic = _json([code, sorted(parameters.items()), digests])
        return "b3:" + blake3((head + "\n" + dynamic).encode()).hexdigest()

    def _with(self, image: ImagePart) -> dict[str, Any]:
        named = self._named({})
        named["environment"]["image"] = image.identity
        return named

    def parts(
        self,
        code: CodePart | None,
        parameters: Mapping[str, Scalar],
        inputs: Mapping[str, InputPart],
        image: ImagePart | None = None,
    ) -> dict[str, Any]:
        """The named parts as plain JSON: what `why` compares later."""
        kept = {} if image is None else {"image": {"run": image.run, "label": image.label, "source": image.source}}
        return {
            "scheme": SCHEME,
            **(self._named({}) if image is None else self._with(image)),
            **kept,
            "code": None if code is None else {"digest": code.digest, "raw": code.raw, "files": dict(code.files)},
            "parameters": dict(parameters),
            "inputs": {
                self.ports[name]: {
                    "digest": part.digest,
                    "label": part.label,
                    "upstream": part.upstream,
                    "entries": dict(part.entries) if part.entries and len(part.entries) <= ENTRIES_KEPT else None,
                }
                for name, part in inputs.items()
            },
        }


def code_of(parts: Mapping[str, Any]) -> CodePart | None:
    """The code part of stored parts."""
    code = parts.get("code")
    return None if code is None else CodePart(code["digest"], code["raw"], code["files"])


def changes(old: Mapping[str, Any], new: Mapping[str, Any], code_change: str | None = None) -> list[str]:
    """What differs between the parts of two keys, as sentences; `code_change` is the diff of the code, if known.

    Empty when the parts are equal.
    """
    found: list[str] = []
    if old.get("scheme") != new.get("scheme"):
        found.append(f"the key scheme is now {new.get('scheme')}")
    if _digest(old.get("code")) != _digest(new.get("code")):
        found.append(f"code changed: {code_change}" if code_change else "code changed")
    found += _mapping_changes("parameter", old["parameters"], new["parameters"])
    found += _input_changes(old["inputs"], new["inputs"])
    if old["environment"] != new["environment"]:
        found.append("environment: " + ", ".join(_environment_changes(old, new)))
    if old["command"] != new["command"]:
        found.append(f"command changed: {_command_change(old['command'], new['command'])}")
    if old["outputs"] != new["outputs"]:
        found.append("declared outputs changed: " + ", ".join(_mapping_changes("", old["outputs"], new["outputs"])))
    if old["salt"] != new["salt"]:
        found.append(f"version {old['salt'] or 'unset'} -> {new['salt'] or 'unset'}")
    return found


def describe_entries(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """`digits/2026-11-23.csv is new`, or `2 files new, 1 changed, 1 gone`."""
    added = sorted(new.keys() - old.keys())
    gone = sorted(old.keys() - new.keys())
    changed = sorted(name for name in new.keys() & old.keys() if new[name] != old[name])
    if len(added) + len(gone) + len(changed) == 1:
        name = (added or gone or changed)[0]
        return f"{name} {'is new' if added else 'is gone' if gone else 'changed'}"
    words = [f"{len(n)} {word}" for n, word in ((added, "new"), (changed, "changed"), (gone, "gone")) if n]
    number, _, rest = ", ".join(words).partition(" ")
    return f"{number} {'file' if number == '1' else 'files'} {rest}"


def _input_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for port, now in new.items():
        before = old.get(port)
        if before is None:
            found.append(f"input {now['label']} is new")
        elif before["digest"] != now["digest"]:
            if before.get("entries") and now.get("entries"):
                detail = describe_entries(before["entries"], now["entries"])
            elif now.get("upstream"):
                detail = f"`{now['upstream']}` made something else"
            else:
                detail = "its content is another"
            found.append(f"input {now['label']} changed: {detail}")
    found += [f"input {old[port]['label']} is no longer taken" for port in old.keys() - new.keys()]
    return found


def _environment_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, now = dict(old["environment"]), dict(new["environment"])
    was, image = before.pop("image", None), now.pop("image", None)
    found = []
    if was != image:
        found.append(_image_change(old.get("image") or {}, new.get("image") or {}, was, image))
    return found + _mapping_changes("", before, now)


def _image_change(old: Mapping[str, Any], new: Mapping[str, Any], was: str | None, now: str | None) -> str:
    if now is None:
        return f"image {old.get('label') or 'of a Dockerfile'} is gone"
    if new.get("source") is not None and old.get("source") is not None:
        same = new["source"] == old["source"]
        return f"what the Dockerfile builds on is now {_digits(now)}" if same else "the Dockerfile changed"
    label = new.get("label") or "of a Dockerfile"
    if was is None or old.get("label") == label:
        return f"image {label} is {'new' if was is None else 'now'}{' ' if was else ': '}{_digits(now)}"
    return f"image {old.get('label') or 'of a Dockerfile'} -> {label}"


def _digits(digest: str) -> str:
    """`sha256:0123456789ab`: as many as Docker shows."""
    kind, _, rest = digest.partition(":")
    return f"{kind}:{rest[:12]}"


def _mapping_changes(word: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    lead = f"{word} " if word else ""
    found = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            found.append(f"{lead}{name} is new ({_short(new[name])})")
        elif name not in new:
            found.append(f"{lead}{name} is gone")
        elif old[name] != new[name] or type(old[name]) is not type(new[name]):
            found.append(f"{lead}{name} {_short(old[name])} -> {_short(new[name])}")
    return found


def _command_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = [_spoken(a) for a in old["arguments"]], [_spoken(a) for a in new["arguments"]]
    gone = [a for a in before if a not in after]
    added = [a for a in after if a not in before]
    if gone or added:
        return " ".join([f"-{_short(a)}" for a in gone[:3]] + [f"+{_short(a)}" for a in added[:3]])
    return "the order of its arguments" if before != after else "shell or not"


def _spoken(argument: Any) -> str:
    if "text" in argument:
        return str(argument["text"])
    if "concat" in argument:
        return "".join(_spoken(part) for part in argument["concat"])
    kind, value = next(iter(argument.items()))
    return f"<{kind} {value}>"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _runs_python(step: StepSpec) -> bool:
    first = step.arguments[0] if step.arguments else None
    return step.kind == "python" or (first is not None and first.kind == "text" and first.text in ("python", "python3"))


def _digest(code: Mapping[str, Any] | None) -> str | None:
    return None if code is None else code["digest"]


def _placeholder(argument: Any, places: dict[str, str]) -> dict[str, Any]:
    """One argument in canonical form; notes in `places` where each input port first stands."""
    match argument.kind:
        case "text":
            return {"text": argument.text}
        case "input":
            return {"input": places.setdefault(argument.port, f"@{len(places)}")}
        case "output":
            return {"output": argument.port}
        case "parameter":
            return {"parameter": argument.name}
        case _:
            return {"concat": [_placeholder(part, places) for part in argument.parts]}


_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode
"""One encoder for all: `json.dumps` with settings makes one each time, which a graph of 10,000 steps can feel."""
