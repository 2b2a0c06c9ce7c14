"""The executing side of a job folder (its format: `base.py`): claim the token, run the step, leave the witness.

Standard library only, and nothing of mlpiped: it runs as `python -I -S supervisor.py`, here and on other hosts.

    --serve FD     the zygote: forks a supervisor for each packet on the socket FD; ends with it. A fork costs a
                   fraction of a millisecond, a new interpreter thirty.
    --run FOLDER   one job, supervised by this very process. Exit status 75: somebody else had the token.

A packet is {"folder": …, "order": …, "until": …}. The order is what job.json would hold, and so in no file; "make"
(folders, parents first) and "params" (the text of params.json) name what the folder lacks. With null the folder has a
job.json. After `until` (monotonic seconds) the folder and its claim may have been removed: it is not carried out.

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
import stat
import sys
import time
from array import array

TYPE_CHECKING = False  # `typing` is not imported: what the zygote holds, every fork has to map
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    Say = Callable[..., None]

LOST_CLAIM = 75
WORDS = {"None": "null", "True": "true", "False": "false"}
SIGCHLD = int(signal.SIGCHLD)
WAKES = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})  # blocked, and waited for
CANCELS = frozenset({signal.SIGTERM, signal.SIGINT})
DEFAULTED = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
STEP_FILES = 1024  # soft RLIMIT_NOFILE of a step: what programs expect, where the daemon has raised its own
STEP_OOM_SCORE = 500  # when the host runs out of memory, steps go before the daemon and its supervisors
WITNESS_SIZE = 2048  # bytes; what the JSON leaves is spaces
PACKET = 100_000  # bytes; longer orders come as job.json
HINT_WAIT = array("l", (0, 50_000)).tobytes()  # a timeval: so long a hint waits for a daemon with ten of them unread
UNKILLABLE = 30.0  # seconds until a process that survives SIGKILL (in the kernel, on a dead disk) is left behind

_libc = ctypes.CDLL(None, use_errno=True)
_quote = json.encoder.encode_basestring_ascii
_decode = json.JSONDecoder().raw_decode


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


def _write(path: str, content: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(content)


def flat(record: Mapping[str, Any]) -> str:
    """JSON of a record of plain values, without `json`, of which a fork has to copy sixty pages to say as much."""
    words = [_quote(v) if isinstance(v, str) else WORDS.get(str(v)) or repr(v) for v in record.values()]
    return "{" + ", ".join(f'"{name}": {word}' for name, word in zip(record, words, strict=True)) + "}"


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


def claim(
    folder: str, record: Mapping[str, Any], files: Mapping[str, bytes] | None = None, make: Sequence[str] | None = None
) -> int | None:
    """Put `record` into the claim: the descriptor of its handle.json, locked; None when somebody else was first.

    One rename onto a folder that is not empty once it is there: only one can win, whose handle.json is complete and
    locked the instant it can be seen. At the return the claim is on the disk; what its handle.json says is of no use
    after a power cut. `files` come with it, and the folder and what is to `make` in it before: a full disk costs no
    attempt. Each mkdir is the same for all who build for this token: a half-built folder is as good as none.
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
        lock = _create(private + "/handle.json", flat(record).encode())
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
    try:
        names = os.listdir(path)
    except OSError:
        return
    for name in names:
        below = f"{path}/{name}"
        try:
            mode = os.lstat(below).st_mode
            if stat.S_ISDIR(mode):
                sync_tree(below)
            elif stat.S_ISREG(mode):
                fd = os.open(below, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except PermissionError:
            pass
    if names:
        sync_folder(path)


def _create(path: str, content: bytes) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        while content:
            content = content[os.write(fd, content) :]
    except OSError:
        os.close(fd)
        raise
    return fd


def testify(folder: str, end: Mapping[str, Any]) -> str:
    """Make exit.json of the file that came with the claim, in space that no step can have filled; its content."""
    text = flat(end)
    fd = os.open(folder + "/claim/exit.json", os.O_WRONLY | os.O_CLOEXEC)
    os.pwrite(fd, text.encode().ljust(WITNESS_SIZE), 0)
    os.fsync(fd)
    os.close(fd)
    os.rename(folder + "/claim/exit.json", folder + "/exit.json")
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
    """Start the step, in a process group of its own; its pid. What it opens ends with this process."""
    os.chdir(folder + "/work")
    mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    streams = [os.open(f"{folder}/{name}", mode, 0o644) for name in ("stdout", "stderr")]
    actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(streams, 1)]  # type: ignore[misc]
    shown = f"`{argv[0][:200]}`"
    try:
        if (name := _found(argv[0], env.get("PATH", os.defpath))) is None:
            raise CannotStart(f"command not found: {shown}")
        return os.posix_spawn(name, argv, env, file_actions=actions, setpgroup=0, setsigmask=(), setsigdef=DEFAULTED)
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


def _reap(main: int) -> tuple[int | None, bool]:
    """Collect all that ended: (the status of `main` if it was among them, whether any child is left)."""
    status = None
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status, False
        if pid == 0:
            return status, True
        if pid == main:
            status = code


def signal_all(number: int, main: int = 0) -> None:
    """To the group of `main` (0: it was reaped, its number may be another's by now), and to what left the group."""
    if main:
        _try(os.killpg, main, number)
    for pid, group, start in descendants(os.getpid()):
        if group != main and (fd := open_process(pid, start)) is not None:
            _try(signal.pidfd_send_signal, fd, number)
            os.close(fd)


def bury(patience: float = UNKILLABLE) -> bool:
    """SIGKILL until nothing that we started or adopted is left. False: some live on after `patience` seconds."""
    until = time.monotonic() + patience
    while _reap(0)[1]:
        signal_all(signal.SIGKILL)
        if time.monotonic() > until:
            return False
        signal.sigtimedwait({signal.SIGCHLD}, 0.02)
    return True


def watch(main: int, timeout: float | None, grace: float) -> dict[str, Any]:
    """Until the step's first process has ended and nothing else of it lives; enforces the timeout and SIGTERM."""
    end = _end()
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
                signal_all(signal.SIGTERM, main)
                kill_at = now + grace
        elif now >= kill_at:
            signal_all(signal.SIGKILL, main)
            kill_at = now + 1.0
    code = os.waitstatus_to_exitcode(reaped[0] or 0)
    end["code"], end["signal"] = (code, None) if code >= 0 else (None, -code)
    if reaped[1] and not bury():  # the step is over when its first process is
        end["error"] = "some of its processes survive SIGKILL: they hang in the kernel"
    return end


def _memory_group(token: str, limit: int) -> Any:
    """By the file beside this one; None, and so no limit, where that is missing or the host allows no group."""
    from importlib.machinery import SourceFileLoader

    path = os.path.dirname(os.path.abspath(__file__)) + "/memory_group.py"
    module = type(sys)("memory_group")
    if not os.path.exists(path):
        return None
    SourceFileLoader("memory_group", path).exec_module(module)
    return module.MemoryGroup.make(token, limit)


def run(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Execute what job.json says; the contents of exit.json, less the times."""
    if signal.sigtimedwait(CANCELS, 0) is not None:
        return _end(cancelled=True)
    group = _memory_group(job["token"], job["memory"]) if job.get("memory") else None
    try:
        inherit = tuple(job.get("inherit", ()))  # what the queue has put into our environment: its cards, its ids
        env = {name: value for name, value in os.environ.items() if name.startswith(inherit)} if inherit else {}
        step = folder, job["argv"], {**env, **job["env"]}
        main = group.spawn(lambda: spawn(*step)) if group else spawn(*step)
        _try(_write, f"/proc/{main}/oom_score_adj", b"%d" % STEP_OOM_SCORE)  # may be over already, or ours is higher
        end = watch(main, job.get("timeout"), job.get("grace", 10.0))
        if group and end["code"] != 0 and group.killed():
            end["error"] = f"out of memory: it needed more than its limit of {job['memory'] / 2**20:.0f} MiB"
        return end
    finally:
        if group:
            group.remove()


def _end(cancelled: bool = False, error: str | None = None) -> dict[str, Any]:
    return {"code": None, "signal": None, "timed_out": False, "cancelled": cancelled, "error": error}


def supervise(folder: str, order: dict[str, Any] | None, boot: str, say: Say) -> int:
    """One attempt, from claim to witness; the exit status of this process. WAKES are blocked."""
    pid = os.getpid()
    if os.getpgid(0) != pid:  # Slurm starts a leader of a group, which cannot, and need not
        os.setsid()
    for option, value in ((PR_SET_NAME, b"mlpiped-step"), (PR_SET_CHILD_SUBREAPER, 1)):
        _libc.prctl(option, value, 0, 0, 0)
    record = {"v": 1, "pid": pid, "start": start_time(pid), "boot": boot}
    files = {"exit.json": b" " * WITNESS_SIZE}
    params = order.get("params") if order else None
    if params is not None:
        files["params.json"] = params.encode()
    lock = claim(folder, record, files, order.get("make", ()) if order else None)
    if lock is None:
        say("lost_claim", "null")
        return LOST_CLAIM
    say("claimed", flat(record))
    started = time.time()
    try:
        if params is not None:
            os.chmod(folder + "/claim/params.json", 0o644)
            os.rename(folder + "/claim/params.json", folder + "/params.json")
        if order is None:
            with open(folder + "/job.json") as file:
                order = json.load(file)
            os.unlink(folder + "/job.json")
        end = run(folder, order)
        if end["code"] == 0:
            sync_tree(folder + "/out")  # a witness that outlives a power cut must not vouch for bytes that do not
    except CannotStart as error:
        end = _end(error=str(error))
    except Exception as error:
        bury()
        end = _end(error=f"the supervisor failed: {type(error).__name__}: {str(error)[:500]}")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    end.update(v=1, started=started, ended=time.time(), cpu=usage.ru_utime + usage.ru_stime)
    end["max_rss"] = usage.ru_maxrss * 1024
    say("exited", testify(folder, end))
    return 0


# --- the two ways to be started


def _attempt(folder: str, order: dict[str, Any] | None, boot: str, say: Say) -> int:
    try:
        return supervise(folder, order, boot, say)
    except Exception as error:  # before the claim: nothing was done. After it: no witness, so the attempt is lost
        say("failed", json.dumps(f"{type(error).__name__}: {str(error)[:500]}"))
        return 70


def serve(fd: int) -> int:
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, HINT_WAIT)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects the supervisors
    signal.pthread_sigmask(signal.SIG_BLOCK, WAKES)  # for the supervisors; the zygote itself ends with the socket
    _libc.prctl(PR_SET_NAME, b"mlpiped-zygote", 0, 0, 0)
    boot = boot_id()
    gc.disable()
    gc.freeze()  # what is forked stays shared
    while packet := sock.recv(PACKET):
        failure = None
        try:
            if os.fork():
                continue
        except OSError as error:
            failure = error.strerror
        ask = _decode(packet.decode())[0]
        token = os.path.basename(ask["folder"])

        def say(kind: str, fact: str, token: str = token) -> None:
            """`fact` is JSON."""
            try:
                sock.send(f'{{"token": "{token}", "kind": "{kind}", "fact": {fact}}}'.encode(), socket.MSG_NOSIGNAL)
            except OSError:
                pass  # nobody listens: the folder says it all

        if failure is not None:
            say("refused", json.dumps(failure))
            continue
        _libc.signal(SIGCHLD, None)  # SIG_DFL
        late = time.monotonic() > ask["until"]
        os._exit(LOST_CLAIM if late else _attempt(ask["folder"], ask["order"], boot, say))
    return 0


def main() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = STEP_FILES if hard == resource.RLIM_INFINITY else min(STEP_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    mode, place = sys.argv[1:]
    if mode == "--serve":
        return serve(int(place))
    signal.pthread_sigmask(signal.SIG_BLOCK, WAKES)
    return _attempt(os.path.abspath(place), None, boot_id(), lambda kind, fact: None)


if __name__ == "__main__":
    sys.exit(main())
