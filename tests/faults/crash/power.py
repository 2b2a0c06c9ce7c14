"""A disk that fails: ext4 on a loop device. Its power is cut by FS_IOC_SHUTDOWN without flushing its journal.

What had not been synced when the power went is lost, as on a real machine; what lies elsewhere stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

FS_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
SIZE = 192 << 20


def missing() -> str | None:
    """Why this machine has no such disk; None when it has."""
    if os.geteuid() != 0:
        return "a power cut needs root: it is FS_IOC_SHUTDOWN on a loop mount"
    for tool in ("mkfs.ext4", "mount", "umount", "findmnt", "fsfreeze"):
        if shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is None:
            return f"a power cut needs `{tool}`"
    if not Path("/dev/loop-control").exists():
        return "a power cut needs loop devices"
    return None


class Disk:
    """Mounted at `place` from its making to `close`. Raises CalledProcessError where mounting is not allowed."""

    def __init__(self, place: Path, image: Path) -> None:
        self.place, self.image = place, image
        place.mkdir(parents=True, exist_ok=True)
        with image.open("wb") as file:
            file.truncate(SIZE)
        _do("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        self.mount()
        os.sync()

    def mount(self) -> None:
        _do("mount", "-o", "loop", self.image, self.place)
        try:
            (self.place / ".powered").touch()
            (self.place / ".powered").unlink()
        except OSError:
            # Another mount namespace, made meanwhile by somebody, holds the dead file system: it is what was mounted.
            # What is in the image is all that had reached the disk.
            self.unmount()
            copy = self.image.with_name(f"{self.image.name}.copy")
            _do("cp", "--sparse=always", self.image, copy)
            copy.rename(self.image)
            _do("mount", "-o", "loop", self.image, self.place)

    def cut(self) -> None:
        """Nothing reaches the disk any more. Whoever has it open gets EIO from now on."""
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def make_read_only(self) -> None:
        """What ext4 does by itself when it finds its disk damaged."""
        _do("mount", "-o", "remount,errors=remount-ro", self.place)
        device = Path(os.path.realpath(_do("findmnt", "-no", "SOURCE", self.place).strip())).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")

    def freeze(self) -> None:
        """Whoever writes hangs until `thaw`, and cannot even be killed."""
        _do("fsfreeze", "--freeze", self.place)

    def thaw(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):  # it is not frozen
            _do("fsfreeze", "--unfreeze", self.place)

    def unmount(self, patience: float = 10.0) -> None:
        until = time.monotonic() + patience
        while True:
            try:
                _do("umount", self.place)
                return
            except subprocess.CalledProcessError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)  # a process that was killed has not ended yet

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.unmount()
        self.image.unlink(missing_ok=True)


def _do(*words: str | Path) -> str:
    env = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", "LC_ALL": "C"}
    return subprocess.run(words, check=True, capture_output=True, env=env, timeout=30, text=True).stdout
