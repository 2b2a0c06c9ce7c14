"""What client and daemon say to each other: HTTP/1.1 with JSON on a Unix socket, paths under `/v1`.

    answer      200, one JSON document
    refusal     4xx/5xx, {"error": {"kind": "unknown_name", "message": "…", "hint": "…" | null}}
    stream      text/event-stream; each `data:` is one JSON document, `id:` its number in the ledger where it has one,
                the event `end` is the last one, and comments keep the line alive

`mlpipectl` starts fast because of what is *not* here: no pydantic, no asyncio, no aiohttp, no dataclass. What a request
must look like is said, and checked, in `control/requests.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from mlpiped.errors import BadParameter, UnknownName, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mlpiped.spec import ParameterSpec, Scalar

PREFIX = "/v1"
BODY_LIMIT = 1 << 20  # bytes of one request
SOCKET_PATH_LIMIT = 107  # bytes; the kernel's sun_path less its final NUL
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~:")


class CauseJson(TypedDict):
    kind: str
    detail: str


class StepJson(TypedDict):
    name: str
    state: str
    outcome: str | None
    why: str | None
    compute: str | None
    attempts: int
    exit_code: int | None
    key: str | None
    reused_from: str | None
    started_at: str | None
    finished_at: str | None


class RunJson(TypedDict):
    id: int
    pipeline: str
    version: str
    experiment: str
    owner: str | None
    cause: CauseJson
    parameters: dict[str, Any]
    tags: dict[str, str]
    state: str
    outcome: str | None
    created_at: str | None
    started_at: str | None
    finished_at: str | None
    steps: list[StepJson]


class ErrorJson(TypedDict):
    kind: str
    message: str
    hint: str | None


class DoingJson(TypedDict):
    """What travels for a step just now: `sends input samples to gpu1: 1.2 of 3.4 GB`."""

    step: str
    what: str


class ActiveJson(TypedDict):
    """A run that has not finished, as `Actions.active` gives it (times in microseconds)."""

    id: int
    pipeline: str
    owner: str | None
    started_at: int | None
    total: int
    done: int
    running: int
    failed: int
    queued: int
    doing: list[DoingJson]


class HolderJson(TypedDict):
    run: int
    step: str
    since: int | None
    slots: int


class CardJson(TypedDict):
    """`foreign` ends a sentence: somebody else is on the card. `memory` in bytes, 0 when it is not told."""

    uuid: str
    index: int
    name: str
    memory: int
    foreign: str | None
    holders: list[HolderJson]


class NodesAwayJson(TypedDict):
    """`nodes` as the cluster writes them: `n[1-2]`. `reason` is what whoever took them away said."""

    nodes: str
    state: str
    reason: str


class ClusterJson(TypedDict):
    """`jobs`: the queue's own word for a state -> how many of ours. `full`: its words while it takes no more."""

    partition: str | None
    nodes_up: int | None
    nodes_down: int | None
    away: list[NodesAwayJson]
    jobs: dict[str, int]
    full: str | None


class ComputeJson(TypedDict):
    name: str
    kind: str
    slots: int
    used: int
    memory: int | None
    memory_used: int
    holders: list[HolderJson]
    health: str | None
    unwell_since: int | None
    drained: bool
    drained_by: str | None
    drained_since: int | None
    cards: list[CardJson]
    cards_trouble: str | None
    cluster: ClusterJson | None


def path(*segments: object, **query: object) -> str:
    """`/v1/…` with every segment and value quoted; None and False leave a query word out, True is `1`."""
    text = PREFIX + "".join("/" + quote(str(segment)) for segment in segments)
    words = [
        f"{name}={quote('1' if each is True else str(each))}"
        for name, value in query.items()
        for each in (value if isinstance(value, list) else (value,))
        if each is not None and each is not False
    ]
    return text + ("?" + "&".join(words) if words else "")


def quote(text: str) -> str:
    """Percent-encoding of everything that is not unreserved (urllib costs the client some milliseconds)."""
    return "".join(chr(b) if b in _UNRESERVED else f"%{b:02X}" for b in text.encode("utf-8", "surrogateescape"))


def reference(text: str) -> tuple[str | None, int | None]:
    """`12` -> (None, 12); `latest` -> (None, None); `PIPELINE:latest` -> (PIPELINE, None). Raises UsageError."""
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return None, int(text)
    pipeline, colon, word = text.rpartition(":")
    if word == "latest" and (pipeline or not colon):
        return (pipeline or None), None
    raise UsageError(f"not a run: `{text}`", hint="a run is its number, `latest` or `PIPELINE:latest`")


# --- parameters -----------------------------------------------------------------------------------------------------
def as_text(value: str) -> dict[str, str]:
    """A parameter as a person typed it; the daemon reads it as what the parameter's declared type makes of it."""
    return {"text": value}


def typed_parameters(given: Mapping[str, Any], declared: Sequence[ParameterSpec]) -> dict[str, Scalar]:
    """The values given for declared parameters, each of its declared type. Defaults are not filled in.

    A value is a JSON scalar of the right type, or `as_text(…)`. Raises BadParameter that names every fault.
    Giving its answer to it again changes nothing.
    """
    by_name = {spec.name: spec for spec in declared}
    found: dict[str, Scalar] = {}
    faults: list[str] = []
    hint: str | None = None
    for name, value in given.items():
        if name not in by_name:
            unknown = UnknownName.among("parameter", name, by_name)
            faults.append(unknown.message)
            hint = hint or unknown.hint or _known(by_name)
            continue
        try:
            found[name] = _typed(by_name[name], value)
        except ValueError as error:
            faults.append(f"parameter `{name}` {error}")
    if faults:
        raise BadParameter("; ".join(faults), hint=hint)
    return found


def _known(names: Iterable[str]) -> str:
    words = ", ".join(f"`{name}`" for name in names)
    return f"its parameters are {words}" if words else "the pipeline has no parameters"


_NOUN = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}


def _typed(spec: ParameterSpec, value: Any) -> Scalar:
    if value is None and spec.default is None and not spec.required:
        return None
    if isinstance(value, dict) and set(value) == {"text"} and isinstance(value["text"], str):
        made = _from_text(spec.type, value["text"])
    elif spec.type == "float" and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53:
        made = float(value)
    else:
        made = value if type(value).__name__ == spec.type else None
    if made is None:
        shown = value["text"] if isinstance(value, dict) and "text" in value else value
        raise ValueError(f"must be {_NOUN[spec.type]}, not {shown!r}")
    if spec.choices and made not in spec.choices:
        raise ValueError(f"must be one of {', '.join(repr(choice) for choice in spec.choices)}, not {made!r}")
    return made


def _from_text(kind: str, text: str) -> Scalar:
    """None when `text` does not say a value of this type."""
    if kind == "str":
        return text
    if kind == "bool":
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower())
    try:
        number = int(text) if kind == "int" else float(text)
    except ValueError:
        return None
    return number if number - number == 0 else None  # inf and nan are no parameters
