"""Which folders and files of the host a container sees, each at its own path. Pure.

The job's folder, to write. The step's inputs, the SDK and what the config allows, to read (and `:rw` what the config
says so). Nothing else: no job can name a mount.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mlpiped.errors import InvalidJob

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MOST = 100  # mounts of inputs; with more, a folder stands for the inputs in it
NEAREST = 2  # a folder so near to the root stands for nothing: `/data/lab` may, `/data` may not


def plan(
    folder: str,
    readable: Iterable[str],
    inputs: Iterable[str],
    allowed: Sequence[str],
    mounted: Sequence[str],
    closed: str,
) -> list[dict[str, Any]]:
    """The engine's `Mounts`. `readable`: single files and folders of ours; `allowed`: as in the config.

    `mounted` are the host's mount points: what is mounted below something read-only is not read-only by that, and gets
    a mount of its own. `closed` is the daemon's own folder, which never stands for inputs that lie in it. Raises
    InvalidJob for inputs that cannot be mounted.
    """
    targets: dict[str, bool] = {}  # path -> to write
    for text in allowed:
        targets[os.path.normpath(text.removesuffix(":rw"))] = text.endswith(":rw")
    reading = {*readable, *_few(inputs, closed)}
    targets.update(dict.fromkeys(reading, False))
    for point in mounted:
        if point not in targets and any(_below(point, path) for path, writable in targets.items() if not writable):
            targets[point] = False
    targets[folder] = True
    for path in targets:
        if not _is_text(path):
            raise InvalidJob(f"a container cannot see a path that is no UTF-8 text: {os.fsencode(path)!r}")
    return [
        {"Type": "bind", "Source": path, "Target": path, "ReadOnly": not writable}
        for path, writable in sorted(targets.items())
    ]


def _few(inputs: Iterable[str], closed: str) -> set[str]:
    """At most MOST paths, in or below which all inputs lie; the deepest folders stand first."""
    paths = {os.path.normpath(path) for path in inputs}
    while len(paths) > MOST:
        depth = max(path.count("/") for path in paths)
        folders = {os.path.dirname(path) if path.count("/") == depth else path for path in paths}
        for folder in folders - paths:
            if folder.count("/") < NEAREST or folder == closed or closed.startswith(f"{folder}/"):
                raise InvalidJob(
                    f"{len(paths)} inputs in too many places for one container",
                    hint=f"put them below one folder, and take that as the input: `{folder}` is too much of the host",
                )
        paths = folders
    return {path for path in paths if not any(path != other and _below(path, other) for other in paths)}


def mount_points(text: str) -> list[str]:
    """Of /proc/self/mountinfo."""
    found = []
    for line in text.splitlines():
        path = line.split(" ")[4]
        for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            path = path.replace(code, character)
        found.append(path)
    return found


def _below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder.rstrip('/')}/")


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
