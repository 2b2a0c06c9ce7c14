"""A control group that holds a step to its memory, where the host lets us make one.

Standard library only: the supervisor loads it by its path, from beside its own file, and only for a step with a limit.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _own_groups() -> Iterator[tuple[str, str]]:
    """(version, folder) of the control groups in which a group for a step may be made; best first."""
    with open("/proc/self/cgroup") as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            yield "v1", "/sys/fs/cgroup/memory" + path.rstrip("/")
    for number, _, path in lines:
        # v2 gives controllers only to groups without processes: the nearest group above that was delegated to us
        folder = "/sys/fs/cgroup" + path.rstrip("/")
        while number == "0" and len(folder) > len("/sys/fs/cgroup"):
            names = os.listxattr(folder) if os.path.isdir(folder) else []
            if "user.delegate" in names or "trusted.delegate" in names:
                yield "v2", folder
                break
            folder = os.path.dirname(folder)


class MemoryGroup:
    """A control group that kills a step at its memory limit. Below our own group, so it can only tighten."""

    def __init__(self, version: str, above: str, token: str) -> None:
        self.v1 = version == "v1"
        self.above = above
        self.path = f"{above}/mlpiped-{token}"

    @classmethod
    def make(cls, token: str, limit: int) -> MemoryGroup | None:
        """None where the host does not allow it: the step then runs without this limit."""
        for version, above in _own_groups():
            group = cls(version, above, token)
            try:
                if not group.v1:
                    _put(above + "/cgroup.subtree_control", "+memory")
                os.mkdir(group.path)
            except OSError:
                continue
            try:
                _put(group.path + ("/memory.limit_in_bytes" if group.v1 else "/memory.max"), str(limit))
            except OSError:
                group.remove()
                continue
            for name, value in (("memory.memsw.limit_in_bytes", str(limit)), ("memory.swap.max", "0")):
                try:
                    _put(f"{group.path}/{name}", value)
                except OSError:
                    pass  # no swap accounting here
            return group
        return None

    @classmethod
    def forget(cls, token: str) -> None:
        """Remove what a supervisor that was killed left; nothing of the job may live any more."""
        for version, above in _own_groups():
            cls(version, above, token).remove()

    def spawn(self, start: Callable[[], int]) -> int:
        """Start a process inside, by being inside for that moment: its memory counts here from the first byte."""
        with open("/proc/self/cgroup") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
        if self.v1:
            home = next("/sys/fs/cgroup/memory" + path for _, names, path in lines if "memory" in names.split(","))
        else:
            home = next("/sys/fs/cgroup" + path for number, _, path in lines if number == "0")
        _put(self.path + "/cgroup.procs", "0")
        try:
            return start()
        finally:
            _put(home + "/cgroup.procs", "0")

    def killed(self) -> bool:
        with open(self.path + ("/memory.oom_control" if self.v1 else "/memory.events")) as file:
            return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in file)

    def remove(self) -> None:
        try:
            os.rmdir(self.path)
        except OSError:
            pass  # a process that could not be killed is in it


def _put(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
