"""TOML -> frozen Settings. Every fault at once, each with its line and, where one can be guessed, a suggestion.

From here on sizes are bytes, time spans seconds, and paths absolute: a relative one starts at the file's folder.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mlpiped.config import computes as config_computes
from mlpiped.config import find as config_find
from mlpiped.config.computes import Compute, DockerCompute, LocalCompute, SlurmCompute, SshCompute, cpu_count
from mlpiped.config.faults import FaultList
from mlpiped.config.fields import (
    AbsolutePath,
    Count,
    KeptBytes,
    KeptSeconds,
    Operator,
    Program,
    Seconds,
    Section,
    SocketPath,
    Text,
)
from mlpiped.config.find import find
from mlpiped.config.lines import line_of, scan
from mlpiped.errors import ConfigError, Fault
from mlpiped.spec import NAME

__all__ = [
    "Control",
    "Daemon",
    "Datastore",
    "DockerCompute",
    "LocalCompute",
    "Outline",
    "Retention",
    "Settings",
    "SlurmCompute",
    "SshCompute",
    "cpu_count",
    "default_settings",
    "find",
    "load",
    "outline",
]

STATE_DIR = Path("/var/lib/mlpiped")


class Daemon(Section):
    """`[daemon]`"""

    state_dir: AbsolutePath = STATE_DIR
    runtime_dir: AbsolutePath = config_find.RUNTIME_DIR
    plugins: tuple[AbsolutePath, ...] = ()
    log: Literal["journal", "json", "console"] = "console"
    max_running_steps: Count | None = None  # None: as many as the computes have slots
    on_stop: Literal["leave", "cancel"] = "leave"
    python: Program | None = None  # the interpreter of steps; None: the daemon's own


class Control(Section):
    """`[control]`"""

    socket: SocketPath
    group: Text | None = None  # its members may read
    operators: tuple[Operator, ...] = ()  # users, and `@group`s, who may act


class Datastore(Section):
    """`[datastores.NAME]`"""

    path: AbsolutePath
    watch: Literal["auto", "inotify", "poll"] = "auto"
    poll_interval: Seconds = 30.0


class Retention(Section):
    """`[retention]`. None: kept for ever, written "forever"."""

    runs: KeptSeconds = 180 * 86_400.0
    artifacts: KeptBytes = None
    logs: KeptSeconds = 30 * 86_400.0


class Settings(Section):
    """The whole config. `path` is the file that it came from."""

    path: Path | None = None
    daemon: Daemon
    control: Control
    datastores: Mapping[str, Datastore] = {}
    compute: Mapping[str, Compute] = {}
    pools: Mapping[str, tuple[str, ...]] = {}
    retention: Retention = Retention()


SECTIONS: dict[str, type[BaseModel]] = {"daemon": Daemon, "control": Control, "retention": Retention}
NAMED_SECTIONS: dict[str, type[BaseModel] | Mapping[str, type[BaseModel]]] = {
    "datastores": Datastore,
    "compute": config_computes.KINDS,  # by its key `kind`
}
NOT_YET = {
    "notify": "notices are not built yet",
    "credentials": "credentials are not built yet",
}


def default_settings(
    state_dir: Path,
    *,
    plugins: tuple[Path, ...] = (),
    datastores: Mapping[str, Datastore] | None = None,
    slots: int | None = None,
) -> Settings:
    """Settings without a file: everything below `state_dir`, one local compute."""
    state_dir = Path(os.path.abspath(state_dir))
    runtime_dir = state_dir / "run"
    return Settings(
        daemon=Daemon(state_dir=state_dir, runtime_dir=runtime_dir, plugins=plugins),
        control=Control(socket=runtime_dir / config_find.SOCKET_NAME),
        datastores=datastores or {},
        compute={"local": LocalCompute(kind="local", slots=slots or cpu_count())},
    )


def load(path: Path) -> Settings:
    """The settings in the file `path`. Raises ConfigError with every fault that it has."""
    path = Path(os.path.abspath(path))
    text = _read(path)
    try:
        raw: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_fault(path, text, str(error))]) from None
    lines = scan(text)
    lines.setdefault(("control", "socket"), line_of(lines, ("daemon", "runtime_dir")))  # what it is made of when absent
    faults = FaultList(str(path), lines, SECTIONS, NAMED_SECTIONS)
    _take_out_what_is_not_built(raw, faults)
    _check_names(raw, faults)
    _check_pools(raw, faults)
    _fill_in(raw)
    config_computes.check(raw, path.parent, *_own_folders(raw, path.parent), faults)
    settings: Settings | None = None
    try:
        settings = Settings.model_validate({**raw, "path": path}, context={"base": path.parent})
    except ValidationError as error:
        details = error.errors(include_url=False)
        broken = {detail["loc"] for detail in details}
        for detail in details:
            if detail["loc"] == ("control", "socket") and ("daemon", "runtime_dir") in broken:
                continue  # made of it: one fault is enough
            faults.add_from_pydantic(detail["loc"], detail["type"], detail["input"], detail.get("ctx", {}))
    if settings is None or faults:
        raise ConfigError(faults.sorted())
    return settings


@dataclass(frozen=True, slots=True)
class Outline:
    """What a config says about plugins and their world, as far as it can be told from one with faults."""

    plugins: tuple[Path, ...]
    state_dir: Path
    datastores: frozenset[str]
    computes: frozenset[str]  # pools too
    images: Mapping[str, frozenset[bool | str]] = field(default_factory=dict)  # of each: `spec_images.Images`
    clusters: frozenset[str] = frozenset()  # those of them that start steps on several nodes


def outline(path: Path) -> Outline | None:
    """For a check that goes on after the first faults. None when the file is not TOML. Knows no fault."""
    path = Path(os.path.abspath(path))
    try:
        raw = tomllib.loads(_read(path))
    except (ConfigError, tomllib.TOMLDecodeError):
        return None
    written = raw["daemon"] if isinstance(raw.get("daemon"), dict) else {}
    plugins = written.get("plugins", ["plugins"])
    folders = [p for p in plugins if isinstance(p, str)] if isinstance(plugins, list) else []
    state_dir = written.get("state_dir")
    kinds = {name: str(table.get("kind")) for name, table in _tables(raw, "compute")} or {"local": "local"}
    images = {
        name: image
        for name, table in _tables(raw, "compute")
        if (image := config_computes.own_image(table)) is not None
    }
    pools = raw["pools"] if isinstance(raw.get("pools"), dict) else {}
    members = {
        n: tuple(m for m in found if isinstance(m, str)) for n, found in pools.items() if isinstance(found, list)
    }
    try:
        return Outline(
            plugins=tuple(config_find.below(path.parent, p) for p in folders),
            state_dir=config_find.below(path.parent, state_dir) if isinstance(state_dir, str) else STATE_DIR,
            datastores=frozenset(dict(_tables(raw, "datastores"))),
            computes=frozenset(kinds) | frozenset(pools),
            images=config_computes.images_of(kinds, members, images),
            clusters=config_computes.clusters_of(kinds, members),
        )
    except RuntimeError:  # the home of nobody
        return None


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError([Fault(str(path), 0, f"cannot be read: {reason}")]) from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Fault(str(path), line, "is not UTF-8 text", "save the file as UTF-8")]) from None


def _syntax_fault(path: Path, text: str, message: str) -> Fault:
    """`Invalid value (at line 3, column 7)` and `… (at end of document)`, as tomllib words them."""
    match = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)\Z", message)
    what = message[: match.start()] if match else message
    line = int(match[1]) if match and match[1] else text.rstrip().count("\n") + 1
    source = text.splitlines()[line - 1].strip() if text.strip() else ""
    hint = 'text needs quotes: name = "value"' if re.match(r"[\w.-]+\s*=\s*[^\s\"'\[{\d+-]", source) else None
    return Fault(str(path), line, f"not valid TOML: {what[:1].lower()}{what[1:]}: `{source[:80]}`", hint)


def _take_out_what_is_not_built(raw: dict[str, Any], faults: FaultList) -> None:
    """Things of the contract that do not work yet are refused by name, and no second fault is made of their keys."""
    for section, sentence in NOT_YET.items():
        if raw.pop(section, None) is not None:
            faults.add((section,), f"`[{section}]`: {sentence}", "remove the section")
    control = raw.get("control")
    if isinstance(control, dict) and control.pop("http", None) is not None:
        faults.add(("control", "http"), "`[control.http]`: the API on TCP is not built yet", "use the Unix socket")
    for name, table in _tables(raw, "datastores"):
        if "url" in table:
            del raw["datastores"][name]
            message = f"`url` in `[datastores.{name}]`: only folders work yet"
            faults.add(("datastores", name, "url"), message, 'give `path = "/folder"` in place of `url`')


def _tables(raw: dict[str, Any], section: str) -> list[tuple[str, dict[str, Any]]]:
    found = raw.get(section)
    return [(k, v) for k, v in found.items() if isinstance(v, dict)] if isinstance(found, dict) else []


def _check_names(raw: dict[str, Any], faults: FaultList) -> None:
    for section in ("datastores", "compute", "pools"):
        for name in raw[section] if isinstance(raw.get(section), dict) else ():
            if not NAME.match(name):
                message = f"`[{section}]` has a name that cannot be used: {faults.shown(name)}"
                faults.add((section, name), message, "use letters, digits, `_`, `-` and `.`, 64 at most")


def _check_pools(raw: dict[str, Any], faults: FaultList) -> None:
    pools = raw.get("pools")
    known = faults.names_written("compute") or ["local"]
    for name, members in pools.items() if isinstance(pools, dict) else ():
        if name in known:
            faults.add(("pools", name), f"pool `{name}` has the name of a compute", "give the pool another name")
        if members == []:
            faults.add(("pools", name), f"pool `{name}` is empty", "name a compute in it, or remove it")
        for i, member in enumerate(members if isinstance(members, list) else ()):
            if isinstance(member, str) and member not in known:
                faults.add_unknown(("pools", name, i), f"no compute named `{member}` in pool `{name}`", member, known)


def _fill_in(raw: dict[str, Any]) -> None:
    """Defaults that depend on other keys. What is of the wrong type is left for the models to name."""
    daemon = raw.setdefault("daemon", {})
    control = raw.setdefault("control", {})
    runtime_dir = config_find.RUNTIME_DIR
    if isinstance(daemon, dict):
        daemon.setdefault("plugins", ["plugins"])
        if isinstance(written := daemon.get("runtime_dir"), str):
            runtime_dir = Path(written)
    if isinstance(control, dict):
        control.setdefault("socket", str(runtime_dir / config_find.SOCKET_NAME))
    if not raw.get("compute"):
        raw["compute"] = {"local": {"kind": "local"}}


def _own_folders(raw: dict[str, Any], base: Path) -> tuple[Path, Path]:
    """The state folder and the control socket, once `_fill_in` has been; what is no path has a fault of its own."""
    found = []
    for section, key, default in (("daemon", "state_dir", STATE_DIR), ("control", "socket", config_find.RUNTIME_DIR)):
        table = raw.get(section)
        written = table.get(key) if isinstance(table, dict) else None
        try:
            found.append(config_find.below(base, written) if isinstance(written, str) else default)
        except (RuntimeError, ValueError):
            found.append(default)
    return found[0], found[1]
