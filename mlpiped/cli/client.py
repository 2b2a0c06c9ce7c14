"""HTTP/1.1 over a Unix socket, written by hand: `http.client` alone would cost as much as everything else of `status`.

One connection, one request. What the daemon refuses comes back as the error that it means, with its exit status.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

from mlpiped.cli.render import shown
from mlpiped.errors import Conflict, MlpipedError, NotPermitted, Unreachable, UsageError
from mlpiped.protocol import SOCKET_PATH_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CONNECT_TIME = 5.0  # seconds
ANSWER_TIME = 60.0  # seconds; streams send a sign of life every 10 s
_LINE_LIMIT = 64 << 10
_ERRORS: dict[int, type[MlpipedError]] = {403: NotPermitted, 409: Conflict}


def find_socket(explicit: str | None, env: Mapping[str, str]) -> str:
    """`--socket`, $MLPIPED_SOCKET, the socket of $MLPIPED_CONFIG's file, the system's, the user's own."""
    named = explicit or env.get("MLPIPED_SOCKET")
    if named:
        return os.path.abspath(os.path.expanduser(named))
    if env.get("MLPIPED_CONFIG"):
        from mlpiped.config import find as config_find

        return str(config_find.socket_of(config_find.find(None, env)))
    system = "/run/mlpiped/control.sock"
    runtime = env.get("XDG_RUNTIME_DIR")
    own = os.path.join(runtime, "mlpiped/control.sock") if runtime else None
    if own is not None and not os.path.exists(system) and os.path.exists(own):
        return own
    return system


class Client:
    """`socket_path` is where the daemon listens. Raises Unreachable (exit 3) with what to do when it does not."""

    def __init__(self, socket_path: str) -> None:
        self.path = socket_path

    def get(self, path: str, *, timeout: float | None = ANSWER_TIME) -> Any:
        return self._json("GET", path, None, timeout)

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = ANSWER_TIME) -> Any:
        return self._json("POST", path, body or {}, timeout)

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float | None) -> Any:
        with self.open(method, path, body, timeout=timeout) as answer:
            return answer.document()

    def events(self, path: str, last: int | None = None) -> Iterator[tuple[str, Any]]:
        """Server-sent events as (event, document), until the one named `end` (given too) or the daemon goes away.

        Raises Unreachable when it goes away without a word.
        """
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        with self.open("GET", path, None, headers=headers) as answer:
            event, data = "message", ""
            for line in answer.lines():
                if line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("data: "):
                    data = line[6:]
                elif not line and data:
                    value = json.loads(data)
                    if event == "error":
                        raise _error(500, value)
                    yield event, value
                    if event == "end":
                        return
                    event, data = "message", ""
        raise Unreachable("the daemon has gone away in the middle of the answer", hint=_hint(self.path))

    def open(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = ANSWER_TIME,
    ) -> Answer:
        """Ask, and read the answer's head. The caller closes it. Raises the error that a refusal means."""
        data = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", "Host: mlpiped", "User-Agent: mlpipectl/1", "Connection: close"]
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        head += [f"{name}: {value}" for name, value in (headers or {}).items()]
        sock = self._connect()
        sock.settimeout(timeout)
        try:
            sock.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + data)
            answer = Answer(sock, self.path)
            if answer.status >= 400:
                raise _error(answer.status, answer.document())
        except OSError:  # it stops between our connection and our question
            sock.close()
            raise Unreachable("the daemon has gone away before it was asked", hint=_hint(self.path)) from None
        except BaseException:
            sock.close()
            raise
        return answer

    def _connect(self) -> socket.socket:
        if len(os.fsencode(self.path)) > SOCKET_PATH_LIMIT:
            raise Unreachable(
                f"the path of the socket is too long: {len(os.fsencode(self.path))} bytes, at most {SOCKET_PATH_LIMIT}",
                hint="give a shorter one with --socket or $MLPIPED_SOCKET",
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(CONNECT_TIME)
        try:
            sock.connect(self.path)
        except FileNotFoundError:
            sock.close()
            raise Unreachable(f"no daemon: there is no socket at `{shown(self.path)}`", hint=_hint(self.path)) from None
        except PermissionError:
            sock.close()
            raise NotPermitted(
                f"you may not open the daemon's socket `{shown(self.path)}`",
                hint="ask the administrator to put you into the group that may read (`group` in `[control]`)",
            ) from None
        except OSError as error:
            sock.close()
            reason = (error.strerror or str(error) or "no answer").lower()
            raise Unreachable(f"no daemon answers on `{shown(self.path)}`: {reason}", hint=_hint(self.path)) from None
        self._check_server(sock)
        return sock

    def _check_server(self, sock: socket.socket) -> None:
        """Anybody could listen in a folder that anybody may write: the server must be one whom that path trusts."""
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        trusted = {0, os.getuid()}
        folder = os.stat(os.path.dirname(self.path))
        if not folder.st_mode & 0o002:
            trusted.add(folder.st_uid)
        if uid not in trusted:
            sock.close()
            raise Unreachable(
                f"the server on `{shown(self.path)}` runs as user {uid}, who is neither you, nor root, nor the owner "
                "of the socket's folder: refused",
                hint="somebody may pretend to be the daemon: ask the administrator",
            )


class Answer:
    """One reply: `status`, `headers` (lower case), and a body that is read once, whole or bit by bit."""

    def __init__(self, sock: socket.socket, path: str) -> None:
        self._sock = sock
        self._path = path
        self._file = sock.makefile("rb")
        words = self._line().split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise Unreachable(f"what answers on `{shown(path)}` is no mlpiped", hint=_hint(path))
        self.status = int(words[1])
        self.headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._sock.close()

    def document(self) -> Any:
        try:
            return json.loads(b"".join(self.chunks()))
        except ValueError:
            raise Unreachable(f"what answers on `{shown(self._path)}` is no mlpiped", hint=_hint(self._path)) from None

    def lines(self) -> Iterator[str]:
        """Lines of a text that may go on for long; each as soon as it is whole."""
        rest = b""
        for chunk in self.chunks():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line.rstrip(b"\r").decode("utf-8", "replace")

    def chunks(self) -> Iterator[bytes]:
        """The body. Raises Unreachable when it ends before its end."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int(self._line().split(";")[0] or "0", 16):
                    yield self._exactly(size)
                    self._line()
            elif "content-length" in self.headers:
                left = int(self.headers["content-length"])
                while left:
                    data = self._file.read1(min(left, 1 << 20))
                    if not data:
                        raise ConnectionResetError
                    left -= len(data)
                    yield data
            else:
                while data := self._file.read1(1 << 20):
                    yield data
        except TimeoutError:
            raise Unreachable("the daemon does not go on with its answer", hint=_hint(self._path)) from None
        except OSError:
            raise Unreachable("the daemon has gone away in the middle of the answer", hint=_hint(self._path)) from None

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise ConnectionResetError
        return data

    def _line(self) -> str:
        try:
            line = self._file.readline(_LINE_LIMIT)
        except TimeoutError:
            raise Unreachable(f"the daemon on `{shown(self._path)}` does not answer", hint=_hint(self._path)) from None
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise Unreachable("the daemon has gone away before its answer was whole", hint=_hint(self._path))
        return line.strip().decode("latin-1")


def _error(status: int, value: Any) -> MlpipedError:
    """A refusal as the error that it means; what it says goes to a terminal, so nothing in it may act there."""
    fault = value.get("error") if isinstance(value, dict) else None
    fault = fault if isinstance(fault, dict) else {}
    message = "\n".join(shown(line) for line in str(fault.get("message") or f"HTTP {status}").split("\n"))
    hint = None if fault.get("hint") is None else shown(str(fault["hint"]))
    kind = _ERRORS.get(status) or (Unreachable if status == 503 else UsageError if status < 500 else MlpipedError)
    return kind(message, hint=hint)


def _hint(path: str) -> str:
    if path == "/run/mlpiped/control.sock":
        return "is it running? `systemctl status mlpiped`; another socket: --socket or $MLPIPED_SOCKET"
    return "start it with `mlpiped serve`, or name another socket with --socket or $MLPIPED_SOCKET"
