"""A machine with GPUs, as far as `nvidia-smi` tells: the one thing of it that no test machine has."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

SCRIPT = """#!/bin/sh
here=$(dirname "$0")
[ -e "$here/words" ] && { cat "$here/words"; exit "$(cat "$here/status")"; }
case "$1" in
    --query-gpu=uuid,index,name,memory.total) cat "$here/cards" ;;
    --query-compute-apps=gpu_uuid,pid,process_name,used_memory) cat "$here/apps" ;;
    -L) cat "$here/list" ;;
    *) echo "Option \\"$1\\" is not recognized. Please run 'nvidia-smi -h'."; exit 2 ;;
esac
"""


@dataclass(frozen=True)
class Smi:
    """`folder` goes on the PATH. Its answers change while it is in use, as those of the real one do."""

    folder: Path
    uuids: tuple[str, ...]

    @classmethod
    def make(cls, folder: Path, *uuids: str, memory: int = 24576) -> Smi:
        folder.mkdir()
        script = folder / "nvidia-smi"
        script.write_text(SCRIPT)
        script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        rows = [f"{uuid}, {n}, NVIDIA GeForce RTX 3090, {memory}\n" for n, uuid in enumerate(uuids)]
        (folder / "cards").write_text("".join(rows))
        (folder / "list").write_text("")
        smi = cls(folder, uuids)
        smi.used_by()
        return smi

    def used_by(self, *apps: tuple[str, int, str]) -> None:
        """(UUID, pid, process name) of each."""
        self._replace("apps", "".join(f"{uuid}, {pid}, {name}, 1210\n" for uuid, pid, name in apps))

    def broken(self, words: str, status: int) -> None:
        self._replace("status", str(status))
        self._replace("words", words + "\n")

    def mended(self) -> None:
        (self.folder / "words").unlink()

    def _replace(self, name: str, text: str) -> None:
        (self.folder / f".{name}").write_text(text)
        (self.folder / f".{name}").rename(self.folder / name)
