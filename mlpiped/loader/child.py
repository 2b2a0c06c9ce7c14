"""The child process in which one plugin file is imported. Standard library only; run as a script by `python -I`.

Told by argv[1] (JSON, see `load._order`), it reads the plugin's bytes from stdin, so that what was checked and
hashed is what is executed. It answers in frames on a pipe of its own: 4 bytes of length, then JSON.

    {"kind": "file", "path": …, "digest": …}    a file of the author's was read, sent before it is executed
    {"kind": "result", "imported": bool, "pipelines": ["{…}"], "faults": [{…}], "absent": […], "detail": "…"}

This keeps accidents away from the daemon. It is no wall against malice: an author's code runs as the service.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import traceback
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_SPARE_MEMORY = 64 << 20  # kept back so that running out of memory can be told
_LONGEST_MESSAGE = 400
_LONGEST_DETAIL = 16 << 10


class Child:
    """One load. `order` is what the parent asked for."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.path: str = order["path"]
        self.folder: str = order["folder"]
        self.roots = tuple(root.rstrip("/") + "/" for root in {self.folder, *order["roots"]})
        package = os.path.join(order["home"], "mlpiped")
        installed = {one.rstrip("/") + "/" for one in [*sys.path, package] if one}
        self.foreign = tuple(one for one in installed if not (self.folder + "/").startswith(one))
        self.pid = os.getpid()
        self.source = b""
        self.sent: set[str] = set()
        self.opened: set[str] = set()
        self.watching = True

    # --- what the parent is told -------------------------------------------------------------------------
    def send(self, frame: dict[str, Any]) -> None:
        if os.getpid() != self.pid:
            os._exit(0)  # a fork of the plugin's that came back out of the import
        data = json.dumps(frame, allow_nan=False).encode()
        view = memoryview(len(data).to_bytes(4, "big") + data)
        while view:
            view = view[os.write(self.order["result_fd"], view) :]

    def read(self, path: str, data: bytes) -> None:
        """Tell that `path` is part of the plugin, before anything of it can go wrong."""
        path = os.path.abspath(path)
        if path not in self.sent:
            self.sent.add(path)
            self.send({"kind": "file", "path": path, "digest": hashlib.sha256(data).hexdigest()})

    def ours(self, path: str) -> bool:
        return path.startswith(self.roots) and not path.startswith(self.foreign)

    # --- before the import -------------------------------------------------------------------------------
    def prepare(self) -> None:
        limits = self.order["limits"]
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, limits["cpu"])
        _limit(resource.RLIMIT_FSIZE, limits["file_size"])
        _limit(resource.RLIMIT_AS, limits["memory"], limits["memory"] + _SPARE_MEMORY)
        if limits["processes"] is not None:
            _limit(resource.RLIMIT_NPROC, limits["processes"])
        signal.setitimer(signal.ITIMER_REAL, limits["deadline"] + 2)  # should the parent die before us
        self._tell_where_it_hangs(limits["deadline"])
        with open(0, "rb", closefd=False) as stdin:
            self.source = stdin.read()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        sys.dont_write_bytecode = True
        sys.path.insert(0, self.order["home"])
        import mlpiped  # noqa: F401 - the daemon's own, whatever else of that name is installed or lies about

        sys.path[:] = self._search_path(sys.path[1:])
        sys.path_hooks.insert(0, self._finder)
        sys.addaudithook(self._audit)

    def _tell_where_it_hangs(self, deadline: float) -> None:
        import faulthandler

        faulthandler.enable(self.order["trace_fd"])
        faulthandler.dump_traceback_later(max(deadline - 0.3, deadline * 0.8), file=self.order["trace_fd"])

    def _search_path(self, path: list[str]) -> list[str]:
        """Standard library, the plugin's folder, installed packages: a neighbour called `json.py` harms nobody."""
        site = [one for one in path if one.rstrip("/").endswith(("site-packages", "dist-packages"))]
        standard = [one for one in path if one not in site]
        search = list(dict.fromkeys([self.order["search"], self.folder]))
        return [*standard, *search, *site, self.order["home"]]

    def _finder(self, path: str) -> importlib.machinery.FileFinder:
        if not self.ours(os.path.abspath(path) + "/"):
            raise ImportError("not a folder of the author's")
        extensions = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
        return importlib.machinery.FileFinder(path, extensions, (_loader_for(self), [".py"]))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Files of the author's folder that the plugin opens to read belong to its definition."""
        if event != "open" or not self.watching or not isinstance(arguments[0], (str, bytes)):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR) if isinstance(arguments[2], int) else 0
        if not writes and self.ours(path) and len(self.opened) < 1000:
            self.opened.add(path)

    # --- the import --------------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        from mlpiped.sdk import lowering, pipeline, place

        place.folder = self.folder
        faults: list[dict[str, Any]] = []
        plain: list[str] = []  # JSON in JSON: whoever reads the frame need not hold a large pipeline twice
        detail = ""
        imported = False
        try:
            module = self._execute()
            imported = True
            for found in self._pipelines(module, pipeline.Pipeline, faults):
                data, problems = lowering.lower(found)
                faults += [self._definition(problem, found.name) for problem in problems]
                if not problems:
                    plain.append(json.dumps(data, allow_nan=False))
        except BaseException as error:
            imported = False
            plain = []
            faults, detail = self._failed(error)
        self.watching = False
        for path in sorted(self.opened | place.reads):
            self._read_again(path)
        return {
            "kind": "result",
            "imported": imported,
            "pipelines": plain,
            "faults": faults,
            "absent": sorted(place.absent | self.absent),
            "detail": detail[-_LONGEST_DETAIL:],
        }

    absent: frozenset[str] | set[str] = frozenset()

    def _read_again(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                if os.path.isfile(path) and os.path.getsize(path) <= self.order["limits"]["source"]:
                    self.read(path, file.read())
        except OSError:
            pass

    def _execute(self) -> types.ModuleType:
        name: str = self.order["name"]
        self.read(self.path, self.source)
        loader = _loader_for(self)(name, self.path)
        locations = [self.folder] if self.order["package"] else None
        spec = importlib.util.spec_from_file_location(
            name, self.path, loader=loader, submodule_search_locations=locations
        )
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        code = loader.get_code(name)
        assert code is not None
        exec(code, module.__dict__)
        return module

    def _pipelines(self, module: types.ModuleType, kind: type[Any], faults: list[dict[str, Any]]) -> list[Any]:
        """The module-level pipelines, in order, less those that another plugin file holds and this one imported."""
        from mlpiped.sdk.data import DataReference

        elsewhere = {
            id(value)
            for other in list(sys.modules.values())
            if other is not module
            and isinstance(other, types.ModuleType)
            and vars(other).get("__file__") in self.order["plugins"]
            for value in list(vars(other).values())
            if isinstance(value, kind)
        }
        found: dict[str, Any] = {}
        for variable, value in list(vars(module).items()):
            if isinstance(value, DataReference) and value.variable is None:
                value.variable = _name_of(variable)
            if not isinstance(value, kind) or id(value) in elsewhere:
                continue
            other = found.setdefault(value.name, value)
            if other is not value:
                lines = f"lines {other.where[1]} and {value.where[1]}"
                message = f"two pipelines are named `{value.name}`: {lines}"
                faults.append({"file": value.where[0], "line": value.where[1], "message": message})
        return list(found.values())

    # --- what went wrong ---------------------------------------------------------------------------------
    def _definition(self, error: Any, pipeline: str | None) -> dict[str, Any]:
        file, line = error.where
        return {"file": file, "line": line, "message": error.message, "hint": error.hint, "pipeline": pipeline}

    def _failed(self, error: BaseException) -> tuple[list[dict[str, Any]], str]:
        from mlpiped.sdk.errors import DefinitionError

        for what in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
            hard = resource.getrlimit(what)[1]
            resource.setrlimit(what, (hard, hard))  # room to tell
        if isinstance(error, MemoryError):
            file, line = self._innermost(error)
            limit = self.order["limits"]["memory"] / 2**30
            message = f"ran out of memory: the limit is {limit:.1f} GiB"
            return [{"file": file, "line": line, "message": message, "hint": _HINT}], ""
        detail = _guarded(lambda: "".join(traceback.format_exception(error)), "")
        if isinstance(error, DefinitionError):
            return [self._definition(one, None) for one in (error, *error.more)], detail
        file, line = self._innermost(error)
        hint = None
        if isinstance(error, SyntaxError) and error.filename and self.ours(os.path.abspath(error.filename)):
            file, line, message = error.filename, error.lineno or 0, f"syntax error: {error.msg}"
        elif isinstance(error, SystemExit):
            message, hint = f"calls `sys.exit`: {_guarded(lambda: repr(error.code), '?')}", _HINT
        elif isinstance(error, ModuleNotFoundError) and error.name:
            message = f"no module named `{error.name}`"
            hint = "a plugin only describes steps: what a step needs is imported in its script"
            self.absent = self._might_appear(error.name)
        else:
            text = _guarded(lambda: str(error), "")
            hint = _near(error, text)
            message = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return [{"file": file, "line": line, "message": _one_line(message), "hint": hint}], detail

    def _innermost(self, error: BaseException) -> tuple[str, int]:
        """The innermost frame in the author's files."""
        place = (self.path, 0)
        step = error.__traceback__
        while step is not None:
            file = step.tb_frame.f_code.co_filename
            if self.ours(os.path.abspath(file)):
                place = (file, step.tb_lineno or 0)
            step = step.tb_next
        return place

    def _might_appear(self, name: str) -> set[str]:
        """Where the missing module would be, were it put beside the plugin."""
        parts = name.split(".")
        if parts[0] == self.order["name"] and self.order["package"]:
            parts = parts[1:]
        ends = [os.path.join(*parts[: n + 1]) for n in range(len(parts))]
        folders = {self.order["search"], self.folder}
        paths = {
            os.path.join(folder, end + tail) for folder in folders for end in ends for tail in (".py", "/__init__.py")
        }
        return {path for path in paths if not os.path.exists(path)}


_HINT = "a plugin only describes steps: work belongs in a step's script"


def _near(error: BaseException, text: str) -> str | None:
    """A hint for a misspelt keyword of ours, or a misspelt name that is imported from us."""
    import difflib
    import inspect
    import re

    import mlpiped
    from mlpiped.sdk import steps

    found = re.search(r"(?:(\w+)\.)?__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if isinstance(error, TypeError) and found:
        of_steps = [steps.PythonScriptStep, steps.CommandStep, steps.DataTransferStep, steps.Step]
        kinds = of_steps if found[1] == "Step" else [getattr(mlpiped, found[1] or "", None)]
        names = [name for kind in kinds if isinstance(kind, type) for name in inspect.signature(kind).parameters]
        word = found[2]
    elif isinstance(error, ImportError) and error.name == "mlpiped":
        word = getattr(error, "name_from", None) or (re.search(r"import name '(\w+)'", text) or ("", ""))[1]
        names = list(mlpiped.__all__)
    else:
        return None
    near = difflib.get_close_matches(word, dict.fromkeys(names), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else None


def _loader_for(child: Child) -> type[importlib.machinery.SourceFileLoader]:
    """A loader that never uses a stale .pyc, tells each file before executing it, and reads the plugin from memory."""

    class Loader(importlib.machinery.SourceFileLoader):
        def get_code(self, fullname: str) -> types.CodeType:
            path = os.path.abspath(self.path)
            data = child.source if path == child.path else self._bytes(path)
            child.read(path, data)
            return _compiled(data, path)

        def _bytes(self, path: str) -> bytes:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                if child.order["strict"] and mode & 0o002:
                    raise ImportError(f"everybody may write `{path}`: chmod o-w {path}")
                return file.read()

    return Loader


def _compiled(data: bytes, path: str) -> types.CodeType:
    try:
        importlib.util.decode_source(data)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SyntaxError(f"not {error.encoding} text", (path, line, None, None)) from None
    except SyntaxError as error:  # of its first two lines, which may name an encoding: it does not say whose they are
        raise SyntaxError(error.msg, (path, 1, None, None)) from None
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise SyntaxError("it holds a NUL", (path, line, None, None))
    code: types.CodeType = compile(data, path, "exec", dont_inherit=True)
    return code


def _limit(what: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit; one that is lower already stays."""
    ceiling = resource.getrlimit(what)[1]
    if hard is None:
        hard = soft + 1 if what == resource.RLIMIT_CPU else soft
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(what, (soft, hard))


def _name_of(variable: str) -> str | None:
    name = variable.strip("_")[:64]
    return name if name and name.isascii() and name[0].isalnum() else None


def _guarded(ask: Callable[[], str], otherwise: str) -> str:
    """What the author's own `__str__` says, if it says anything."""
    try:
        return ask()
    except BaseException:
        return otherwise


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 1] + "…"


def main() -> None:
    child = Child(json.loads(sys.argv[1]))
    child.prepare()
    sys.argv[:] = [child.path]
    result = child.run()
    for stream in (sys.stdout, sys.stderr):
        _guarded(lambda stream=stream: str(stream.flush()), "")  # type: ignore[misc]
    child.send(result)
    os._exit(0)  # threads, atexit handlers and destructors of the plugin's have no say


if __name__ == "__main__":
    main()
