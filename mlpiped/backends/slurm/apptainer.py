"""Images of Apptainer (`.sif` files that the nodes see too): which one it is, and the words that run a command in it.

The image of a run is the content that its file had when the run looked at it. A node starts it only while the file's
stamp is still the same: what was written there since is another image, and the next run's. Where nodes see other files,
it is brought there by content, which nobody changes: its mark is "-" then.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from mlpiped.backends import folder as folders
from mlpiped.backends.base import Image
from mlpiped.errors import BackendUnavailable, InvalidJob
from mlpiped.files import hashing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlpiped.backends.base import Job

SCRIPT = Path(__file__).with_name("apptainer.sh")
SETTINGS = ("APPTAINER", "SINGULARITY")  # variables by which its options are set: none of them is the step's to have
KEPT = frozenset(f"{name}_{what}" for name in SETTINGS for what in ("CACHEDIR", "TMPDIR"))


class Sifs:
    """Digests of image files, kept while their stamps are the same."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[hashing.Stamp, Image]] = {}
        self._one = anyio.Lock()  # gigabytes are read

    async def image(self, reference: str | None) -> Image:
        """Raises InvalidJob (it is no image file), BackendUnavailable (it cannot be read just now)."""
        if reference is None or not reference.endswith(".sif") or not os.path.isabs(reference):
            raise InvalidJob(
                "a cluster runs images that are files", hint='write `Environment(image="/shared/app.sif")`'
            )
        async with self._one:
            return await anyio.to_thread.run_sync(self._look, reference)

    def _look(self, path: str) -> Image:
        try:
            real = os.path.realpath(path, strict=True)
            fd = hashing.open_file(real)
        except FileNotFoundError:
            raise InvalidJob(f"there is no file `{path}`") from None
        except OSError as error:
            raise BackendUnavailable(f"`{path}` cannot be read: {error.strerror}") from None
        try:
            stamp = hashing.stamp_of(os.fstat(fd))
            known = self._known.get(path)
            if known is not None and known[0] == stamp:
                return known[1]
            hashed = hashing.hash_fd(fd)
        except hashing.Unreadable as fault:
            raise BackendUnavailable(f"`{path}` {fault.args[0]}") from None
        except OSError as error:
            raise BackendUnavailable(f"`{path}` cannot be read: {error.strerror}") from None
        finally:
            os.close(fd)
        if not hashing.vouches(hashed.stamp, hashed.began_ns):
            raise BackendUnavailable(f"`{path}` was written just now")
        content = hashed.digest.replace(":", "-")
        image = Image(identity=hashed.digest, run=f"{_mark(hashed.stamp)}:{content}:{real}")
        self._known[path] = hashed.stamp, image
        return image


def parts(run: str) -> tuple[str, str, str]:
    """(what its stamp was, its content, its path), of an `Image.run`."""
    mark, _, rest = run.partition(":")
    content, _, path = ("", "", rest) if rest.startswith("/") else rest.partition(":")
    return mark, content, path


def _mark(stamp: hashing.Stamp) -> str:
    """What of a stamp every node sees alike, as `stat -c %i-%s-%.9Y` prints it."""
    _, inode, size, changed, _ = stamp
    return f"{inode}-{size}-{changed // 10**9}.{changed % 10**9:09d}"


def inside(
    argv: list[str], env: Mapping[str, str], job: Job, folder: str, tools: str, program: str | bool
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that run `argv` in the job's image. `env`: the base environment with the job's own.

    It sees its folder, to write, and its inputs and the SDK, to read, at the same paths. Raises InvalidJob.
    """
    assert job.image is not None
    program = "apptainer" if program is True else str(program)
    prefix = "SINGULARITY" if os.path.basename(program).startswith("singularity") else "APPTAINER"
    mark, _, image = parts(job.image)
    options = ["exec", "--containall", f"--pwd={folder}/work", *(["--nv"] if job.gpus else [])]
    own = folders.variables(folder, job)
    sdk = env["PYTHONPATH"].rpartition(":")[2]
    readable = {sdk, os.path.realpath(f"{sdk}/mlpiped"), *(path for paths in job.inputs.values() for path in paths)}
    if not job.parameters:
        readable.add(own["MLPIPED_PARAMS"])
    options += [f"--bind={_bindable(path)}:{path}:ro" for path in sorted(readable)]
    options.append(f"--bind={_bindable(folder)}:{folder}")
    lead = ["/bin/sh", f"{tools}/{SCRIPT.name}", folder, program, prefix, mark, image]
    inner = {"TMPDIR": own["MLPIPED_SCRATCH"], **own, "PYTHONPATH": env["PYTHONPATH"], "PYTHONUNBUFFERED": "1"}
    if (path := inner.pop("PATH", None)) is not None:
        inner["PREPEND_PATH"] = path
    outer = {name: value for name, value in env.items() if name in KEPT or not name.startswith(SETTINGS)}
    outer[f"{prefix}_NO_EVAL"] = "1"  # values are values: no shell looks at them
    outer.update({f"{prefix}ENV_{name}": value for name, value in inner.items()})
    return [*lead, *options, image, *argv], outer


def _bindable(path: str) -> str:
    if any(character in path for character in ":,\n\\"):
        raise InvalidJob(f"Apptainer cannot bind a path that has a colon, a comma or a backslash in it: {path!r:.300}")
    return path
