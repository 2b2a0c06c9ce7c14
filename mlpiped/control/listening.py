"""The control socket: made by us with the right mode, or handed over by systemd.

Below systemd ours outlives us: it keeps a duplicate for the next daemon, so whoever asks during a restart waits in the
socket's queue and is answered by that one.

The caller holds the state folder's lock, so a socket file that nobody answers on is left over from a daemon that died.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from typing import TYPE_CHECKING

from mlpiped import notify_systemd
from mlpiped.errors import ConfigError, Fault, MlpipedError
from mlpiped.protocol import SOCKET_PATH_LIMIT

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from pathlib import Path

_FIRST_PASSED = 3
_BACKLOG = 128
_KEPT = "mlpiped-control-"  # and which file it was bound to: somebody may have put another one there


def listen(environ: MutableMapping[str, str], path: Path, group: str | None) -> tuple[socket.socket, bool]:
    """The control socket, and whether its file is ours to remove at the end: systemd's is not, nor one that it keeps.

    Raises as `bind` and `passed` do.
    """
    name = environ.get("LISTEN_FDNAMES", "")
    sock = passed(environ)
    if sock is not None and not name.startswith(_KEPT):
        return sock, False
    if sock is not None and name == kept_name(path):
        _give(path, _gid(group), group)
        return sock, False
    if sock is not None:
        sock.close()
        notify_systemd.let_go(name)
    sock = bind(path, group)
    return sock, not notify_systemd.keep(sock.fileno(), kept_name(path))


def anew(path: Path, group: str | None, name: str) -> tuple[socket.socket, bool]:
    """In place of one whose file somebody has removed. `name`: what was its `kept_name`. As `listen`, less `passed`."""
    notify_systemd.let_go(name)
    sock = bind(path, group)
    return sock, not notify_systemd.keep(sock.fileno(), kept_name(path))


def kept_name(path: Path) -> str:
    """By which systemd keeps the socket whose file is at `path`; "": none is there."""
    try:
        found = os.lstat(path)
    except OSError:
        return ""
    return f"{_KEPT}{found.st_dev:x}-{found.st_ino:x}"


def passed(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The socket that systemd hands over (LISTEN_FDS), or None. Takes the variables out of `environ`."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit() or int(count) < 1:
        return None
    sock = socket.socket(fileno=_FIRST_PASSED)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise MlpipedError("the socket from systemd is not a Unix stream socket", hint="use `ListenStream=/run/…`")
    sock.setblocking(False)
    os.set_inheritable(_FIRST_PASSED, False)
    return sock


def bind(path: Path, group: str | None) -> socket.socket:
    """A listening socket at `path`, mode 0660, of `group`. Makes its folder (0750) when that is missing.

    Raises MlpipedError with a sentence: path too long, a symlink or another file in the way, somebody answers there.
    """
    _check_length(path)
    gid = _gid(group)
    _make_folder(path.parent, gid)
    _admit(path, gid)
    _make_room(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    before = os.umask(0o117)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise MlpipedError(f"cannot make the control socket `{path}`: {_reason(error)}") from None
    finally:
        os.umask(before)
    try:
        _give(path, gid, group)
    except MlpipedError:
        sock.close()
        path.unlink(missing_ok=True)
        raise
    sock.listen(_BACKLOG)
    return sock


def _give(path: Path, gid: int | None, group: str | None) -> None:
    try:
        if gid is not None and os.lstat(path).st_gid != gid:
            os.chown(path, -1, gid, follow_symlinks=False)
    except OSError as error:
        hint = f"put the daemon's user into the group `{group}`"
        raise MlpipedError(
            f"cannot give the control socket to the group `{group}`: {_reason(error)}", hint=hint
        ) from None


def _check_length(path: Path) -> None:
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT:
        raise ConfigError(
            [
                Fault(
                    str(path),
                    0,
                    f"is too long for a socket: {length} bytes, at most {SOCKET_PATH_LIMIT}",
                    "set `socket` in `[control]`, or `runtime_dir` in `[daemon]`, to a shorter path",
                )
            ]
        )


def _gid(group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise MlpipedError(
            f"no group named `{group}` on this machine", hint="correct `group` in `[control]`, or make it: `groupadd`"
        ) from None


def _make_folder(folder: Path, gid: int | None) -> None:
    """The folder of the socket keeps strangers out: 0750, of the group that may read."""
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o750)
        if gid is not None:
            os.chown(folder, -1, gid)
        os.chmod(folder, 0o750)
    except FileExistsError:
        raise MlpipedError(f"`{folder}` is in the way: the control socket's folder would be there") from None
    except OSError as error:
        raise MlpipedError(
            f"cannot make the folder `{folder}` for the control socket: {_reason(error)}",
            hint="set `runtime_dir` in `[daemon]` to a folder that the daemon may write",
        ) from None


def _admit(path: Path, gid: int | None) -> None:
    """The group may have been named after the folder was made. A folder that holds more than the socket is not ours."""
    folder = path.parent
    try:
        found = os.stat(folder)
        ours = found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o750
        if gid not in (None, found.st_gid) and ours and set(os.listdir(folder)) <= {path.name}:
            os.chown(folder, -1, gid or 0)
    except OSError:
        return  # `doctor` tells who is kept out


def _make_room(path: Path) -> None:
    """Nothing lies at `path` afterwards; raises for everything but a socket that nobody answers on."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise MlpipedError(f"cannot look at the control socket `{path}`: {_reason(error)}") from None
    if stat.S_ISLNK(found.st_mode):
        raise MlpipedError(f"the control socket `{path}` is a symlink: refused", hint="remove it and start again")
    if not stat.S_ISSOCK(found.st_mode):
        raise MlpipedError(
            f"`{path}` is in the way: the control socket would be there, and it is no socket",
            hint="move it away, or set `socket` in `[control]` to another path",
        )
    if _answers(path):
        raise MlpipedError(
            f"somebody listens on the control socket `{path}` already",
            hint="another daemon uses it: stop that one, or set `socket` in `[control]` to another path",
        )
    path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
        knock.settimeout(1.0)
        try:
            knock.connect(str(path))
        except OSError as error:
            # Only a refusal proves that nobody is there: a full backlog or a time-out is a busy daemon.
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
        return True


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
