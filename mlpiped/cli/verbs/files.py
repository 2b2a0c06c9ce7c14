"""`get`: an output out of the store, copied when this user may read it where it lies, else sent by the daemon."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from mlpiped.cli.render import shown, size
from mlpiped.errors import Conflict, MlpipedError, UnknownName, UsageError
from mlpiped.protocol import path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlpiped.cli.client import Answer
    from mlpiped.cli.ctl import Call


def get(call: Call) -> int:
    run, step, name = _words(call.args.what)
    answer = call.client.get(path("runs", run, "outputs"))
    output = _chosen(answer, step, name)
    if output["path"] is None and output.get("compute") is None:
        hint = f"`mlpipectl run {shown(answer['pipeline'])} --force {shown(output['step'])}` makes it again"
        raise Conflict(f"the bytes of `{name}` of run {answer['run']} were removed to free space", hint=hint)
    url = path("runs", answer["run"], "outputs", output["step"], output["name"])
    if call.args.dest == "-":
        if output["kind"] != "file":
            raise UsageError("a folder cannot go to stdout", hint="name a DEST")
        with call.client.open("GET", url, None) as reply:
            for chunk in reply.chunks():
                sys.stdout.buffer.write(chunk)
        return 0
    dest = _dest(call.args.dest, output)
    if os.path.lexists(dest) and not call.args.force:
        raise Conflict(f"`{dest}` is there already", hint="name another DEST, or give --force to replace it")
    _bring(call, url, output, dest)
    if call.as_json:
        return call.document({**output, "run": answer["run"], "dest": dest})
    call.say(shown(dest))
    call.note(f"{shown(output['step'])}/{shown(output['name'])} of run {answer['run']}, {size(output['size'])}")
    return 0


def _words(text: str) -> tuple[str, str | None, str]:
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UsageError(f"not an output: `{text}`", hint="as in `12/train/model`, `latest/model`")
    return parts[0], (parts[1] if len(parts) == 3 else None), parts[-1]


def _chosen(answer: dict[str, Any], step: str | None, name: str) -> dict[str, Any]:
    outputs = answer["outputs"]
    if not outputs:
        raise Conflict(f"run {answer['run']} has made nothing yet", hint=f"`mlpipectl show {answer['run']}`")
    if step is not None:
        of_step = [output for output in outputs if output["step"] == step]
        if not of_step:
            raise UnknownName.among("step with outputs", step, {output["step"] for output in outputs})
        outputs = of_step
    found: list[dict[str, Any]] = [output for output in outputs if output["name"] == name]
    if not found:
        raise UnknownName.among("output", name, {output["name"] for output in outputs})
    if len(found) > 1:
        words = " or ".join(f"`{answer['run']}/{output['step']}/{name}`" for output in found)
        raise UsageError(f"more than one step has an output `{name}`", hint=words)
    return found[0]


def _dest(given: str | None, output: dict[str, Any]) -> str:
    name: str = os.path.basename(output["file_name"]) or output["name"]
    if given is None:
        return name
    if os.path.isdir(given):
        return os.path.join(given, name)
    if given.endswith("/"):
        raise UsageError(f"there is no folder `{given}`", hint=f"`mkdir -p {shlex.quote(given)}`")
    return given


def _bring(call: Call, url: str, output: dict[str, Any], dest: str) -> None:
    """Beside `dest` first, then by rename: nobody sees half of it."""
    parent = os.path.dirname(os.path.abspath(dest))
    try:
        os.makedirs(parent, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".mlpipectl-", dir=parent)
    except OSError as error:
        raise UsageError(f"cannot write to `{parent}`: {(error.strerror or '').lower()}") from None
    try:
        fresh = os.path.join(scratch, "output")
        if output["path"] is None or not _copied(output["path"], output["kind"], fresh):
            with call.client.open("GET", url, None) as reply:
                (_file if output["kind"] == "file" else _folder)(reply, fresh)
        if os.path.lexists(dest):
            os.rename(dest, os.path.join(scratch, "old"))
        os.rename(fresh, dest)
    except OSError as error:
        raise MlpipedError(f"cannot write `{dest}`: {(error.strerror or str(error)).lower()}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copied(source: str, kind: str, fresh: str) -> bool:
    """Whether it could be read here; artifacts are read-only, a copy is its owner's to change."""
    try:
        found = os.lstat(source)
        if kind == "file" and stat.S_ISREG(found.st_mode):
            shutil.copyfile(source, fresh, follow_symlinks=False)
        elif kind == "folder" and stat.S_ISDIR(found.st_mode):
            shutil.copytree(source, fresh, symlinks=True, copy_function=shutil.copyfile)
        else:
            return False
    except (OSError, shutil.Error):
        if os.path.isdir(fresh):
            shutil.rmtree(fresh, ignore_errors=True)
        elif os.path.lexists(fresh):
            os.unlink(fresh)
        return False
    _make_writable(source, fresh)
    return True


def _make_writable(source: str, fresh: str) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for old, new in _pairs(source, fresh):
        mode = os.lstat(old).st_mode
        if stat.S_ISDIR(mode):
            os.chmod(new, 0o777 & ~mask)
        elif stat.S_ISREG(mode):
            os.chmod(new, (0o777 if mode & 0o111 else 0o666) & ~mask)


def _pairs(source: str, fresh: str) -> Iterator[tuple[str, str]]:
    yield source, fresh
    for folder, folders, files in os.walk(source):
        below = os.path.join(fresh, os.path.relpath(folder, source))
        for name in [*folders, *files]:
            yield os.path.join(folder, name), os.path.join(below, name)


def _file(reply: Answer, fresh: str) -> None:
    with open(fresh, "xb") as file:
        for chunk in reply.chunks():
            file.write(chunk)


def _folder(reply: Answer, fresh: str) -> None:
    import tarfile

    if not hasattr(tarfile, "data_filter"):
        raise MlpipedError("this Python cannot unpack safely", hint="use Python 3.11.4 or later")
    os.mkdir(fresh)
    source: Any = _Reader(reply.chunks())
    with tarfile.open(fileobj=source, mode="r|") as tar:
        tar.extractall(fresh, filter="data")


class _Reader:
    """The chunks of an answer as a file to read from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._rest) < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._rest += chunk
        size = len(self._rest) if size < 0 else size
        found, self._rest = self._rest[:size], self._rest[size:]
        return found
