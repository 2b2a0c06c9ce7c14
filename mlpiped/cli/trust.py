"""`mlpiped trust NAME`: look at the host key of a box, compare it, keep it. Nothing connects to a box before."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import anyio

from mlpiped.backends import host_keys
from mlpiped.cli.front import printable
from mlpiped.config.computes import SshCompute
from mlpiped.errors import Conflict, UnknownName, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from mlpiped.config.settings import Settings


def trust(settings: Settings, name: str, *, yes: bool) -> int:
    """0 when the key is trusted now. Raises Conflict when another one is: that may be somebody in between."""
    boxes = {n: compute for n, compute in settings.compute.items() if isinstance(compute, SshCompute)}
    if name not in boxes:
        if name in settings.compute:
            raise UsageError(f"compute `{name}` has no host key: its kind is `{settings.compute[name].kind}`")
        raise UnknownName.among("box", name, boxes)
    compute = boxes[name]
    path = known_hosts_of(settings, compute)
    if not path.parent.is_dir():
        raise UsageError(f"no folder for the host keys: `{path.parent}`", hint="start the daemon once: it makes it")
    box = anyio.run(host_keys.box_of, compute)
    key = anyio.run(host_keys.shown_by, compute)
    before = host_keys.trusted(path, box)
    shown = f"{box.patterns()[0]} shows {key.algorithm} {key.fingerprint}"
    if key in before:
        print(printable(f"{shown}, which is trusted already"))
        return 0
    same_kind = [one for one in before if one.algorithm == key.algorithm]
    if same_kind:
        gone = " and ".join(f"`ssh-keygen -R '{pattern}' -f {path}`" for pattern in box.patterns())
        hint = f"if it was installed anew: {gone}, then this again; if not, find out who answers in its place"
        raise Conflict(
            f"{shown}, and {same_kind[0].fingerprint} is trusted: the host key of `{name}` changed", hint=hint
        )
    print(printable(shown))
    _confirm(key.algorithm, yes=yes)
    host_keys.trust(path, box, key)
    print(printable(f"trusted: written to {path}"))
    return 0


def known_hosts_of(settings: Settings, compute: SshCompute) -> Path:
    return compute.known_hosts or settings.daemon.state_dir / "known_hosts"


def _confirm(algorithm: str, *, yes: bool) -> None:
    if yes:
        return
    kind = algorithm.removeprefix("ssh-").split("-")[0]
    print(f"compare it with `ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub`, run on the box", file=sys.stderr)
    if not sys.stdin.isatty():
        raise UsageError("not trusted: nobody is here to compare it", hint="compare it, then give --yes")
    print("trust it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Conflict("not trusted")
