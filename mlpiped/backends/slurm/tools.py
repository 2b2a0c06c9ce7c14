"""What a node needs of ours to run a job: the supervisor's files, and the script that Slurm starts. It blocks."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shlex
import shutil
import zipfile
from pathlib import Path

import mlpiped
from mlpiped.backends import memory_group, supervisor
from mlpiped.backends.slurm import surroundings

WRAPPER = Path(__file__).with_name("wrapper.sh")
TOOLS = (Path(supervisor.__file__), Path(memory_group.__file__), *surroundings.SCRIPTS)
THERE = (
    "__init__.py errors.py backends/__init__.py backends/base.py backends/folder.py backends/supervisor.py "
    "backends/slurm/__init__.py backends/slurm/records.py backends/slurm/submission.py backends/slurm/there.py "
    "backends/slurm/uses.py"
).split()
INHERITED = ("SLURM_", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")


def install(root: Path) -> str:
    """Copies of the supervisor's files, where every node sees them; the folder's name says what they hold, so that a
    job that waits for days runs with the ones that it was submitted with."""
    texts = [path.read_bytes() for path in TOOLS]
    digest = hashlib.blake2b(b"\0".join(texts), digest_size=8).hexdigest()
    home = root / "slurm" / digest
    if not home.is_dir():
        draft = root / "slurm" / f".{digest}.{secrets.token_hex(6)}"
        draft.mkdir(parents=True)
        for path, text in zip(TOOLS, texts, strict=True):
            (draft / path.name).write_bytes(text)
        try:
            draft.rename(home)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if not home.is_dir():
                raise
    return str(home)


def program() -> tuple[str, bytes]:
    """(digest, an archive) of the same files, with those that answer for `Records` on a machine that has nothing of
    ours."""
    files = {path.name: path.read_bytes() for path in TOOLS}
    home = Path(mlpiped.__file__).parent
    for rel in THERE:
        files[f"mlpiped/{rel}"] = b"" if rel.endswith("__init__.py") else (home / rel).read_bytes()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as into:
        for name, text in files.items():
            into.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    digest = hashlib.blake2b(
        b"".join(b"%b\0%b\0" % (name.encode(), text) for name, text in files.items()), digest_size=8
    )
    return digest.hexdigest(), archive.getvalue()


def script(root: str, token: str, tools: str, python: str) -> bytes:
    """The token is in the script itself: nothing in the environment can make it another's."""
    text = WRAPPER.read_text(encoding="ascii")
    for name, value in {"TOKEN": token, "TOOLS": tools, "ROOT": root, "PYTHON": python}.items():
        text = text.replace(f"@{name}@", value if name == "TOKEN" else shlex.quote(value))
    return os.fsencode(text)
