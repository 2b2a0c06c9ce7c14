"""journald's own protocol: a line together with its fields, so that `journalctl MLPIPED_RUN=12` finds all of a run."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
_NO_NAME = re.compile(r"[^A-Z0-9_]")
_KNOWN = frozenset({"timestamp", "level"})  # journald has its own, and PRIORITY


def reads(stream: TextIO, env: Mapping[str, str] = os.environ) -> bool:
    """Whether `stream` goes to journald, as systemd says in `$JOURNAL_STREAM`, and not to a file or a pipe."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return env.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class JournalHandler(logging.StreamHandler[TextIO]):
    """Takes what `logs` makes for journald: `<priority>{JSON}`. MESSAGE is the JSON, and each field is there by itself.

    What journald does not take at once goes to the stream, which it reads too.
    """

    def __init__(self, stream: TextIO, path: str = SOCKET) -> None:
        super().__init__(stream)
        self._path = path
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._channel.sendto(datagram(self.format(record)), self._path)
        except Exception:
            super().emit(record)

    def close(self) -> None:
        self._channel.close()
        super().close()


def datagram(line: str) -> bytes:
    """The entry for a line `<priority>{JSON object}`."""
    priority, text = line[1], line[3:]
    fields = {"MESSAGE": text, "PRIORITY": priority, "SYSLOG_IDENTIFIER": "mlpiped", **_fields(json.loads(text))}
    return b"".join(_entry(name, value) for name, value in fields.items())


def _fields(said: Mapping[str, Any]) -> dict[str, str]:
    return {
        "MLPIPED_" + _NO_NAME.sub("_", key.upper())[:48]: value if isinstance(value, str) else json.dumps(value)
        for key, value in said.items()
        if key not in _KNOWN and value is not None
    }


def _entry(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:  # its length in front, else the next line would be taken for a field
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"
