"""The script of DataTransferStep: `transfer.py --file|--folder SOURCE… DESTINATION`. Standard library only.

--file: one file to DESTINATION. --folder: the content of one folder, or files below the folder that they share.
"""

from __future__ import annotations

import os
import shutil
import sys


def main(arguments: list[str]) -> int:
    if len(arguments) < 3 or arguments[0] not in ("--file", "--folder"):
        return fail("usage: transfer.py --file|--folder SOURCE... DESTINATION")
    kind, *sources, destination = arguments
    try:
        if kind == "--folder":
            return copy_into(sources, destination)
        if len(sources) != 1:
            return fail(f'{len(sources)} files cannot be copied to one: use kind="folder"')
        if os.path.isdir(sources[0]):
            return fail(f'{sources[0]} is a folder: use kind="folder"')
        copy(sources[0], destination)
    except OSError as error:
        return fail(f"{error.filename or destination}: {error.strerror}")
    return 0


def copy_into(sources: list[str], destination: str) -> int:
    shared = sources[0] if len(sources) == 1 else os.path.commonpath([os.path.dirname(one) for one in sources])
    if not os.path.isdir(shared):
        shared = os.path.dirname(shared)
    root = os.path.realpath(shared)
    os.makedirs(destination, exist_ok=True)
    for source in sources:
        for path in files_below(source):
            # A link that leads out of what was asked for would copy what nobody named.
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                return fail(f"{path} is a link that leads out of {shared}")
            copy(path, os.path.join(destination, os.path.relpath(path, shared)))
    return 0


def files_below(source: str) -> list[str]:
    if not os.path.isdir(source):
        return [source]
    found = []
    for folder, folders, names in os.walk(source):
        folders.sort()
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                raise OSError(0, "a link to a folder is not copied", os.path.join(folder, name))
        found += [os.path.join(folder, name) for name in sorted(names)]
    return found


def copy(source: str, destination: str) -> None:
    os.makedirs(os.path.dirname(destination), exist_ok=True)
    shutil.copyfile(source, destination)
    os.chmod(destination, 0o755 if os.access(source, os.X_OK) else 0o644)


def fail(sentence: str) -> int:
    sys.stderr.write(f"transfer: {sentence}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
