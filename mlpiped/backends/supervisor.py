"""The executing side of a job folder (its format: `base.py`): claim the token, run the step, leave the witness.

Standard library only, and nothing of mlpiped: it runs as `python -I -S supervisor.py`, here and on other hosts.

    --serve FD     the zygote: forks a supervisor for each packet on the socket FD; ends with it. A new interpreter
                   costs thirty milliseconds. With the packet comes a socket, the supervisor's line: it says there how
                   the attempt goes, and is given the next one, while the daemon lives and the attempts are plain.
    --run FOLDER   one job, supervised by this very process. Exit status 75: somebody else had the token.

A packet is {"folder": …, "order": …, "until": …}. The order is what job.json would hold; "make" (folders, parents
first) and "params" (the text of params.json) name what the folder lacks. With null the folder has a job.json. After
`until` (monotonic seconds) the folder and its claim may have been removed: it is not carried out.

A supervisor needs no daemon: it enforces the timeout, takes SIGTERM for a cancellation, ends all that the step started,
and writes exit.json. What it says on the line are hints. A power cut must not take the outputs that a witness vouches
for: a daemon that listens makes them durable, and the witness says `"synced": false`: it counts while the host is up.
Where nobody listens, the supervisor makes them durable before the witness.
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
import stat
import sys
import time
from array import array

TYPE_CHECKING = False  # `typing` is not imported: what the zygote holds, every fork has to map
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

LOST_CLAIM, REFUSED = 75, 78
WAKES = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})  # blocked, and waited for
CANCELS = frozenset({signal.SIGTERM, signal.SIGINT})
IGNORED = tuple(number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN)  # here
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
STEP_FILES = 1024  # soft RLIMIT_NOFILE of a step: what programs expect, where the daemon has raised its own
OOM_SCORE, STEP_OOM_SCORE = "/proc/self/oom_score_adj", 500  # of a host without memory, steps go before daemons
APPENDED = os.O_WRONLY | os.O_CREAT | os.O_APPEND
WITNESS_SIZE = 2048  # bytes; what the JSON leaves is spaces
PACKET = 100_000  # bytes; longer orders come as job.json
HINT_WAIT = array("l", (0, 50_000)).tobytes()  # a timeval: so long a hint waits for a daemon with ten of them unread
NO_END = {"code": None, "signal": None, "timed_out": False, "cancelled": False, "error": None, "out_of_memory": False}
SHORT = 0.01  # seconds; of an attempt that is over by then, all is said at once
ATTEMPTS = 1000  # of one supervisor: what leaks, leaks no further
UNKILLABLE = 30.0  # seconds until a process that survives SIGKILL (in the kernel, on a dead disk) is left behind

_libc = ctypes.CDLL(None, use_errno=True)


# --- who is who: a pid alone is no name, it is given to somebody else one day


def boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _write(path: str, content: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(content)


def _try(act: Callable[..., object], *facts: Any) -> None:
    """What may be of no use, or not allowed, and then does not matter."""
    try:
        act(*facts)
    except OSError:
        pass


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat after the command's name, from the state (field 3) to the start time (22)."""
    try:
        return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split(None, 20)
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_time(pid: int) -> int | None:
    """In clock ticks since the boot; None when there is no such process."""
    return int(fields[19]) if (fields := _stat(pid)) else None


def open_process(pid: int, start: int | None) -> int | None:
    """A pidfd of the process that has this pid *and* began then; None when it is gone. `start` None: whoever has it."""
    try:
        fd = os.pidfd_open(pid)
    except (OSError, OverflowError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
            raise
        return None
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
    found = list(children.get(ancestor, ()))
    for pid, _, _ in found:  # it grows meanwhile
        found.extend(children.get(pid, ()))
    return found


# --- the folder


def sync_folder(path: str, kind: int = os.O_DIRECTORY) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | kind)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def claim(
    folder: str, record: Mapping[str, Any], files: Mapping[str, bytes] | None = None, make: Sequence[str] | None = None
) -> int | None:
    """Put `record` into the claim: the descriptor of its handle.json, locked; None when somebody else was first.

    One rename onto a folder that is not empty once it is there: only one can win, whose handle.json is complete and
    locked the instant it can be seen. At the return the claim is on the disk (who wins the fence after a power cut says
    that it never ran); what its handle.json says is of no use by then. `files` come with it, and the folder and what is
    to `make` in it before: a full disk costs no attempt. Each mkdir is the same for all who build for this token: a
    half-built folder is as good as none.
    """
    if os.access(folder + "/claim", os.F_OK):
        return None
    private = f"{folder}/claim.{os.urandom(8).hex()}"
    made: list[str] = []
    lock = None
    try:
        for path in (*([] if make is None else [folder]), *(f"{folder}/{name}" for name in make or ()), private):
            try:
                os.mkdir(path, 0o755)
                made.append(path)
            except FileExistsError:
                pass
        lock = _create(private + "/handle.json", json.dumps(record).encode())
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name, content in (files or {}).items():
            os.close(_create(f"{private}/{name}", content))
        os.rename(private, folder + "/claim")
    except OSError as error:
        lost = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        if lock is not None:
            os.close(lock)
        for name in ("handle.json", *(files or {})):
            _try(os.unlink, f"{private}/{name}")
        for path in [private] if lost else reversed(made):  # the winner has use for the others
            _try(os.rmdir, path)
        if lost:
            return None
        raise
    sync_folder(folder)
    return lock


def sync_tree(path: str) -> None:
    """Make durable what a step has made, links aside. What cannot be opened is the collector's to complain of."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            if stat.S_ISREG(os.lstat(f"{folder}/{name}").st_mode) and os.access(f"{folder}/{name}", os.R_OK):
                sync_folder(f"{folder}/{name}", os.O_NOFOLLOW)
        sync_folder(folder)


def _create(path: str, content: bytes) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        while content:
            content = content[os.write(fd, content) :]
    except OSError:
        os.close(fd)
        raise
    return fd


def testify(folder: str, end: dict[str, Any], durable: bool) -> str:
    """Make exit.json of the file that came with the claim, in space that no step can have filled; its content."""
    out = folder + "/out"
    if durable:
        sync_tree(out)  # a witness that outlives a power cut must not vouch for bytes that do not
    end["synced"] = durable or not os.access(out, os.F_OK)
    text = json.dumps(end)
    fd = os.open(folder + "/claim/exit.json", os.O_WRONLY | os.O_CLOEXEC)
    os.pwrite(fd, text.encode().ljust(WITNESS_SIZE), 0)
    if durable:
        os.fsync(fd)
    os.close(fd)
    os.rename(folder + "/claim/exit.json", folder + "/exit.json")
    if durable:
        sync_folder(folder)
    return text


# --- the step


class CannotStart(Exception):
    """A sentence for the person whose step it is."""


def _found(command: str, path: str) -> str | None:
    if "/" in command:
        return command
    names = (f"{folder or '.'}/{command}" for folder in path.split(":"))
    return next((name for name in names if os.access(name, os.X_OK) and not os.path.isdir(name)), None)


def spawn(folder: str, argv: list[str], env: dict[str, str]) -> int:
    """Start the step, in a process group of its own; its pid."""
    os.chdir(folder + "/work")
    files = (("/dev/null", os.O_RDONLY), *((f"{folder}/{name}", APPENDED) for name in ("stdout", "stderr")))
    actions = [(os.POSIX_SPAWN_OPEN, number, path, flags, 0o644) for number, (path, flags) in enumerate(files)]
    shown, score = f"`{argv[0][:200]}`", _read(OOM_SCORE)
    _try(_write, OOM_SCORE, b"%d" % STEP_OOM_SCORE)  # inherited: what the step starts at once has it too
    try:
        if (name := _found(argv[0], env.get("PATH", os.defpath))) is None:
            raise CannotStart(f"command not found: {shown}")
        return os.posix_spawn(name, argv, env, file_actions=actions, setpgroup=0, setsigmask=(), setsigdef=IGNORED)
    except (OSError, ValueError) as error:
        number, words = getattr(error, "errno", 0), getattr(error, "strerror", str(error))
        reasons = {
            errno.ENOENT: f"command not found: {shown}, or the interpreter that its first line names",
            errno.EACCES: f"permission denied: {shown} is not an executable file",
            errno.ENOEXEC: f"cannot run {shown}: it has no `#!` line and is no program of this machine",
            errno.E2BIG: f"cannot run {shown}: its arguments and environment are too long together",
        }
        raise CannotStart(reasons.get(number, f"cannot run {shown}: {words}")) from None
    finally:
        _try(_write, OOM_SCORE, score)


class Children:
    """What this attempt has started, and what came to us when its parent ended."""

    def __init__(self) -> None:
        self.cpu, self.max_rss = 0.0, 0

    def reap(self, main: int = 0) -> tuple[int | None, bool]:
        """Collect all that ended: (the status of `main` if it was among them, whether any child is left)."""
        status = None
        while True:
            try:
                pid, code, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return status, False
            if pid == 0:
                return status, True
            self.cpu += usage.ru_utime + usage.ru_stime
            self.max_rss = max(self.max_rss, usage.ru_maxrss * 1024)
            if pid == main:
                status = code

    def bury(self, patience: float = UNKILLABLE) -> bool:
        """SIGKILL until nothing is left of them. False: some live on after `patience` seconds."""
        until = time.monotonic() + patience
        while self.reap()[1]:
            signal_all(signal.SIGKILL)
            if time.monotonic() > until:
                return False
            signal.sigtimedwait({signal.SIGCHLD}, 0.02)
        return True


def signal_all(number: int, main: int = 0) -> None:
    """To the group of `main` (0: it was reaped, its number may be another's by now), and to what left the group."""
    if main:
        _try(os.killpg, main, number)
    for pid, group, start in descendants(os.getpid()):
        if group != main and (fd := open_process(pid, start)) is not None:
            _try(signal.pidfd_send_signal, fd, number)
            os.close(fd)


def watch(main: int, job: dict[str, Any], children: Children, lasts: Callable[[], object]) -> dict[str, Any]:
    """Until nothing of the step lives; enforces timeout and SIGTERM. `lasts` is called when that takes a while."""
    end: dict[str, Any] = {**NO_END}
    began = time.monotonic()
    limit = None if job.get("timeout") is None else began + job["timeout"]
    kill_at: float | None = None
    tell_at: float | None = began + SHORT
    while (reaped := children.reap(main))[0] is None:
        wake_at = min(at for at in (tell_at, kill_at or limit, began + 1e9) if at is not None)
        got = signal.sigtimedwait(WAKES, min(3600.0, max(0.0, wake_at - time.monotonic())))
        now = time.monotonic()
        if tell_at is not None and now >= tell_at:
            tell_at = None
            lasts()
        if kill_at is None:
            end["cancelled"] = got is not None and got.si_signo in CANCELS
            end["timed_out"] = not end["cancelled"] and limit is not None and now >= limit
            if end["cancelled"] or end["timed_out"]:
                signal_all(signal.SIGTERM, main)
                kill_at = now + job.get("grace", 10.0)
        elif now >= kill_at:
            signal_all(signal.SIGKILL, main)
            kill_at = now + 1.0
    # A host that goes down sends SIGTERM to the step and to us at the same time. The step was the first to act on it.
    end["cancelled"] = end["cancelled"] or (kill_at is None and signal.sigtimedwait(CANCELS, 0) is not None)
    code = os.waitstatus_to_exitcode(reaped[0] or 0)
    end["code"], end["signal"] = (code, None) if code >= 0 else (None, -code)
    if reaped[1] and not children.bury():  # the step is over when its first process is
        end["error"] = "some of its processes survive SIGKILL: they hang in the kernel"
    return end


def _memory_group(token: str, limit: int) -> Any:
    """By the file beside this one; None, and so no limit, where that is missing or the host allows no group."""
    import runpy

    path = os.path.dirname(os.path.abspath(__file__)) + "/memory_group.py"
    return runpy.run_path(path)["MemoryGroup"].make(token, limit) if os.path.exists(path) else None


def run(folder: str, job: dict[str, Any], children: Children, lasts: Callable[[], object]) -> dict[str, Any]:
    """Execute what job.json says; the contents of exit.json, less the times."""
    if signal.sigtimedwait(CANCELS, 0) is not None:
        return {**NO_END, "cancelled": True}
    group = _memory_group(job["token"], job["memory"]) if job.get("memory") else None
    try:
        queue = {n: v for n, v in os.environ.items() if n.startswith(tuple(job.get("inherit", ())))}  # its cards
        step = folder, job["argv"], {**queue, **job["env"]}
        main = group.spawn(lambda: spawn(*step)) if group else spawn(*step)
        end = watch(main, job, children, lasts)
        if group and end["code"] != 0 and group.killed():
            end["out_of_memory"] = True
            end["error"] = f"out of memory: it needed more than its limit of {job['memory'] / 2**20:.0f} MiB"
        if end["code"] == REFUSED and os.path.exists(folder + "/refused"):
            end.update(code=None, final=True, error=_read(folder + "/refused").decode("utf-8", "replace").strip()[:500])
        return end
    finally:
        if group:
            group.remove()


# --- the supervisor


class Line:
    """To the daemon. Without a socket nobody listens. `more`: another attempt may come, of the `left` ones."""

    def __init__(self, sock: socket.socket | None = None) -> None:
        self.sock, self.more, self.left = sock, False, ATTEMPTS

    def heard(self) -> bool:
        """Whether somebody listens now."""
        try:
            return self.sock is not None and self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except OSError as error:
            return isinstance(error, BlockingIOError)

    def say(self, kind: str, fact: str, claim: str = "null") -> bool:
        """`fact` and `claim` are JSON. False: it is not heard; the folder says it all."""
        more = "true" if self.more else "false"
        message = f'{{"kind": "{kind}", "fact": {fact}, "claim": {claim}, "more": {more}}}'.encode()
        try:
            return self.sock is not None and self.sock.send(message, socket.MSG_NOSIGNAL) > 0
        except OSError:
            return False


def settle() -> dict[str, Any]:
    """Make this process one that can supervise; what its claims say. WAKES are blocked."""
    pid = os.getpid()
    _try(os.setsid)  # it leads a session already where a shell has started it
    for option, value in ((PR_SET_NAME, b"mlpiped-step"), (PR_SET_CHILD_SUBREAPER, 1)):
        _libc.prctl(option, value, 0, 0, 0)
    return {"v": 1, "pid": pid, "start": start_time(pid), "boot": boot_id()}


def supervise(folder: str, order: dict[str, Any] | None, claimed: str, line: Line) -> None:
    """One job of which we hold the claim, to its witness."""
    started, children, plain = time.time(), Children(), False
    try:
        if order is None:
            with open(folder + "/job.json") as file:
                order = json.load(file)
            os.unlink(folder + "/job.json")
            for name, text in order.get("lacks", {}).items():  # folders, and files
                _try(os.mkdir, f"{folder}/{name}") if text is None else _write(f"{folder}/{name}", text.encode())
        elif order.get("params") is not None:
            os.chmod(folder + "/claim/params.json", 0o644)
            os.rename(folder + "/claim/params.json", folder + "/params.json")
        end = run(folder, order, children, lambda: line.say("claimed", "null", claimed))
        plain = not (end["signal"] or end["cancelled"] or end["timed_out"] or end["error"] or order.get("memory"))
    except CannotStart as error:
        end = {**NO_END, "error": str(error)}
    except Exception as error:
        children.bury()
        end = {**NO_END, "error": f"the supervisor failed: {type(error).__name__}: {str(error)[:500]}"}
    end.update(v=1, started=started, ended=time.time(), cpu=children.cpu, max_rss=children.max_rss)
    heard = line.heard()
    line.more = heard and plain and line.left > 0
    text = testify(folder, end, durable=not heard)
    if heard and not line.say("exited", text, claimed):
        line.more = False
        os.rename(folder + "/exit.json", folder + "/claim/exit.json")  # still locked: it is taken for alive meanwhile
        testify(folder, end, durable=True)


def attempt(folder: str, order: dict[str, Any] | None, record: dict[str, Any], line: Line) -> int:
    """One job; the exit status of a process that does no more. WAKES are blocked."""
    line.more, line.left = False, line.left - 1
    while line.sock and signal.sigtimedwait(CANCELS, 0):
        pass  # it was meant for the attempt before: this one is cancelled by nobody who does not know its claim
    files = {"exit.json": b" " * WITNESS_SIZE}
    if order and order.get("params") is not None:
        files["params.json"] = order["params"].encode()
    try:
        lock = claim(folder, record, files, order.get("make", ()) if order else None)
        if lock is None:
            line.say("lost_claim", "null")
            return LOST_CLAIM
        supervise(folder, order, json.dumps(record), line)
        os.close(lock)  # after the witness: who finds it free finds that too
        return 0
    except Exception as error:  # before the claim: nothing was done. After it: no witness, so the attempt is lost
        line.more = False
        line.say("failed", json.dumps(f"{type(error).__name__}: {str(error)[:500]}"))
        return 70


# --- the two ways to be started


def attend(sock: socket.socket, packet: bytes) -> int:
    """One attempt after the other, by the packets that come on the line; the exit status."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, HINT_WAIT)
    line, record, status = Line(sock), settle(), 0
    while packet:
        ask = json.loads(packet)
        if time.monotonic() > ask["until"]:
            return LOST_CLAIM
        status = attempt(ask["folder"], ask["order"], record, line)
        packet = sock.recv(PACKET) if line.more else b""
    return status


def serve(fd: int) -> int:
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects the supervisors
    signal.pthread_sigmask(signal.SIG_BLOCK, WAKES)  # for the supervisors; the zygote itself ends with the socket
    _libc.prctl(PR_SET_NAME, b"mlpiped-zygote", 0, 0, 0)
    gc.disable()
    gc.freeze()  # what is forked stays shared
    while True:
        packet, lines, _, _ = socket.recv_fds(sock, PACKET, 1)
        if not packet:
            return 0
        os.set_inheritable(lines[0], False)  # the step must not hold it: its end is the supervisor's end
        with socket.socket(fileno=lines[0]) as line:
            try:
                child = os.fork()
            except OSError as error:
                Line(line).say("refused", json.dumps(error.strerror))
                continue
            if child == 0:
                sock.close()
                _libc.signal(int(signal.SIGCHLD), None)  # SIG_DFL
                os._exit(attend(line, packet))


def main() -> int:
    (_, hard), (mode, place) = resource.getrlimit(resource.RLIMIT_NOFILE), sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_NOFILE, (STEP_FILES if hard < 0 else min(STEP_FILES, hard), hard))
    if mode == "--serve":
        return serve(int(place))
    signal.pthread_sigmask(signal.SIG_BLOCK, WAKES)
    return attempt(os.path.abspath(place), None, settle(), Line())


if __name__ == "__main__":
    sys.exit(main())
