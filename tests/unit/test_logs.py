"""What the daemon writes to stderr."""

from __future__ import annotations

import io
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import structlog

from mlpiped import logs, notify_systemd


@pytest.fixture(autouse=True)
def _logging_is_left_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.raiseExceptions)
    yield
    root.handlers[:], root.level, logging.raiseExceptions = before
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def set_up(kind: logs.LogFormat, level: int | None = None) -> io.StringIO:
    stream = io.StringIO()
    logs.setup(kind, stream=stream, level=level)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("verb", "priority"), [("info", 6), ("warning", 4), ("error", 3), ("critical", 2)])
def test_a_journal_line_has_its_priority_in_front_of_the_json(verb: str, priority: int) -> None:
    stream = set_up("journal")
    getattr(structlog.get_logger("x"), verb)("it happened", run=7)
    text = stream.getvalue()
    assert text.startswith(f"<{priority}>{{")
    assert json.loads(text[3:]) | {"timestamp": ""} == {
        "timestamp": "",
        "level": verb,
        "event": "it happened",
        "run": 7,
    }


def test_json_is_the_same_without_the_priority() -> None:
    stream = set_up("json")
    structlog.get_logger("x").info("it happened")
    assert lines(stream)[0]["event"] == "it happened"


def test_the_standard_library_goes_through_the_same_pipeline() -> None:
    stream = set_up("json")
    logging.getLogger("some.library").warning("lost %s", "it", extra={"host": "gpu1"})
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["level"], line["host"]) == (
        "lost it",
        "some.library",
        "warning",
        "gpu1",
    )


def test_chatty_libraries_are_heard_from_warning_up() -> None:
    stream = set_up("json")
    for name in ("asyncssh", "apscheduler.scheduler", "aiohttp.access"):
        logging.getLogger(name).info("chat")
    logging.getLogger("asyncssh").warning("trouble")
    assert [line["event"] for line in lines(stream)] == ["trouble"]


@pytest.mark.parametrize("kind", ["journal", "json", "console"])
def test_local_variables_are_never_shown(kind: logs.LogFormat) -> None:
    stream = set_up(kind)

    def fail() -> None:
        password = "sesame" + "-open"
        raise ValueError(f"cannot log in, {len(password)} letters")

    try:
        fail()
    except ValueError:
        structlog.get_logger("x").exception("no")
        logging.getLogger("y").exception("no")
    assert "cannot log in" in stream.getvalue()
    assert "sesame-open" not in stream.getvalue()
    assert stream.getvalue().count("test_logs.py") >= 4


def test_an_exception_is_data_with_its_cause_and_the_members_of_a_group() -> None:
    stream = set_up("json")
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ExceptionGroup("both", [ValueError("one")]) from error
    except ExceptionGroup as group:
        structlog.get_logger("x").error("no", exc_info=group)
    (line,) = lines(stream)
    assert [e["type"] for e in line["exception"]] == ["ExceptionGroup", "KeyError"]
    assert line["exception"][0]["members"][0][0]["message"] == "one"


def test_a_field_is_cut_at_2_kib_and_stays_valid_text() -> None:
    stream = set_up("json")
    structlog.get_logger("x").info("big", text="é" * 5000, deep={"list": ["x" * 9000]}, data=b"y" * 9000)
    (line,) = lines(stream)
    for value in (line["text"], line["deep"]["list"][0], line["data"]):
        assert 2000 < len(value.encode()) <= logs.FIELD_LIMIT
    assert line["text"].endswith("é…")


def test_values_that_json_does_not_know_become_plain() -> None:
    stream = set_up("json")
    odd: dict[str, Any] = {
        "path": Path("/a/b"),
        "raw": b"\xff",
        "many": {3},
        "number": float("nan"),
        "name": "\udcff",
        "error": OSError("gone"),
    }
    structlog.get_logger("x").info("odd", **odd)
    (line,) = lines(stream)
    assert (line["path"], line["raw"], line["many"], line["error"]) == ("/a/b", "\\xff", [3], "gone")
    assert line["number"] == "nan"


def test_what_is_bound_to_the_task_is_in_every_line() -> None:
    stream = set_up("json")
    structlog.contextvars.bind_contextvars(run=12)
    structlog.get_logger("x").info("a")
    logging.getLogger("y").warning("b")
    assert [line["run"] for line in lines(stream)] == [12, 12]


def test_debug_lines_appear_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = set_up("json")
    structlog.get_logger("x").debug("hidden")
    assert stream.getvalue() == ""
    monkeypatch.setenv("MLPIPED_DEBUG", "1")
    stream = set_up("json")
    structlog.get_logger("x").debug("shown")
    assert lines(stream)[0]["event"] == "shown"


def test_a_second_set_up_replaces_the_first() -> None:
    log = structlog.get_logger("x")
    first, second = set_up("json"), set_up("console")
    log.info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_a_console_line_carries_no_control_characters_of_its_fields() -> None:
    stream = set_up("console")
    try:
        raise ValueError("\x1b[2Jgone")
    except ValueError:
        structlog.get_logger("x").exception("bad\x1b[31m name", name="a\nb")
    assert "\x1b" not in stream.getvalue()
    assert "a\\nb" in stream.getvalue()


@pytest.mark.parametrize(("variable", "coloured"), [("", True), ("1", False)])
def test_the_console_is_coloured_on_a_terminal_unless_no_color(
    variable: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    logs.setup("console", stream=stream)
    structlog.get_logger("x").info("hello")
    assert ("\x1b[" in stream.getvalue()) is coloured


def test_a_closed_stderr_harms_nobody() -> None:
    stream = set_up("json")
    stream.close()
    structlog.get_logger("x").info("into the void")


# --- what systemd is told -----------------------------------------------------------------------------------
@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        yield listener, {"NOTIFY_SOCKET": str(tmp_path / "notify")}


def test_systemd_gets_each_message_as_one_datagram(systemd: tuple[socket.socket, dict[str, str]]) -> None:
    listener, env = systemd
    assert notify_systemd.ready("2 running\nREADY=0", env)
    assert notify_systemd.status("3 running", env)
    assert notify_systemd.watchdog(env)
    assert notify_systemd.stopping(env=env)
    assert [listener.recv(4096) for _ in range(4)] == [
        b"READY=1\nSTATUS=2 running READY=0",
        b"STATUS=3 running",
        b"WATCHDOG=1",
        b"STOPPING=1",
    ]


def test_an_abstract_notify_socket_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("")  # the kernel picks an abstract name
        name = cast("bytes", listener.getsockname())
        listener.settimeout(5)
        assert notify_systemd.ready(env={"NOTIFY_SOCKET": "@" + name[1:].decode()})
        assert listener.recv(100) == b"READY=1"


@pytest.mark.parametrize("env", [{}, {"NOTIFY_SOCKET": "relative"}, {"NOTIFY_SOCKET": "/none/such"}])
def test_without_systemd_nothing_is_sent_and_nothing_raised(env: dict[str, str]) -> None:
    assert notify_systemd.ready("x", env) is False


@pytest.mark.parametrize(
    ("env", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_interval_is_only_for_the_process_it_names(env: dict[str, str], seconds: float | None) -> None:
    assert notify_systemd.watchdog_interval(env) == seconds
