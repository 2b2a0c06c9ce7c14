"""What journald gets: the line as it is, and each of its fields by itself."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
from typing import TYPE_CHECKING

from mlpiped import journal

if TYPE_CHECKING:
    from pathlib import Path


def entry(data: bytes) -> dict[str, str]:
    """Reads what `journal` writes, by journald's rules."""
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size, data = int.from_bytes(data[:8], "little"), data[8:]
            value, data = data[:size], data[size + 1 :]
        found[name.decode()] = value.decode()
    return found


def test_each_field_has_a_name_of_its_own_and_the_line_stays_whole() -> None:
    text = json.dumps({"timestamp": "t", "level": "warning", "event": "lost", "run": 12, "step": "a", "x-y": [1]})
    assert entry(journal.datagram("<4>" + text)) == {
        "MESSAGE": text,
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "mlpiped",
        "MLPIPED_EVENT": "lost",
        "MLPIPED_RUN": "12",
        "MLPIPED_STEP": "a",
        "MLPIPED_X_Y": "[1]",
    }


def test_a_newline_in_a_value_makes_no_field_of_what_follows() -> None:
    text = json.dumps({"event": "one\n_PID=1\nPRIORITY=0"})
    found = entry(journal.datagram("<6>" + text))
    assert found["MLPIPED_EVENT"] == "one\n_PID=1\nPRIORITY=0"
    assert found["PRIORITY"] == "6"
    assert "_PID" not in found


def test_what_journald_does_not_take_goes_to_the_stream(tmp_path: Path) -> None:
    out = io.StringIO()
    handler = journal.JournalHandler(out, str(tmp_path / "journal"))
    line = '<6>{"event":"x"}'
    record = logging.LogRecord("a", logging.INFO, "f", 1, line, (), None)
    handler.emit(record)
    assert out.getvalue() == line + "\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(str(tmp_path / "journal"))
        handler.emit(record)
        assert entry(journald.recv(4096))["MLPIPED_EVENT"] == "x"
    assert out.getvalue() == line + "\n"
    handler.close()


def test_only_the_very_stream_that_systemd_names_is_journalds(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        found = os.fstat(stream.fileno())
        assert journal.reads(stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        assert not journal.reads(stream, {"JOURNAL_STREAM": f"{found.st_dev}:1"})
        assert not journal.reads(stream, {})
    assert not journal.reads(io.StringIO(), {"JOURNAL_STREAM": "1:1"})
