"""The types of the config's values, each with the sentence that is said about a wrong one."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from mlpiped.config import find as config_find
from mlpiped.config import values as config_values

_OPERATOR = re.compile(r"@?[A-Za-z0-9_][A-Za-z0-9_.-]*\$?\Z")


def _absolute(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    try:
        return path if base is None else config_find.below(base, path)
    except RuntimeError:
        raise ValueError(f"names a home that does not exist\nthere is no user `{path.parts[0][1:]}` here") from None


def _program(path: Path, info: ValidationInfo) -> Path:
    """A bare name is looked up as the shell would; the rest is a path."""
    if len(path.parts) == 1 and not path.is_absolute():
        found = shutil.which(str(path))
        if found is None:
            raise ValueError("is not found on PATH\ngive the absolute path of a Python interpreter")
        return Path(found)
    return _absolute(path, info)


def filled(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    if any(ord(c) < 32 for c in text):
        raise ValueError("must not have control characters in it")
    return text


def _filled_path(value: object) -> object:
    return filled(value) if isinstance(value, str) else value


def _operator(text: str) -> str:
    if not _OPERATOR.match(text):
        raise ValueError('is neither a user nor a group\nwrite "alice" for a user and "@ml" for a group')
    return text


def _socket(path: Path) -> Path:
    length = len(os.fsencode(path))
    if length > config_find.LONGEST_SOCKET:
        raise ValueError(
            f"is too long for a socket: {length} bytes, at most {config_find.LONGEST_SOCKET}\n"
            "set `runtime_dir` in `[daemon]`, or `socket` in `[control]`, to a shorter path"
        )
    return path


Text = Annotated[str, AfterValidator(filled)]
AbsolutePath = Annotated[Path, BeforeValidator(_filled_path), AfterValidator(_absolute)]
Program = Annotated[Path, BeforeValidator(_filled_path), AfterValidator(_program)]
SocketPath = Annotated[AbsolutePath, AfterValidator(_socket)]
Seconds = Annotated[float, BeforeValidator(config_values.seconds), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(config_values.size), Field(gt=0)]
KeptSeconds = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(config_values.kept_seconds)]
KeptBytes = Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(config_values.kept_size)]
Count = Annotated[int, Field(strict=True, ge=1)]
Amount = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Operator = Annotated[str, AfterValidator(_operator)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
