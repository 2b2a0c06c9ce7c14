"""The executing side of a job folder (its format: `base.py`): claim the token, run the step, leave the witness.

Standard library only, and nothing of mlpiped: it runs as `python -I -S supervisor.py`, here and on other hosts.

    --serve FD     the zygote: forks a supervisor for each packet on the socket FD, a job folder; ends with the
                   socket. A fork costs a fraction of a millisecond, a new interpreter thirty.
    --run FOLDER   one job, supervised by this very process. Exit status 75: somebody else had the token.

A supervisor needs nobody: it enforces the timeout, carries out SIGTERM as a cancellation, ends everything that the step
started, and writes exit.json, whether or not there is a daemon. What it says on the socket are hints.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import json
import os
import resource
import signal
import socket
import sys
import time

TYPE_CHECKING = False  # `typing` is not imported: what the zygote holds, every fork has to map
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Say = Callable[..., None]

LOST_CLAIM = 75
WAKES = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})  # blocked, and waited for
CANCELS = frozenset({signal.SIGTERM, signal.SIGINT})
DEFAULTED = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
STEP_FILES = 1024  # soft RLIMIT_NOFILE of a step: what programs expect, where the daemon has raised its own
STEP_OOM_SCORE = 500  # when the host runs out of memory, steps go before the daemon and its supervisors
WITNESS_SIZE = 2048  # bytes; what the JSON leaves is spaces
UNKILLABLE = 30.0  # seconds until a process that survives SIGKILL (in the kernel, on a dead disk) is left behind

_libc = ctypes.CDLL(None, use_errno=True)


# --- who is who: a pid alone is no name, it is given to somebody else one day


def boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def _read(path: str) -> bytes:
    """Without Python's file objects: a fork pays for each page of them that it touches."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat after the command's name, from the state (field 3) on."""
    try:
        return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_time(pid: int) -> int | None:
    """In clock ticks since the boot; None when there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def open_process(pid: int, start: int | None) -> int | None:
    """A pidfd of the process that has this pid *and* began then; None when it is gone. `start` None: whoever has it."""
    try:
        fd = os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError, ValueError):
        return None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise
    if start is not None and start_time(pid) != start:
        os.close(fd)
        return None
    return fd


def pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def descendants(ancestor: int) -> list[tuple[int, int, int]]:
    """(pid, process group, start time) of everything that `ancestor` started and that has not ended."""
    children: dict[int, list[tuple[int, int, int]]] = {}
    for pid in pids():
        fields = _stat(pid)
        if fields and fields[0] != b"Z":
            children.setdefault(int(fields[1]), []).append((pid, int(fields[2]), int(fields[19])))
    found: list[tuple[int, int, int]] = []
    ask = [ancestor]
    while ask:
        below = children.get(ask.pop(), [])
        found.extend(below)
        ask.extend(pid for pid, _, _ in below)
    return found


# --- the folder


def sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def claim(folder: str, record: dict[str, Any]) -> int | None:
    """Put `record` into the claim: the descriptor of its lock, held; None when somebody else was first.

    One rename onto a folder that is not empty once it is there: only one can win, and the winner's lock is held and
    its handle.json complete the instant they can be seen. On the disk is, at the return, the claim; what its
    handle.json says is of no use after a power cut anyway.
    """
    target = folder + "/claim"
    if os.path.exists(target):
        return None
    private = f"{folder}/claim.{os.urandom(8).hex()}"
    os.mkdir(private, 0o700)
    lock = os.open(private + "/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fd = os.open(private + "/handle.json", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.write(fd, json.dumps(record).encode())
        os.close(fd)
        os.rename(private, target)
    except OSError as error:
        os.close(lock)
        for name in ("/lock", "/handle.json"):
            try:
                os.unlink(private + name)
            except OSError:
                pass
        os.rmdir(private)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return None
        raise
    sync_folder(folder)
    return lock


class Witness:
    """exit.json. Its space is taken before the step starts, so that a disk the step has filled cannot silence it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.fd = os.open(folder + "/exit.json.tmp", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.write(self.fd, b" " * WITNESS_SIZE)

    def write(self, end: dict[str, Any]) -> None:
        os.pwrite(self.fd, json.dumps(end).encode().ljust(WITNESS_SIZE), 0)
        os.fsync(self.fd)
        os.rename(self.folder + "/exit.json.tmp", self.folder + "/exit.json")
        sync_folder(self.folder)


# --- memory: a control group below our own, where the host lets us make one


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


# --- the step


class CannotStart(Exception):
    """A sentence for the person whose step it is."""


def _candidates(command: str, path: str) -> list[str]:
    if "/" in command:
        return [command]
    found = [f"{folder or '.'}/{command}" for folder in path.split(":")]
    return [name for name in found if os.access(name, os.X_OK) and not os.path.isdir(name)]


def spawn(folder: str, argv: list[str], env: dict[str, str]) -> int:
    """Start the step, in the present folder and in a process group of its own; its pid."""
    os.chdir(folder + "/work")
    mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    out, err = (os.open(f"{folder}/{name}", mode, 0o644) for name in ("stdout", "stderr"))
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, out, 1),
        (os.POSIX_SPAWN_DUP2, err, 2),
    ]
    shown = f"`{argv[0][:200]}`"
    try:
        for name in _candidates(argv[0], env.get("PATH", os.defpath)):
            return os.posix_spawn(
                name, argv, env, file_actions=actions, setpgroup=0, setsigmask=(), setsigdef=DEFAULTED
            )
        raise CannotStart(f"command not found: {shown}")
    except OSError as error:
        reasons = {
            errno.ENOENT: f"command not found: {shown}, or the interpreter that its first line names",
            errno.EACCES: f"permission denied: {shown} is not an executable file",
            errno.ENOEXEC: f"cannot run {shown}: it has no `#!` line and is no program of this machine",
            errno.E2BIG: f"cannot run {shown}: its arguments and environment are too long together",
        }
        raise CannotStart(reasons.get(error.errno or 0, f"cannot run {shown}: {error.strerror}")) from None
    except ValueError as error:
        raise CannotStart(f"cannot run {shown}: {error}") from None
    finally:
        os.close(out)
        os.close(err)


def _reap(main: int) -> tuple[int | None, bool]:
    """Collect all that ended: (the status of `main` if it was among them, whether any child is left)."""
    status = None
    while True:
        try:
            pid, code, _ = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return status, False
        if pid == 0:
            return status, True
        if pid == main:
            status = code


def signal_all(main: int, number: int) -> None:
    """To the step's process group, and to what left the group (setsid) but not us, who adopt orphans.

    `main` must not have been reaped: only so is its number certain to be its group's.
    """
    try:
        os.killpg(main, number)
    except (ProcessLookupError, PermissionError):
        pass
    _signal_descendants(number, but=main)


def _signal_descendants(number: int, but: int | None = None) -> None:
    for pid, group, start in descendants(os.getpid()):
        if group != but and (fd := open_process(pid, start)) is not None:
            try:
                signal.pidfd_send_signal(fd, number)
            except (ProcessLookupError, PermissionError):
                pass
            os.close(fd)


def bury(patience: float = UNKILLABLE) -> bool:
    """SIGKILL until nothing that we started or adopted is left. False: some live on after `patience` seconds."""
    until = time.monotonic() + patience
    while _reap(0)[1]:
        _signal_descendants(signal.SIGKILL)
        if time.monotonic() > until:
            return False
        signal.sigtimedwait({signal.SIGCHLD}, 0.02)
    return True


def watch(main: int, timeout: float | None, grace: float) -> dict[str, Any]:
    """Until the step's first process has ended and nothing else of it lives; enforces the timeout and SIGTERM."""
    end: dict[str, Any] = {"code": None, "signal": None, "timed_out": False, "cancelled": False, "error": None}
    limit = None if timeout is None else time.monotonic() + timeout
    kill_at = None
    while (reaped := _reap(main))[0] is None:
        wake_at = kill_at if kill_at is not None else limit
        pause = 3600.0 if wake_at is None else max(0.0, wake_at - time.monotonic())
        got = signal.sigtimedwait(WAKES, pause)
        now = time.monotonic()
        if kill_at is None:
            end["cancelled"] = got is not None and got.si_signo in CANCELS
            end["timed_out"] = not end["cancelled"] and limit is not None and now >= limit
            if end["cancelled"] or end["timed_out"]:
                signal_all(main, signal.SIGTERM)
                kill_at = now + grace
        elif now >= kill_at:
            signal_all(main, signal.SIGKILL)
            kill_at = now + 1.0
    code = os.waitstatus_to_exitcode(reaped[0] or 0)
    end["code"], end["signal"] = (code, None) if code >= 0 else (None, -code)
    if reaped[1] and not bury():  # the step is over when its first process is
        end["error"] = "some of its processes survive SIGKILL: they hang in the kernel"
    return end


def run(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Execute what job.json says; the contents of exit.json, less the times."""
    if signal.SIGTERM in signal.sigpending():
        return {"code": None, "signal": None, "timed_out": False, "cancelled": True, "error": None}
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = STEP_FILES if hard == resource.RLIM_INFINITY else min(STEP_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    group = MemoryGroup.make(job["token"], job["memory"]) if job.get("memory") else None
    try:

        def start() -> int:
            return spawn(folder, job["argv"], job["env"])

        main = group.spawn(start) if group else start()
        try:
            _put(f"/proc/{main}/oom_score_adj", str(STEP_OOM_SCORE))
        except OSError:
            pass  # over already, or ours is higher
        end = watch(main, job.get("timeout"), job.get("grace", 10.0))
        if group and end["code"] != 0 and group.killed():
            end["error"] = f"out of memory: it needed more than its limit of {job['memory'] / 2**20:.0f} MiB"
        return end
    finally:
        if group:
            group.remove()


def supervise(folder: str, boot: str, say: Say) -> int:
    """One attempt, from claim to witness; the exit status of this process. WAKES are blocked."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    _libc.prctl(PR_SET_NAME, b"mlpiped-step", 0, 0, 0)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    record = {"v": 1, "pid": os.getpid(), "start": start_time(os.getpid()), "boot": boot}
    lock = claim(folder, record)
    if lock is None:
        say("lost_claim")
        return LOST_CLAIM
    witness = Witness(folder)
    say("claimed", handle=record)
    started = time.time()
    try:
        with open(folder + "/job.json") as file:
            job = json.load(file)
        os.unlink(folder + "/job.json")
        end = run(folder, job)
    except CannotStart as error:
        end = {"code": None, "signal": None, "timed_out": False, "cancelled": False, "error": str(error)}
    except Exception as error:
        bury()
        sentence = f"the supervisor failed: {type(error).__name__}: {str(error)[:500]}"
        end = {"code": None, "signal": None, "timed_out": False, "cancelled": False, "error": sentence}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    end.update(v=1, started=started, ended=time.time(), cpu=usage.ru_utime + usage.ru_stime)
    end["max_rss"] = usage.ru_maxrss * 1024
    witness.write(end)
    say("exited", exit=end)
    return 0


# --- the two ways to be started


def _attempt(folder: str, boot: str, say: Say) -> int:
    try:
        return supervise(folder, boot, say)
    except Exception as error:  # before the claim: nothing was done. After it: no witness, so the attempt is lost
        say("failed", error=f"{type(error).__name__}: {str(error)[:500]}")
        return 70


def serve(fd: int) -> None:
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects the supervisors
    _libc.prctl(PR_SET_NAME, b"mlpiped-zygote", 0, 0, 0)
    boot = boot_id()
    gc.disable()
    gc.freeze()  # what is forked stays shared
    while packet := sock.recv(65536):
        folder = os.fsdecode(packet)

        def say(kind: str, folder: str = folder, **facts: Any) -> None:
            message = {"token": os.path.basename(folder), "kind": kind, **facts}
            try:
                sock.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                pass  # nobody listens: the folder says it all

        signal.pthread_sigmask(signal.SIG_BLOCK, WAKES)
        try:
            pid = os.fork()
        except OSError as error:
            say("refused", error=error.strerror)
            pid = -1
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(_attempt(folder, boot, say))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WAKES)


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--serve":
        serve(int(sys.argv[2]))
        return 0
    if len(sys.argv) == 3 and sys.argv[1] == "--run":
        signal.pthread_sigmask(signal.SIG_BLOCK, WAKES)
        return _attempt(os.path.abspath(sys.argv[2]), boot_id(), lambda kind, **facts: None)
    sys.stderr.write("usage: supervisor.py --serve FD | --run FOLDER\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
