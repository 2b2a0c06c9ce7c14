"""The house keeps its shape: imports point only to a room of lower rank. Read from the source by `ast`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlpiped"

# room: (rank, its modules below `mlpiped`; "" is the package itself). Modules of one room may import each other; a
# package stands for all that is in it, less what is listed by a longer name.
ROOMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "errors": (0, ("errors",)),
    "crash points": (0, ("crash",)),
    "clock": (1, ("clock",)),
    "model": (1, ("model",)),
    "spec": (1, ("spec",)),
    "sdk": (1, ("", "sdk")),
    "systemd": (1, ("journal", "notify_systemd")),
    "config": (2, ("config",)),
    "logs": (2, ("logs",)),
    "log cap": (2, ("log_cap",)),
    "decisions": (2, ("keys", "resolve")),
    "paths and digests": (
        2,
        ("files", "files.hashing", "files.mounts", "files.portable", "files.roots", "files.walking"),
    ),
    "retention's rules": (2, ("retention", "retention.plan")),
    "spec check": (2, ("spec_check", "spec_cycles", "spec_images", "spec_places")),
    "publish": (2, ("publish",)),
    "protocol": (2, ("protocol",)),
    "backend seam": (
        2,
        (
            "backends",
            "backends.base",
            "backends.cards",
            "backends.environments",
            "backends.folder",
            "backends.host_cards",
            "backends.leases",
            "backends.memory_group",
            "backends.streams",
            "backends.supervisor",
            "backends.threads",
        ),
    ),
    "files": (3, ("artifacts", "code", "files.fingerprint", "files.references")),
    "ledger": (3, ("ledger",)),
    "loader": (3, ("loader",)),
    "triggers": (3, ("triggers",)),
    "local backend": (
        3,
        (
            "backends.launcher",
            "backends.local",
            "backends.processes",
        ),
    ),
    "docker backend": (3, ("backends.docker",)),
    "host keys": (3, ("backends.host_keys",)),
    "slurm backend": (3, ("backends.slurm",)),
    "fake backend": (3, ("backends.fake",)),
    "ssh backend": (3, ("backends.ssh",)),
    "placement": (3, ("placement",)),
    "one run": (4, ("execution",)),
    "all runs": (5, ("scheduling",)),
    "retention": (5, ("retention.artifacts", "retention.keeper", "retention.keeping", "retention.left_there")),
    "acts and questions": (6, ("actions", "inquiry", "live_logs")),
    "control": (6, ("control",)),
    "cli": (6, ("cli",)),
    "composition root": (7, ("daemon", "computes")),
    "admin's front door": (8, ("cli.admin", "cli.check")),  # starts the daemon, loads plugins
}
ONLY_IN = {  # third-party and database modules that one place keeps to itself
    "sqlite3": ("ledger",),
    "aiosqlite": ("ledger",),
    "pysqlite3": ("ledger",),
    "apscheduler": ("triggers",),
    "asyncssh": ("backends",),
    "aiodocker": ("backends",),
}
CLIENT_FORBIDDEN = ("pydantic", "asyncio", "anyio", "aiohttp", "sqlite3", "structlog")
BAD_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
LONGEST_MODULE = 450
LONGER = {"mlpiped.backends.supervisor": 500}  # one file, so that it can be sent to a host that has nothing of ours


@dataclass(frozen=True)
class Import:
    module: str  # who imports, dotted
    target: str  # what, dotted; a module of ours is named to the last part that is a module
    place: str  # file:line
    at_start: bool  # runs when the module is imported
    typing_only: bool


@cache
def sources() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package; templates are text, not code of ours."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "templates" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module in sources() for found in imports_of(module))


def imports_of(module: str) -> Iterator[Import]:
    path = sources()[module]
    relative = path.relative_to(ROOT)
    for node, at_start, typing_only in walk(ast.parse(path.read_text(encoding="utf-8")), True, False):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{relative}:{node.lineno}: relative import; write the whole name"
            base = node.module or ""
            targets = [name if (name := f"{base}.{alias.name}") in sources() else base for alias in node.names]
        for target in dict.fromkeys(targets):
            yield Import(module, target, f"{relative}:{node.lineno}", at_start, typing_only)


def walk(node: ast.AST, at_start: bool, typing_only: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_start, typing_only
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk(child, False, typing_only)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from walk(child, False, True)
        else:
            yield from walk(child, at_start, typing_only)


def ours(target: str) -> bool:
    return target.partition(".")[0] == "mlpiped"


@cache
def room_of(module: str) -> tuple[str, int] | None:
    """By the longest name in ROOMS that is the module or a package around it."""
    inner = module.removeprefix("mlpiped").removeprefix(".")
    best: tuple[int, str, int] | None = None
    for room, (rank, members) in ROOMS.items():
        for member in members:
            if inner == member or (member and inner.startswith(member + ".")):
                best = max(best or (-1, "", 0), (len(member), room, rank))
    return best and (best[1], best[2])


def reached_at_start(module: str) -> dict[str, Import | None]:
    """Every module, ours or not, that importing `module` imports, with the import that brings it first."""
    edges: dict[str, list[Import]] = {}
    for found in imports():
        if found.at_start:
            edges.setdefault(found.module, []).append(found)
    reached: dict[str, Import | None] = {module: None}
    todo = [module]
    while todo:
        name = todo.pop()
        parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)] if ours(name) else []
        for found in [*edges.get(name, ()), *(f for parent in parents for f in edges.get(parent, ()))]:
            if found.target not in reached:
                reached[found.target] = found
                todo.append(found.target)
    return reached


def no(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_every_module_has_a_room() -> None:
    no(
        [
            f"{path.relative_to(ROOT)}:1: `{module}` is in no room: give it a place in ROOMS of tests/test_layers.py"
            for module, path in sources().items()
            if room_of(module) is None
        ]
    )


def test_every_room_is_inhabited() -> None:
    named = {member for _, members in ROOMS.values() for member in members}
    present = {module.removeprefix("mlpiped").removeprefix(".") for module in sources()}
    no([f"tests/test_layers.py:1: ROOMS names `{name}`, which does not exist" for name in sorted(named - present)])


def test_imports_point_only_to_a_room_of_lower_rank() -> None:
    faults = []
    for found in imports():
        if not ours(found.target):
            continue
        here, there = room_of(found.module), room_of(found.target)
        if here and there and here[0] != there[0] and there[1] >= here[1]:
            faults.append(
                f"{found.place}: `{found.module}` ({here[0]}, rank {here[1]}) imports `{found.target}` "
                f"({there[0]}, rank {there[1]}): only a lower rank may be imported"
            )
    no(faults)


def test_every_import_of_ours_names_a_module_that_exists() -> None:
    no(
        [
            f"{found.place}: there is no module `{found.target}`"
            for found in imports()
            if ours(found.target) and found.target not in sources()
        ]
    )


def test_the_sdk_needs_nothing_but_the_standard_library_and_the_errors() -> None:
    faults = []
    for found in imports():
        room = room_of(found.module)
        if not room or room[0] != "sdk" or found.target.partition(".")[0] in sys.stdlib_module_names:
            continue
        target = room_of(found.target) if ours(found.target) else None
        if target is None or target[0] not in ("sdk", "errors"):
            faults.append(f"{found.place}: the SDK imports `{found.target}`: only the standard library, sdk and errors")
    no(faults)


def test_the_supervisor_of_a_step_runs_on_the_standard_library_alone() -> None:
    no(
        [
            f"{found.place}: the supervisor imports `{found.target}`: it is started without site-packages"
            for found in imports()
            if found.module in ("mlpiped.backends.supervisor", "mlpiped.backends.memory_group")
            and not found.typing_only
            and found.target.partition(".")[0] not in sys.stdlib_module_names
        ]
    )


def test_the_client_starts_without_the_heavy_libraries() -> None:
    assert "mlpiped.cli.ctl" in sources(), "mlpiped/cli/ctl.py:1: the client is missing"
    faults = []
    for target, found in reached_at_start("mlpiped.cli.ctl").items():
        if found is not None and target.partition(".")[0] in CLIENT_FORBIDDEN:
            faults.append(f"{found.place}: `mlpipectl` starts with `{target}`: import it in the verb that needs it")
    no(faults)


def test_what_one_room_keeps_to_itself_is_imported_nowhere_else() -> None:
    faults = []
    for found in imports():
        homes = ONLY_IN.get(found.target.partition(".")[0])
        if homes and not any(f"{found.module}.".startswith(f"mlpiped.{home}.") for home in homes):
            faults.append(f"{found.place}: `{found.target}` is for {' and '.join(homes)} alone")
    no(faults)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found in imports():
        if found.at_start and ours(found.target) and found.target != found.module:
            graph.setdefault(found.module, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = list(reversed(error.args[1]))
        first = next(f for f in imports() if f.module == circle[0] and f.target == circle[1])
        no([f"{first.place}: a circle of imports: {' -> '.join(circle)}"])


def test_no_module_is_named_after_nothing() -> None:
    no(
        [
            f"{path.relative_to(ROOT)}:1: `{module}` says nothing of its purpose: name it after what it does"
            for module, path in sources().items()
            if BAD_NAMES & set(module.rpartition(".")[2].split("_"))
        ]
    )


def test_no_module_is_too_long_to_be_read_at_once() -> None:
    faults = []
    for module, path in sources().items():
        count, most = len(path.read_text(encoding="utf-8").splitlines()), LONGER.get(module, LONGEST_MODULE)
        if count > most:
            faults.append(f"{path.relative_to(ROOT)}:{most}: {count} lines, at most {most}: split it by purpose")
    no(faults)


def test_the_walk_finds_what_it_must() -> None:
    """The guard itself: a lazy import, one for types alone, one in a try block."""
    text = "try:\n import a\nexcept E:\n import b\nif TYPE_CHECKING:\n import c\ndef f():\n import d\n"
    found = {node.names[0].name: rest for node, *rest in walk(ast.parse(text), True, False)}
    assert found == {"a": [True, False], "b": [True, False], "c": [False, True], "d": [False, False]}
