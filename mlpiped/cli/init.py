"""`mlpiped init DIR`: a folder in which a daemon works at once."""

from __future__ import annotations

import os
import shlex
import shutil
from importlib import resources
from pathlib import Path

from mlpiped.config.find import LONGEST_SOCKET, SOCKET_NAME
from mlpiped.errors import Conflict, UsageError


def init(folder: Path) -> int:
    """Writes the template's files below `folder`, made if need be. Never replaces a file."""
    folder = Path(os.path.abspath(folder))
    socket = folder / "run" / SOCKET_NAME
    if len(os.fsencode(socket)) > LONGEST_SOCKET:
        raise UsageError(f"the path is too long for a socket in it: `{folder}`", hint="choose a folder nearer to /")
    with resources.as_file(resources.files("mlpiped.cli") / "templates" / "init") as template:
        files = sorted(_files(template))
        present = [folder / file for file in files if os.path.lexists(folder / file)]
        if present:
            raise Conflict(
                f"`{present[0]}` exists already, and nothing is ever replaced", hint="name a new or an empty folder"
            )
        try:
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(template / file, folder / file)
        except OSError as error:
            raise UsageError(f"cannot write `{error.filename or folder}`: {(error.strerror or '').lower()}") from None
    _tell(folder, socket)
    return 0


def _files(template: Path) -> list[Path]:
    return [p.relative_to(template) for p in template.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def _tell(folder: Path, socket: Path) -> None:
    print(f"{folder}/")
    for name, purpose in (
        ("mlpiped.toml", "the config"),
        ("plugins/readings.py", "an example pipeline; its scripts lie in plugins/readings/"),
        ("data/incoming/", "the datastore's folder that it watches"),
    ):
        print(f"  {name:<22} {purpose}")
    print("\nnext:")
    print(f"  mlpiped serve --config {shlex.quote(str(folder / 'mlpiped.toml'))}")
    print("and in another terminal, to see the run, and to let new data arrive:")
    print(f"  MLPIPED_SOCKET={shlex.quote(str(socket))} mlpipectl status")
    print(f"  cp {shlex.quote(str(folder / 'data/later/tuesday.csv'))} {shlex.quote(str(folder / 'data/incoming'))}/")
