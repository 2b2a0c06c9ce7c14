"""What a request must look like: strict JSON first, then a model for each body and each query string.

Anything else is one `UsageError` with every fault in its message. A traceback never leaves this room.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mlpiped.config import values as config_values
from mlpiped.errors import UsageError
from mlpiped.model import RunOutcome, RunState

if TYPE_CHECKING:
    from collections.abc import Mapping

DEPTH_LIMIT = 32
_NUMBER_LIMIT = 1 << 63
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+|[\[{\]}]', re.DOTALL)
M = TypeVar("M", bound=BaseModel)


# --- strict JSON ----------------------------------------------------------------------------------------------------
def read_json(body: bytes) -> Any:
    """UTF-8 JSON as RFC 8259 means it: no NaN, no number beyond a double, no key twice, 32 levels, no NUL in a text."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not UTF-8: byte {error.start} is no part of a character") from None
    _check_depth(text)
    try:
        value = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_no_key_twice
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"the body is not JSON: {error.msg.lower()} at {place}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    if "\\u" in text and not _writable(value):
        raise UsageError("the body has a text with NUL or half a surrogate pair in it")
    return value


def _check_depth(text: str) -> None:
    """The scanner would recurse: count before it does, with a pattern that never goes back."""
    deep = 0
    for token in _TOKEN.finditer(text):
        first = token[0][0]
        deep += 1 if first in "[{" else -1 if first in "]}" else 0
        if deep > DEPTH_LIMIT:
            raise UsageError(f"the body nests more than {DEPTH_LIMIT} levels deep")


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"{word[:40]} is too large a number")
    return number


def _whole(word: str) -> int:
    if len(word) > 20 or not -_NUMBER_LIMIT <= int(word) < _NUMBER_LIMIT:
        raise ValueError(f"{word[:40]} is too large a number")
    return int(word)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _writable(value: Any) -> bool:
    """Whether every text in it can go into a file name or a ledger. As deep as `_check_depth` lets it be."""
    if isinstance(value, str):
        return "\x00" not in value and not any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, dict):
        return all(_writable(key) and _writable(each) for key, each in value.items())
    return all(_writable(each) for each in value) if isinstance(value, list) else True


# --- models ---------------------------------------------------------------------------------------------------------
def _plain(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not have a NUL in it")
    return text


def _span(value: object) -> float:
    """`30`, `30.5` and `"30s"`, `"1h30m"` -> seconds."""
    text = str(value)
    try:
        number = float(text)
    except ValueError:
        return config_values.seconds(text)
    if not 0 <= number < 1e9:
        raise ValueError("must be a time span")
    return number


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain)]
AbsolutePath = Annotated[str, Field(min_length=1, max_length=4096, pattern="^/"), AfterValidator(_plain)]
Word = Annotated[str, Field(max_length=1000), AfterValidator(_plain)]
Span = Annotated[float, BeforeValidator(_span), Field(ge=0)]
Flag = bool


class Typed(BaseModel):
    """A parameter as a person typed it: read as what its declared type makes of it."""

    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, Field(max_length=100_000), AfterValidator(_plain)]


def _parameter(value: object) -> object:
    """One fault in place of one for each member of the union."""
    if value is None or isinstance(value, str | int | float | bool | Typed):
        return value
    if isinstance(value, dict) and set(value) == {"text"}:
        return value
    raise ValueError('must be a text, a number, true, false, null or {"text": "…"}')


def _force(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        return value
    raise ValueError("must be true, false or a list of step names")


Parameter = Annotated[str | int | float | bool | Typed | None, BeforeValidator(_parameter)]
Force = Annotated[bool | list[Name], BeforeValidator(_force)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Empty(_Body):
    """No words at all: `{}` or no body."""


class Choice(_Body):
    """What to run of a pipeline. A parameter is a scalar of its declared type, or `{"text": "…"}`."""

    parameters: dict[Name, Parameter] = Field(default={}, max_length=1000)
    force: Force = False
    target: Name | None = None

    def plain_parameters(self) -> dict[str, Any]:
        return {k: v.model_dump() if isinstance(v, Typed) else v for k, v in self.parameters.items()}

    def forced(self) -> bool | list[str]:
        """An empty list forces nothing."""
        return self.force if isinstance(self.force, bool) else (list(self.force) or False)


class StartRun(Choice):
    """`POST /v1/pipelines/NAME/runs`"""

    tags: dict[Name, Word] = Field(default={}, max_length=100)


class SubmitFile(StartRun):
    """A pipeline that is not installed: `file` is an absolute path that the daemon can read."""

    file: AbsolutePath


class AskPlan(Choice):
    """Exactly one of `pipeline` and `file`."""

    pipeline: Name | None = None
    file: AbsolutePath | None = None

    def subject(self) -> str:
        if (self.pipeline is None) == (self.file is None):
            raise UsageError("name exactly one of `pipeline` and `file`")
        return self.pipeline or self.file or ""


class CancelRun(_Body):
    """The whole run, or one step of it."""

    step: Name | None = None


class RunsQuery(_Query):
    pipeline: Name | None = None
    state: RunState | None = None
    outcome: RunOutcome | None = None
    tag: list[Word] = Field(default=[], max_length=20, description="`k=v`; all of them must hold")
    since: Word | None = Field(default=None, description="RFC 3339 time, date, or a span such as `2d`")
    limit: int = Field(default=20, ge=1, le=10_000)
    steps: Flag = Field(default=False, description="with their steps")


class LogsQuery(_Query):
    step: Name | None = None
    attempt: int | None = Field(default=None, ge=1, le=1_000_000)
    stream: Literal["both", "stdout", "stderr"] = "both"
    follow: Flag = False


class WaitQuery(_Query):
    timeout: Span | None = Field(default=None, description="seconds or `30s`; then the run is given as it is")
    brief: Flag = Field(default=False, description="of the steps only those that did not end well, and `counts`")


class EventsQuery(_Query):
    after: int | None = Field(default=None, ge=0, lt=_NUMBER_LIMIT, description="number of the last event known")
    run: Name | None = None
    limit: int = Field(default=100, ge=1, le=10_000)
    follow: Flag = False


class NoQuery(_Query):
    """No words."""


def check(model: type[M], value: Any, what: str) -> M:
    """`value` as a `model`. Raises UsageError that names every fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise UsageError("; ".join(_fault(e, what) for e in error.errors(include_url=False)[:10])) from None


def body(model: type[M], data: bytes) -> M:
    """A request's body; none at all means `{}`."""
    value = read_json(data) if data.strip() else {}
    if not isinstance(value, dict):
        raise UsageError("the body must be a JSON object")
    return check(model, value, "body")


def query(model: type[M], given: Mapping[str, list[str]]) -> M:
    """A request's query string; a word that may be given once must not be given twice."""
    lists = {name for name, field in model.model_fields.items() if field.annotation == list[Word]}
    flat: dict[str, Any] = {}
    for name, values in given.items():
        if name in lists:
            flat[name] = values
        elif len(values) > 1:
            raise UsageError(f"`{name}` is there twice")
        else:
            flat[name] = values[0]
        if any("\x00" in value for value in values):
            raise UsageError(f"`{name}` has a NUL in it")
    return check(model, flat, "query")


def _fault(error: Any, what: str) -> str:
    place = ".".join(str(part) for part in error["loc"]) or what
    if error["type"] == "extra_forbidden":
        return f"unknown word `{place[:80]}`"
    message = str(error["msg"]).removeprefix("Value error, ").split("\n")[0]
    return f"`{place[:80]}`: {message[:1].lower()}{message[1:]}"
