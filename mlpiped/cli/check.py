"""`mlpiped check`: every fault of the config and of the plugins, found as the daemon finds them."""

from __future__ import annotations

import grp
import json
import os
import pwd
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from mlpiped.cli import check_computes
from mlpiped.cli.front import printable
from mlpiped.config import settings as config
from mlpiped.errors import ConfigError, Fault, UsageError
from mlpiped.loader.files import plugins_in
from mlpiped.loader.load import Known, LoadResult, Trust, load_file
from mlpiped.triggers import cron

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.config.settings import Outline, Settings

AT_ONCE = 4  # child processes


@dataclass(slots=True)
class Findings:
    checked: list[tuple[str, str, str]] = field(default_factory=list)  # kind, file, what is in it
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)  # tracebacks and what plugins printed, for who debugs

    def as_json(self) -> dict[str, Any]:
        return {
            "checked": [{"kind": kind, "file": file, "found": found} for kind, file, found in self.checked],
            "faults": [
                {"file": f.file, "line": f.line or None, "message": f.message, "hint": f.hint} for f in self.faults
            ],
            "warnings": self.warnings,
        }


def check(explicit: Path | None, files: Sequence[Path], *, as_json: bool) -> int:
    """Prints what was checked and every fault. 1 if there is any, else 0.

    With `files` those plugins alone are checked; a config is then of use for its names, and not needed.
    """
    findings = Findings()
    outline = _check_config(explicit, findings, needed=not files)
    plugins, strict = [os.path.abspath(file) for file in files], False
    if not files and outline is not None:
        plugins, strict = _installed(outline, findings), True
    anyio.run(_check_plugins, plugins, outline, strict, findings)
    _print(findings, as_json)
    return 1 if findings.faults else 0


def _check_config(explicit: Path | None, findings: Findings, *, needed: bool) -> Outline | None:
    """What the plugins can be held against, as far as the file says; None without a file."""
    try:
        path = config.find(explicit, os.environ)
    except UsageError:
        if needed or explicit is not None:
            raise
        return None
    try:
        settings = config.load(path)
        findings.checked.append(("config", str(path), _summary(settings)))
        findings.warnings += _warnings(settings) + check_computes.warnings_of(settings)
    except ConfigError as error:
        findings.checked.append(("config", str(path), ""))
        findings.faults += error.faults
    outline = config.outline(path)
    if outline is None and needed:
        findings.warnings.append("plugins are not checked: the config does not say where they are")
    return outline


def _summary(settings: Settings) -> str:
    parts = [(len(settings.datastores), "datastore"), (len(settings.compute), "compute"), (len(settings.pools), "pool")]
    return ", ".join(_count(n, what) for n, what in parts if n)


def _warnings(settings: Settings) -> list[str]:
    """What may be well at another time, or on another machine, and is not now on this one."""
    found = [
        f"the folder of datastore `{name}` is not there: `{datastore.path}`"
        for name, datastore in settings.datastores.items()
        if not datastore.path.is_dir()
    ]
    operators = settings.control.operators
    groups = [g for g in (settings.control.group, *(o[1:] for o in operators if o.startswith("@"))) if g is not None]
    users = [o for o in operators if not o.startswith("@")]
    unknown = [f"group `{name}`" for name in dict.fromkeys(groups) if not _exists(grp.getgrnam, name)]
    unknown += [f"user `{name}`" for name in dict.fromkeys(users) if not _exists(pwd.getpwnam, name)]
    found += [f"there is no {who} on this machine, which `[control]` names" for who in unknown]
    return found + _kept_out(settings.control.group, operators)


def _kept_out(group: str | None, operators: Sequence[str]) -> list[str]:
    """Operators whom the socket's mode keeps out: it is open to its one `group`."""
    if group is None:
        return (
            ["`operators` cannot reach the socket without `group`: name a group that they are in"] if operators else []
        )
    found = []
    for name in operators:
        try:
            if name.startswith("@"):
                inside = name[1:] == group or set(grp.getgrnam(name[1:]).gr_mem) <= set(grp.getgrnam(group).gr_mem)
            else:
                inside = grp.getgrnam(group).gr_gid in os.getgrouplist(name, pwd.getpwnam(name).pw_gid)
        except KeyError:
            continue  # named already
        if not inside:
            found.append(f"operator `{name}` cannot reach the socket: not in the group `{group}`")
    return found


def _exists(look_up: Any, name: str) -> bool:
    try:
        look_up(name)
    except KeyError:
        return False
    return True


def _installed(outline: Outline, findings: Findings) -> list[str]:
    found: list[str] = []
    for folder in outline.plugins:
        try:
            found += plugins_in(str(folder))
        except FileNotFoundError:
            findings.warnings.append(f"the plugins folder is not there: `{folder}`")
        except OSError as error:
            findings.faults.append(Fault(str(folder), 0, f"cannot be read: {(error.strerror or '').lower()}"))
    return found


async def _check_plugins(plugins: list[str], outline: Outline | None, strict: bool, findings: Findings) -> None:
    results: list[LoadResult | None] = [None] * len(plugins)
    known = Known(outline.datastores, outline.computes, outline.images, outline.clusters) if outline else None
    trusted = Trust(strict=strict, authors=_service(outline)) if strict else Trust()
    roots = [str(folder) for folder in outline.plugins] if outline and strict else []
    limiter = anyio.CapacityLimiter(AT_ONCE)

    async def one(index: int) -> None:
        async with limiter:
            results[index] = await load_file(
                plugins[index], known=known, check_cron=cron.check, trusted=trusted, roots=roots, plugins=plugins
            )

    async with anyio.create_task_group() as tasks:
        for index in range(len(plugins)):
            tasks.start_soon(one, index, name=f"check {plugins[index]}")
    _gather([result for result in results if result is not None], findings)


def _service(outline: Outline | None) -> frozenset[int]:
    """The user that the daemon runs as, told by its state folder: root may check in its place."""
    try:
        return frozenset({os.stat(outline.state_dir).st_uid}) if outline else frozenset()
    except OSError:
        return frozenset()


def _gather(results: list[LoadResult], findings: Findings) -> None:
    first: dict[str, str] = {}
    for result in results:
        described = []
        for spec in result.pipelines:
            steps, triggers = _count(len(spec.steps), "step"), _count(len(spec.triggers), "trigger")
            described.append(f"`{spec.name}` ({steps}, {triggers})")
            if spec.name in first:
                message = f"pipeline `{spec.name}` is defined in `{first[spec.name]}` already, which stays"
                findings.faults.append(
                    Fault(spec.where.file, spec.where.line, message, "give one of them another name")
                )
            first.setdefault(spec.name, result.path)
        if not described and not result.faults:
            described.append("no pipeline")
        findings.checked.append(("plugin", result.path, ", ".join(described)))
        findings.faults += result.faults
        if result.detail and result.faults:
            findings.details.append(f"{result.path}:\n{result.detail}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _print(findings: Findings, as_json: bool) -> None:
    for warning in findings.warnings:
        print(printable(f"warning: {warning}"), file=sys.stderr)
    if os.environ.get("MLPIPED_DEBUG"):
        for detail in findings.details:
            print(printable(detail), file=sys.stderr)
    if as_json:
        print(json.dumps(findings.as_json(), indent=2))
        return
    for kind, file, found in findings.checked:
        print(printable(f"{kind}  {file}" + (f"  {found}" if found else "")))
    for fault in findings.faults:
        print(printable(str(fault)))
    files = _count(len(findings.checked), "file")
    print(f"{_count(len(findings.faults), 'fault') if findings.faults else 'no faults'} in {files}")
