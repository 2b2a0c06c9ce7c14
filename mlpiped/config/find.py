"""Where the config file is, and which socket it names: cheap enough for `mlpipectl`, which may not load the models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mlpiped.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

SYSTEM = Path("/etc/mlpiped/mlpiped.toml")
RUNTIME_DIR = Path("/run/mlpiped")
SOCKET_NAME = "control.sock"
LONGEST_SOCKET = 107  # bytes of a Unix socket's path; sun_path is 108 with its end


def find(explicit: Path | None, env: Mapping[str, str]) -> Path:
    """The config file in use: `--config`, `$MLPIPED_CONFIG`, the system's. Raises UsageError when it is not there."""
    named = str(explicit) if explicit is not None else env.get("MLPIPED_CONFIG")
    path = Path(named) if named else SYSTEM
    if path.is_dir():
        path = path / "mlpiped.toml"
    if path.exists():
        return path
    if explicit is not None:
        raise UsageError(f"no config file at `{path}`", hint="`mlpiped init DIR` makes a folder with one that works")
    if named:
        raise UsageError(
            f"no config file at `{path}`, which $MLPIPED_CONFIG names", hint="correct the variable or unset it"
        )
    raise UsageError(
        f"no config file: `{SYSTEM}` does not exist, and neither --config nor $MLPIPED_CONFIG is given",
        hint="`mlpiped init DIR` makes a folder with one that works",
    )


def below(base: Path, path: str | Path) -> Path:
    """`path` as a config file in folder `base` means it: absolute, `~` expanded, `..` resolved by name alone.

    Raises RuntimeError for the home of a user that does not exist.
    """
    return Path(os.path.normpath(base / Path(path).expanduser()))


def socket_of(config: Path) -> Path:
    """The control socket that this config file names. Knows no fault: what cannot be read means the default."""
    import tomllib

    try:
        raw = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raw = {}
    base = Path(os.path.abspath(config)).parent
    control, daemon = raw.get("control"), raw.get("daemon")
    socket = control.get("socket") if isinstance(control, dict) else None
    runtime = daemon.get("runtime_dir") if isinstance(daemon, dict) else None
    try:
        if isinstance(socket, str):
            return below(base, socket)
        return (below(base, runtime) if isinstance(runtime, str) else RUNTIME_DIR) / SOCKET_NAME
    except RuntimeError:
        return RUNTIME_DIR / SOCKET_NAME
