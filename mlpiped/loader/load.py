"""One plugin file -> its specs, or its faults with the author's line. Nothing that the file does reaches the caller."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import stat
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from pydantic import ValidationError

from mlpiped.errors import Fault
from mlpiped.loader import trust
from mlpiped.loader.process import Ended, Limits, run_child
from mlpiped.spec import PipelineSpec
from mlpiped.spec_check import faults_of
from mlpiped.spec_images import with_images

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from mlpiped.spec_check import CheckCron
    from mlpiped.spec_images import Images

ABSENT = ""
"""The digest of what is not there."""

_HOME = str(Path(__file__).resolve().parent.parent.parent)
_CHILD = str(Path(__file__).resolve().parent / "child.py")
_TRIES = 3
_PAUSE = 0.1  # seconds
_PLACE = re.compile(r'File "(.+)", line (\d+) in ')
_WORK_BELONGS = "a plugin only describes steps: work belongs in a step's script"


@dataclass(frozen=True, slots=True)
class Known:
    """The names that a config gives; None: not checked. `computes` includes pools; `images`: see `spec_images`, and
    `clusters`: see `spec_check`."""

    datastores: Collection[str] | None = None
    computes: Collection[str] | None = None
    images: Images | None = None
    clusters: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What loading one file gave.

    `pipelines` are those without a fault. `named` are all that the file is known to define; `imported` is False when
    the import failed, so that it is not known. `files` maps every file of the author's that took part to its sha256
    (ABSENT: looked for in vain): the result holds for as long as these do. `refused`: not even tried, look again;
    `restless`: because it never held still. `detail` is for the log: the traceback, and what the file printed.
    """

    path: str
    pipelines: tuple[PipelineSpec, ...] = ()
    faults: tuple[Fault, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    imported: bool = False
    named: frozenset[str] = frozenset()
    refused: bool = False
    restless: bool = False
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Trust:
    """Which rules of `trust` hold: none for a file that its asker wrote and runs as himself."""

    strict: bool = False
    authors: frozenset[int] = frozenset()


async def load_file(
    path: str | os.PathLike[str],
    *,
    known: Known | None = None,
    check_cron: CheckCron | None = None,
    limits: Limits | None = None,
    trusted: Trust | None = None,
    roots: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> LoadResult:
    """Import the plugin `path` (a file, or a folder with `__init__.py`) in a child process and check what it defines.

    `roots` are folders whose files count as the author's besides the plugin's own; `plugins` are the other plugin
    files, whose pipelines are theirs even where this one imports them. Raises nothing but OSError of the daemon's own
    (no process, no descriptor).
    """
    known = known or Known()
    folders = [_absolute(one) for one in roots]
    raw = await _load(_absolute(path), limits or Limits(), trusted or Trust(), folders, plugins)
    return await anyio.to_thread.run_sync(checked, raw, known, check_cron)


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.fspath(path))


def checked(raw: LoadResult, known: Known, check_cron: CheckCron | None) -> LoadResult:
    """`raw`, its pipelines parted into those without a fault, as they run here, and the faults of the others."""
    good: list[PipelineSpec] = []
    faults = list(raw.faults)
    for spec in raw.pipelines:
        found = faults_of(spec, known.datastores, known.computes, check_cron, known.images, known.clusters)
        faults += found
        if not found:
            good.append(with_images(spec, known.images))
    return replace(raw, pipelines=tuple(good), faults=tuple(faults))


def digest_of(path: str, most: int = 4 << 20) -> str:
    """sha256 of a regular file; ABSENT; else a word for what is there."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return ABSENT
    except OSError as error:
        return f"!{error.errno}"
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return "!other"
        hashed = hashlib.sha256()
        while most >= 0 and (data := os.read(file, 1 << 20)):
            hashed.update(data)
            most -= len(data)
        return hashed.hexdigest()
    except OSError as error:
        return f"!{error.errno}"
    finally:
        os.close(file)


async def _load(path: str, limits: Limits, trusted: Trust, roots: Sequence[str], plugins: Sequence[str]) -> LoadResult:
    """Load until the files held still meanwhile: what is returned is one state of them, not half of two."""
    for _ in range(_TRIES):
        try:
            order, source = await anyio.to_thread.run_sync(_open, path, limits, trusted, roots, plugins)
            ended = await run_child(_command(order), source, order["folder"], limits)
        except trust.Refused as refusal:
            shown = path.encode(errors="backslashreplace").decode()
            return LoadResult(path, faults=(Fault(shown, 0, refusal.message, refusal.hint),), refused=True)
        except FileNotFoundError:
            return LoadResult(path, faults=(Fault(path, 0, "no such file"),), refused=True)
        result = await anyio.to_thread.run_sync(_result, path, order, ended, limits)
        if await anyio.to_thread.run_sync(_held_still, result.files):
            return result
        await anyio.sleep(_PAUSE)
    fault = Fault(path, 0, "changes all the time while it is loaded")
    return LoadResult(path, faults=(fault,), refused=True, restless=True)


def _held_still(files: Mapping[str, str]) -> bool:
    return all(digest_of(path) == digest for path, digest in files.items())


def _open(
    path: str, limits: Limits, trusted: Trust, roots: Sequence[str], plugins: Sequence[str]
) -> tuple[dict[str, Any], bytes]:
    """What the child is asked to do, and the plugin's bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise trust.Refused("its name is not UTF-8", "rename it") from None
    package = os.path.isdir(path)
    if package and not os.path.isfile(os.path.join(path, "__init__.py")):
        raise trust.Refused("a folder without `__init__.py` is no plugin")
    file = os.path.join(path, "__init__.py") if package else path
    folder = os.path.dirname(file)
    if trusted.strict:
        trust.check_folders(folder, trusted.authors)
    source, found = trust.read_plugin(file, limits.source)
    if trusted.strict:
        trust.check_file(file, found)
    # A file must not stand in for what it imports (`digits.py` beside `digits/`); a package needs its own name.
    name = os.path.basename(path) if package else "plugin_" + re.sub(r"\W", "_", os.path.basename(path))
    if name in sys.stdlib_module_names or name == "mlpiped":
        raise trust.Refused(f"its name is that of another package: `{name}`", "rename it")
    order = {
        "path": file,
        "folder": folder,
        "search": os.path.dirname(path),
        "package": package,
        "name": name,
        "home": _HOME,
        "roots": list(roots),
        "plugins": [one for one in plugins if one != file],
        "strict": trusted.strict,
        "limits": {
            "deadline": limits.deadline,
            "memory": limits.memory,
            "cpu": limits.cpu,
            "file_size": limits.file_size,
            "processes": limits.processes,
            "source": limits.source,
        },
    }
    return order, source


def _command(order: dict[str, Any]) -> Callable[[int, int], Sequence[str]]:
    def command(result_fd: int, trace_fd: int) -> Sequence[str]:
        asked = json.dumps({**order, "result_fd": result_fd, "trace_fd": trace_fd})
        return [sys.executable, "-I", "-X", "utf8", _CHILD, asked]

    return command


def _result(path: str, order: dict[str, Any], ended: Ended, limits: Limits) -> LoadResult:
    files = {str(one["path"]): str(one["digest"]) for one in ended.frames if "path" in one and "digest" in one}
    printed = (ended.stdout + ended.stderr).decode(errors="replace")
    answer = ended.result
    if answer is None or not _well_formed(answer):
        fault = _ended_badly(order, ended, limits)
        return LoadResult(path, faults=(fault,), files=files, detail=(ended.trace + printed)[-(16 << 10) :])
    files.update({str(one): ABSENT for one in answer["absent"]})
    faults = [_fault(one, path) for one in answer["faults"]]
    named = {str(one["pipeline"]) for one in answer["faults"] if one.get("pipeline")}
    specs: list[PipelineSpec] = []
    for plain in answer["pipelines"]:
        try:
            specs.append(PipelineSpec.model_validate_json(plain))
            named.add(specs[-1].name)
        except ValidationError as error:
            misshapen = _parsed(plain)
            if isinstance(misshapen.get("name"), str):
                named.add(misshapen["name"])
            faults += _misshapen(misshapen, path, error)
    return LoadResult(
        path,
        tuple(specs),
        tuple(faults),
        files,
        answer["imported"],
        frozenset(named),
        detail=(answer["detail"] + printed)[-(32 << 10) :],
    )


def _well_formed(answer: dict[str, Any]) -> bool:
    return (
        isinstance(answer.get("imported"), bool)
        and isinstance(answer.get("detail"), str)
        and all(isinstance(answer.get(key), list) for key in ("pipelines", "faults", "absent"))
        and all(isinstance(one, dict) for one in answer["faults"])
    )


def _fault(plain: Mapping[str, Any], path: str) -> Fault:
    line = plain.get("line")
    hint = plain.get("hint")
    return Fault(
        str(plain.get("file") or path),
        line if isinstance(line, int) else 0,
        str(plain.get("message") or "something is wrong"),
        str(hint) if hint else None,
    )


def _parsed(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _misshapen(plain: dict[str, Any], path: str, error: ValidationError) -> list[Fault]:
    where = plain.get("where")
    where = where if isinstance(where, dict) else {}
    return [
        _fault(
            {
                "file": where.get("file"),
                "line": where.get("line"),
                "message": f"{'.'.join(str(part) for part in one['loc'])}: {one['msg'].lower()}",
            },
            path,
        )
        for one in error.errors(include_url=False, include_input=False)[:20]
    ]


def _ended_badly(order: dict[str, Any], ended: Ended, limits: Limits) -> Fault:
    """The fault of a child that gave no result; the line, where its interpreter could still tell one."""
    file, line = order["path"], 0
    for found in _PLACE.finditer(ended.trace):
        if found[1].startswith(order["folder"] + "/"):
            file, line = found[1], int(found[2])
            break
    if ended.timed_out:
        return Fault(file, line, f"still loading after {limits.deadline:g} s", _WORK_BELONGS)
    if ended.too_large:
        return Fault(file, line, f"what it defines is larger than {limits.result >> 20} MiB")
    code = ended.returncode
    if code is not None and code < 0:
        if -code == signal.SIGXCPU:
            return Fault(file, line, f"used more than {limits.cpu} s of processor time", _WORK_BELONGS)
        return Fault(file, line, f"crashed the interpreter: {_signal_name(-code)}")
    return Fault(file, line, f"ended the interpreter before it was loaded: exit status {code}", _WORK_BELONGS)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
