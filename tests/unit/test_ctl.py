"""`mlpipectl` as a process against the real API: exit statuses, JSON, what a terminal sees and what a pipe gets."""

from __future__ import annotations

import getpass
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from control_stage import CTL, Stage, staged

from mlpiped.cli import graph, render
from mlpiped.cli.client import Client, find_socket
from mlpiped.cli.ctl import parser
from mlpiped.cli.verbs import words
from mlpiped.control.server import ControlServer
from mlpiped.errors import Fault, Unreachable, UsageError
from mlpiped.ledger import StepRow, moves
from mlpiped.model import RunOutcome, StepOutcome, StepState

pytestmark = pytest.mark.anyio
ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
EVIL = "a\x1b[31mred\x07\u202eevil\x9b\nnext"


# --- starts fast ----------------------------------------------------------------------------------------------------
async def test_status_is_printed_without_the_modules_that_make_a_client_slow() -> None:
    heavy = ("pydantic", "asyncio", "anyio", "aiohttp", "structlog", "sqlite3", "http.client", "urllib.request", "ssl",
             "email", "logging", "datetime", "subprocess", "shutil", "tempfile", "tomllib", "mlpiped.spec",
             "mlpiped.config", "mlpiped.sdk", "mlpiped.daemon", "mlpiped.ledger", "mlpiped.control")  # fmt: skip
    code = "import sys; from mlpiped.cli.ctl import main; print(main(['status']), *sys.modules, file=sys.stderr)"
    async with staged() as stage:
        await stage.whole(outcome=RunOutcome.FAILED)
        done = await anyio.run_process([sys.executable, "-c", code], env=stage.env(), stdin=None)
    status, *modules = done.stderr.decode().split()
    assert status == "0"
    assert b"last failures" in done.stdout
    found = [m for m in modules if any(m == h or m.startswith(f"{h}.") for h in heavy)]
    # An editable install brings a finder of its own, which is not ours to judge.
    base = await anyio.run_process(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], env=stage.env(), stdin=None
    )
    assert sorted(set(found) - set(base.stdout.decode().split())) == []


# --- exit statuses --------------------------------------------------------------------------------------------------
async def test_exit_statuses_are_those_of_the_contract() -> None:
    async with staged() as stage:
        good, bad, going = await stage.whole(), await stage.whole(outcome=RunOutcome.FAILED), await stage.run()
        await stage.begin(going, 0, "t")
        table: list[tuple[int, str]] = [
            (0, "status"), (0, "pipelines"), (0, "schedules"), (0, "show digits"), (0, f"show {good}"), (0, "runs"),
            (0, "plan digits"), (0, f"why {good}/train"), (0, f"wait {good}"), (1, f"wait {bad}"), (0, "doctor"),
            (1, f"wait {going} --timeout 50ms"), (0, f"metrics {good}"), (0, "compute"), (0, "gc --plan"), (0, "gc"),
            (0, "compute drain local"), (0, "compute undrain local"), (2, "compute drain lokal"), (2, "compute drain"),
            (0, "reload"), (0, "pause digits"), (0, "resume digits"), (0, f"cancel {going}"), (0, f"retry {bad}"),
            (1, f"cancel {good}"), (1, f"retry {going}"), (0, "events"), (0, "completion bash"), (0, f"logs {good}"),
            (2, "show digts"), (2, "show 99"), (2, "run digts"), (2, "run digits -p rat=1"), (2, "run digits -p rate"),
            (2, "run digits --force trian"), (2, "why 1"), (2, f"why {good}/trian"), (2, "shwo"), (2, "runs --stat x"),
            (2, "gc --pan"), (2, f"logs {good}/trian"), (2, "get 1"), (2, f"get {good}/modl"), (2, "wait x"),
            (2, f"wait {good} --timeout soon"), (2, "plan nowhere.py"), (2, "runs --since soon"), (2, ""),
            (2, "runs --tag x"), (2, "runs -n 0"), (2, "events -n x"), (2, f"logs {good} --attempt 1"),
        ]  # fmt: skip
        wrong = []
        async with anyio.create_task_group() as tasks:
            limit = anyio.CapacityLimiter(4)

            async def one(expected: int, line: str) -> None:
                async with limit:
                    done = await stage.ctl(*line.split())
                if done.code != expected or (expected and not done.err) or "Traceback" in done.err:
                    wrong.append(f"`{line}`: {done.code}, not {expected}: {done.err}")

            for expected, line in table:
                tasks.start_soon(one, expected, line)
    assert not wrong, "\n".join(wrong)


async def test_no_daemon_is_3_and_names_the_socket_and_what_to_do(tmp_path: Path) -> None:
    async with staged(serve=False) as stage:
        for path, words_ in (
            (tmp_path / "none", "there is no socket at"),
            (tmp_path, "no daemon answers on"),
            (tmp_path / ("x" * 120), "too long: "),
        ):
            done = await stage.ctl("status", "--socket", path)
            assert done.code == 3
            assert words_ in done.err
            assert "hint: " in done.err
            assert done.out == ""
        dead = tmp_path / "dead"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(dead))
        done = await stage.ctl("--socket", dead, "status")
        assert (done.code, done.out) == (3, "")
        assert f"no daemon answers on `{dead}`: connection refused" in done.err
        assert "mlpiped serve" in done.err


async def test_something_else_on_the_socket_is_3(tmp_path: Path) -> None:
    async with staged(serve=False) as stage:
        for answer in (
            b"220 mail\r\n",
            b"",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            b"HTTP/1.1 200 OK\r\n",
        ):
            path = tmp_path / f"s{len(answer)}"
            listener = await anyio.create_unix_listener(path)

            async def serve(stream: Any, answer: bytes = answer) -> None:
                async with stream:
                    await stream.receive()
                    await stream.send(answer or b" ")

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, serve)
                done = await stage.ctl("status", "--socket", path)
                tasks.cancel_scope.cancel()
            await listener.aclose()
            assert done.code == 3, (answer, done)
            assert "Traceback" not in done.err


def open_to_all(stage: Stage) -> None:
    stage.folder.chmod(0o755)
    stage.socket.parent.chmod(0o755)
    stage.socket.chmod(0o666)


BECOME = "import os; os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534); "
READY = "import locale, tarfile, tempfile, mlpiped.cli.verbs.files, mlpiped.cli.verbs.overview, mlpiped.cli.verbs.act; "


def as_nobody(stage: Stage, *line: object, cwd: str = "/") -> subprocess.CompletedProcess[str]:
    """The verb as another user. He may not be able to read this Python, so it is loaded before he takes over."""
    code = f"{READY}from mlpiped.cli.ctl import main; {BECOME}raise SystemExit(main({[str(word) for word in line]!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], env=stage.env(), cwd=cwd, capture_output=True, text=True, timeout=30, check=False
    )


@ROOT_ONLY
async def test_peer_who_may_not_ask_is_4_at_the_door_and_inside() -> None:
    async with staged() as stage:
        stage.folder.chmod(0o755)
        done = await anyio.to_thread.run_sync(as_nobody, stage, "status")
        assert done.returncode == 4
        assert "you may not open the daemon's socket" in done.stderr
        open_to_all(stage)
        done = await anyio.to_thread.run_sync(as_nobody, stage, "status")
        assert (done.returncode, done.stdout) == (4, "")
        assert "error: `nobody` may not read from this daemon\nhint: " in done.stderr
        stage.access(group="nogroup")
        assert (await anyio.to_thread.run_sync(as_nobody, stage, "status")).returncode == 0
        done = await anyio.to_thread.run_sync(as_nobody, stage, "run", "digits")
        assert done.returncode == 4
        assert "`nobody` may not start `digits`" in done.stderr


@ROOT_ONLY
async def test_server_of_a_stranger_in_a_folder_that_all_may_write_is_refused(tmp_path: Path) -> None:
    for folder in [tmp_path, *tmp_path.parents][:-2]:
        folder.chmod(folder.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    path = tmp_path / "s"
    listen = f"s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen(); print(1, flush=True)"
    code = f"import socket, time; {BECOME}{listen}; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as fake:
        assert fake.stdout is not None
        try:
            assert fake.stdout.readline() == b"1\n"
            with pytest.raises(Unreachable, match="neither you, nor root, nor the owner"):
                Client(str(path)).get("/v1/status")
            os.chown(tmp_path, 65534, 65534)
            tmp_path.chmod(0o755)  # now the folder is that user's own: his daemon is to be trusted with it
            sock = Client(str(path))._connect()
            sock.close()
        finally:
            fake.kill()


# --- JSON -----------------------------------------------------------------------------------------------------------
async def test_every_verb_prints_one_json_document() -> None:
    async with staged() as stage:
        run = await stage.whole()
        (stage.folder / "p.py").write_text("")
        lines = ["status", "pipelines", "schedules", "show digits", f"show {run}", "plan digits", "plan p.py", "runs",
                 f"why {run}/train", f"wait {run}", f"metrics {run}", "compute", "compute drain local",
                 "gc --plan", "gc", "reload",
                 "pause digits", "resume digits", "events", "doctor", "run digits", "submit p.py",
                 f"get {run}/clean"]  # fmt: skip
        for line in lines:
            done = await stage.ctl(*line.split(), "--json")
            assert done.code == 0, done
            document = json.loads(done.out)
            assert isinstance(document, dict), line
            assert done.out.count("\n") == 1
        shown = json.loads((await stage.ctl("--json", "show", run)).out)
        assert shown == await stage.get(f"/v1/runs/{run}")
        for line in (f"logs {run}", f"events -f --run {run}"):
            done = await stage.ctl(*line.split(), "--json")
            assert done.code == 0
            assert len([json.loads(each) for each in done.out.splitlines()]) >= 2


async def test_run_prints_its_number_and_gives_what_was_written() -> None:
    async with staged() as stage:
        line = "run digits -p rate=0.5 -p fast=true -p label=a=b --tag why=paper --force train --target train"
        done = await stage.ctl(*line.split())
        assert (done.code, done.out) == (0, "1\n")
        assert "mlpipectl logs 1 -f" in done.err
        [(_, asked)] = stage.acts.asked
        assert asked["parameters"] == {"rate": 0.5, "fast": True, "label": "a=b"}
        assert (asked["force"], asked["target"], asked["tags"]) == (["train"], "train", {"why": "paper"})
        assert asked["kind"] == "manual"
        await stage.ctl("run", "digits", "--force")
        assert stage.acts.asked[-1][1]["force"] is True


async def test_file_is_submitted_by_its_absolute_path() -> None:
    async with staged() as stage:
        (stage.folder / "p.py").write_text("")
        assert (await stage.ctl("submit", "p.py", cwd=stage.folder)).code == 0
        assert stage.acts.asked[0][1]["file"] == str(stage.folder / "p.py")


# --- what a terminal sees -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("zażółć 漢字 🙂", "zażółć 漢字 🙂"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x00\x07\x7f", "\\x00\\x07\\x7f"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\u2028\u200b\ufeff", "\\u2028\\u200b\\ufeff"),
        ("\udcff", "\\xff"),
    ],
)
async def test_what_acts_on_a_terminal_is_shown_instead(text: str, shown: str) -> None:
    assert render.shown(text) == shown


async def test_log_keeps_lines_and_tabs_and_nothing_else_that_acts() -> None:
    assert render.shown_log("a\tb\r\nc\n") == "a\tb\nc\n"
    assert render.shown_log("10%\r20%\x1b]0;title\x07\n") == "10%\\r20%\\x1b]0;title\\x07\n"


def on_terminal(stage: Stage, *line: object, env: dict[str, str] | None = None) -> tuple[int, str]:
    """What the verb writes to a terminal, with its exit status."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [str(CTL), *map(str, line)], stdout=slave, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        env=stage.env() | {"TERM": "xterm"} | (env or {}), cwd=stage.folder,
    )  # fmt: skip
    os.close(slave)
    data = b""
    try:
        while piece := os.read(master, 65536):
            data += piece
    except OSError:  # the other end is closed
        pass
    os.close(master)
    return process.wait(30), data.decode(errors="surrogateescape").replace("\r\n", "\n")


async def test_terminal_gets_harmless_logs_and_a_pipe_gets_the_bytes() -> None:
    async with staged() as stage:
        run = await stage.run()
        await stage.begin(run, 0, "t")
        data = b"\x1b[31mred\x1b[0m \xff\xfe\xe2\x80\xae done\r\n"
        stage.job("t", stdout=data)
        done = await stage.ctl("logs", f"{run}/prepare")
        assert done.raw == data
        _, seen = await anyio.to_thread.run_sync(on_terminal, stage, "logs", f"{run}/prepare")
        assert seen == "\\x1b[31mred\\x1b[0m \\xff\\xfe\\u202e done\n"
        _, raw = await anyio.to_thread.run_sync(on_terminal, stage, "logs", f"{run}/prepare", "--raw")
        assert raw == data.decode(errors="surrogateescape")


async def test_names_and_sentences_from_outside_cannot_act_in_tables_or_errors() -> None:
    async with staged() as stage:
        run = await stage.run(owner=EVIL, tags={"t": EVIL})
        await stage.ledger.write(moves.add_steps(run, [StepRow(0, "prepare", why=EVIL)], stage.now))
        stage.plugins.faults = [Fault(EVIL, 1, EVIL, EVIL)]
        for line in (("runs",), ("show", run), ("status",), ("pipelines",), ("why", f"{run}/prepare"), ("doctor",)):
            done = await stage.ctl(*line)
            assert "\x1b" not in done.out + done.err, line
            assert "\u202e" not in done.out + done.err
            assert "\x9b" not in done.out + done.err
        done = await stage.ctl("show", "\x1b[31m")
        assert "\x1b" not in done.err


async def test_colour_is_for_terminals_and_no_color_turns_it_off() -> None:
    async with staged() as stage:
        await stage.whole()
        assert "\x1b[" not in (await stage.ctl("runs")).out
        _, plain = await anyio.to_thread.run_sync(lambda: on_terminal(stage, "runs", env={"NO_COLOR": "1"}))
        assert "\x1b[" not in plain
        _, coloured = await anyio.to_thread.run_sync(on_terminal, stage, "runs")
        assert "\x1b[32msucceeded\x1b[0m" in coloured
        _, document = await anyio.to_thread.run_sync(lambda: on_terminal(stage, "runs", "--json"))
        assert json.loads(document)["runs"][0]["outcome"] == "succeeded"


async def test_table_lines_up_whatever_the_width_of_its_letters() -> None:
    screen = render.Screen()
    text = screen.table(["NAME", "N", "WHY"], [["a", 1, "x"], ["漢字", 22, "y"], ["longer", None, "z"]])
    assert text == "NAME    N   WHY\na       1   x\n漢字    22  y\nlonger  -   z"
    assert screen.table(["NAME"], []) == ""


@pytest.mark.parametrize(
    ("gap", "text"),
    [(0.2, "just now"), (5, "5 s ago"), (125, "2 min ago"), (7300, "2 h ago"), (90000, "25 h ago"), (200000, "2 d ago"),
     (-30, "in 30 s"), (-7300, "in 2 h")],
)  # fmt: skip
async def test_times_are_for_people(gap: float, text: str) -> None:
    assert render.ago("2026-11-23T10:00:00.000Z", 1795428000 + gap) == text


async def test_seconds_of_a_stamp_are_those_of_the_calendar() -> None:
    from datetime import UTC, datetime, timedelta

    moment = datetime(1999, 12, 31, 23, 59, 59, 250000, tzinfo=UTC)
    for days in range(0, 20_000, 97):
        each = moment + timedelta(days=days)
        stamp = f"{each:%Y-%m-%dT%H:%M:%S}.250Z"
        assert render.seconds_of(stamp) == each.timestamp()
    assert render.seconds_of("soon") is None


async def test_durations_and_sizes_are_for_people() -> None:
    assert [render.duration(n) for n in (None, 0.04, 9.96, 59.4, 61, 3700, 200_000)] == [
        "-", "0.0 s", "10.0 s", "59 s", "1 min 01 s", "1 h 01 min", "2 d 7 h"
    ]  # fmt: skip
    assert [render.size(n) for n in (None, 0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "-", "0 B", "1023 B", "1.5 KiB", "5.0 GiB", "3.0 TiB"
    ]  # fmt: skip


STEPS = [
    {"name": "b", "after": ["a"], "inputs": [{"name": "x", "source": "a/x"}], "outputs": []},
    {
        "name": "a",
        "after": [],
        "inputs": [{"name": "s", "source": "lab:in/*"}],
        "outputs": [{"name": "x", "kind": "file"}],
    },
    {"name": 'c"\x1b', "after": ["b", "a"], "inputs": [], "outputs": []},
]


async def test_graph_is_drawn_from_the_first_step_to_the_last() -> None:
    assert [step["name"] for step in graph.ordered(STEPS)] == ["a", "b", 'c"\x1b']
    text = graph.text(STEPS, {}, render.Screen())
    assert text == '  a       <- lab:in/*  -> x\n  b       <- a\n  c"\\x1b  <- b, a'


async def test_graph_for_other_programs_is_quoted() -> None:
    assert graph.dot('p"', STEPS, {"a": "failed"}) == textwrap.dedent("""\
        digraph "p\\"" {
          rankdir=LR;
          node [shape=box, style="rounded,filled"];
          "b" [fillcolor="#ffffff"];
          "a" [fillcolor="#ffcdd2"];
          "c\\"\\\\x1b" [fillcolor="#ffffff"];
          "a" -> "b";
          "b" -> "c\\"\\\\x1b";
          "a" -> "c\\"\\\\x1b";
        }""")
    mermaid = graph.mermaid(STEPS, {"a": "failed"})
    assert '  s2["c#quot;\\x1b"]' in mermaid
    assert "  class s1 failed" in mermaid


# --- going on -------------------------------------------------------------------------------------------------------
async def ended(stage: Stage, run: int, outcome: RunOutcome = RunOutcome.SUCCEEDED) -> None:
    if await stage.ledger.steps(run):
        rows = await stage.ledger.steps(run)
        await stage.ledger.write(
            *[moves.finish_step(run, r.idx, StepOutcome.SKIPPED, "x", stage.now) for r in rows if r.state != "finished"]
        )
    await stage.ledger.write(moves.finish_run(run, outcome, stage.now))


async def told(process: Any, word: bytes) -> bytes:
    """What stderr says until `word` is in it."""
    found = b""
    with anyio.fail_after(10):
        while word not in found:
            found += await process.stderr.receive()
    return found


async def test_wait_lasts_through_a_restart_of_the_daemon() -> None:
    async with staged(serve=False) as stage:
        run = await stage.run()
        first = AsyncExitStack()
        await ControlServer(stage.socket, stage.service).start(first)
        command = [str(CTL), "wait", str(run)]
        async with await anyio.open_process(command, env=stage.env(), stdin=None) as process:
            with anyio.fail_after(10):
                while not stage.ledger._subscribers:  # it has asked
                    await anyio.sleep(0.01)
            await first.aclose()
            said = await told(process, b"waiting for it to come back")
            assert b"there is no socket" in said
            stage.service.closing = anyio.Event()
            async with AsyncExitStack() as second:
                await ControlServer(stage.socket, stage.service).start(second)
                await ended(stage, run)
                with anyio.fail_after(10):
                    assert await process.wait() == 0


async def test_ctrl_c_while_waiting_says_that_the_run_goes_on() -> None:
    async with staged() as stage:
        run = await stage.run()
        async with await anyio.open_process([str(CTL), "wait", str(run)], env=stage.env(), stdin=None) as process:
            with anyio.fail_after(10):
                while not stage.ledger._subscribers:
                    await anyio.sleep(0.01)
            process.send_signal(signal.SIGINT)
            said = await told(process, b"would end it")
            assert b"Traceback" not in said
            assert f"run {run} goes on".encode() in said
            assert await process.wait() == 130


async def test_run_and_wait_is_1_when_the_run_fails_and_names_the_step() -> None:
    async with staged() as stage:
        async with await anyio.open_process(
            [str(CTL), "run", "digits", "--wait"], env=stage.env(), stdin=None
        ) as process:
            await told(process, b"has started")
            await stage.begin(1, 0, "t")
            await stage.fail(1, 0, "t")
            await ended(stage, 1, RunOutcome.FAILED)
            said = await told(process, b"hint: ")
            assert b"1/prepare: exit status 3" in said
            assert await process.wait() == 1


async def test_follow_prints_the_log_and_then_how_it_ended() -> None:
    async with staged() as stage:
        async with await anyio.open_process(
            [str(CTL), "run", "digits", "--follow"], env=stage.env(), stdin=None
        ) as process:
            await told(process, b"has started")
            await stage.begin(1, 0, "t")
            stage.job("t", stdout=b"hello from the step\n")
            assert process.stdout is not None
            with anyio.fail_after(10):
                assert await process.stdout.receive() == b"hello from the step\n"
            await stage.succeed(1, 0, "t")
            await ended(stage, 1)
            with anyio.fail_after(10):
                assert await process.wait() == 0
            assert b"run 1 succeeded" in await process.stdout.receive()


async def test_events_are_followed_over_a_restart_without_a_gap() -> None:
    async with staged(serve=False) as stage:
        run = await stage.run()
        first = AsyncExitStack()
        await ControlServer(stage.socket, stage.service).start(first)
        command = [str(CTL), "events", "-f", "--json"]
        async with await anyio.open_process(command, env=stage.env(), stdin=None) as process:
            assert process.stdout is not None
            seen = b""
            with anyio.fail_after(60):
                while seen.count(b"\n") < 2:
                    seen += await process.stdout.receive()
                # A connection that asyncio accepts while its server closes is never answered as long as this process
                # lives, which a daemon's does not: so the client must follow before the server goes.
                while not stage.service.ledger._subscribers:
                    await anyio.sleep(0.01)
                await first.aclose()
                await stage.begin(run, 0, "t")  # while nobody serves
                stage.service.closing = anyio.Event()
                async with AsyncExitStack() as second:
                    await ControlServer(stage.socket, stage.service).start(second)
                    while b"step.running" not in seen:
                        seen += await process.stdout.receive()
            process.kill()
        numbers = [json.loads(line)["id"] for line in seen.splitlines()]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_reader_who_goes_away_ends_it_quietly() -> None:
    async with staged() as stage:
        run = await stage.run()
        await stage.begin(run, 0, "t")
        stage.job("t", stdout=b"line\n" * 100_000)
        read, write = os.pipe()
        os.close(read)
        for line in (("logs", run), ("runs", "--json"), ("status",), ("events",)):
            done = await anyio.run_process(
                [str(CTL), *map(str, line)], env=stage.env(), stdout=write, check=False, stdin=None
            )
            assert done.stderr in (b"", b"==> prepare (stdout)\n"), (line, done.stderr)
        os.close(write)


# --- get ------------------------------------------------------------------------------------------------------------
async def test_output_is_copied_writable_and_never_over_something() -> None:
    async with staged() as stage:
        run = await stage.whole()
        here = stage.folder / "here"
        here.mkdir()
        done = await stage.ctl("get", f"{run}/clean", cwd=here)
        assert (done.code, done.out) == (0, "clean.csv\n")
        assert (here / "clean.csv").read_bytes() == b"a,b\n1,2\n"
        assert (here / "clean.csv").stat().st_mode & 0o200
        again = await stage.ctl("get", f"{run}/prepare/clean", cwd=here)
        assert again.code == 1
        assert "`clean.csv` is there already" in again.err
        (here / "clean.csv").write_text("mine")
        assert (await stage.ctl("get", f"{run}/clean", "--force", cwd=here)).code == 0
        assert (here / "clean.csv").read_bytes() == b"a,b\n1,2\n"
        assert (await stage.ctl("get", f"{run}/train/model", "m/odel", cwd=here)).code == 0
        assert (here / "m" / "odel" / "weights.bin").read_bytes() == bytes(range(256)) * 10
        assert os.access(here / "m" / "odel" / "deep" / "run.sh", os.X_OK)
        assert (await stage.ctl("get", f"{run}/clean", here / "m", cwd=here)).code == 0
        assert (here / "m" / "clean.csv").exists()
        assert (await stage.ctl("get", f"{run}/clean", "-")).raw == b"a,b\n1,2\n"
        assert not list(here.rglob(".mlpipectl-*"))


@ROOT_ONLY
async def test_output_that_this_user_cannot_read_is_sent_by_the_daemon() -> None:
    async with staged() as stage:
        run = await stage.whole()
        open_to_all(stage)
        stage.access("nobody")
        (stage.folder / "artifacts").chmod(0o700)
        here = stage.folder / "here"
        here.mkdir()
        here.chmod(0o777)
        for name in ("clean", "model"):
            done = await anyio.to_thread.run_sync(
                lambda name=name: as_nobody(stage, "get", f"{run}/{name}", cwd=str(here))  # type: ignore[misc]
            )
            assert done.returncode == 0, done.stderr
        assert (here / "clean.csv").read_bytes() == b"a,b\n1,2\n"
        assert (here / "model" / "weights.bin").read_bytes() == bytes(range(256)) * 10
        assert (here / "model" / "deep" / "run.sh").stat().st_mode & 0o100


# --- words ----------------------------------------------------------------------------------------------------------
async def test_socket_is_looked_up_in_the_order_of_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "mlpiped.toml"
    config.write_text(f'[daemon]\nruntime_dir = "{tmp_path}/run"\n')
    every = {"MLPIPED_SOCKET": "/env", "MLPIPED_CONFIG": str(config), "XDG_RUNTIME_DIR": str(tmp_path)}
    assert find_socket("/word", every) == "/word"
    assert find_socket(None, every) == "/env"
    del every["MLPIPED_SOCKET"]
    assert find_socket(None, every) == f"{tmp_path}/run/control.sock"
    del every["MLPIPED_CONFIG"]
    assert find_socket(None, every) == "/run/mlpiped/control.sock"
    own = tmp_path / "mlpiped" / "control.sock"
    own.parent.mkdir()
    own.touch()
    if not os.path.exists("/run/mlpiped/control.sock"):
        assert find_socket(None, every) == str(own)
    monkeypatch.chdir(tmp_path)
    assert find_socket("s", {}) == str(tmp_path / "s")


@pytest.mark.parametrize(
    ("text", "parts"), [("12", ("12", None)), ("latest/a", ("latest", "a")), ("d:latest/a", ("d:latest", "a"))]
)
async def test_run_and_step_are_split(text: str, parts: tuple[str, str | None]) -> None:
    assert words.split(text, "a run") == parts


@pytest.mark.parametrize("text", ["", "/a", "1/", "1/a/b"])
async def test_what_is_no_run_and_step_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a run"):
        words.split(text, "a run")


async def test_spans_of_time_are_read() -> None:
    assert [words.span(text) for text in (None, "30", "1.5", "30s", "1h30m")] == [None, 30.0, 1.5, 30.0, 5400.0]
    with pytest.raises(UsageError):
        words.span("soon")


async def test_every_verb_says_what_it_is_and_takes_json_and_socket() -> None:
    import argparse

    [verbs] = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    due = ("status pipelines schedules show plan run submit runs logs why wait cancel retry pause resume metrics get "
           "events compute reload gc doctor completion").split()  # fmt: skip
    assert sorted(verbs.choices) == sorted(due)
    for name, verb in verbs.choices.items():
        assert verb.description, name
        assert {"--json", "--socket", "--help"} <= set(verb._option_string_actions), name


# --- sentences ------------------------------------------------------------------------------------------------------
async def test_sentences_say_what_is_so_and_what_to_do(tmp_path: Path) -> None:
    async with staged() as stage:
        good, bad = await stage.whole(), await stage.whole(outcome=RunOutcome.FAILED)
        table = [
            (f"retry {bad}", "has started: it tries run"),
            ("runs -n 0", "error: argument -n: must be a whole number, 1 or more: `0`"),
            (f"get {good}/clean {tmp_path}/none/", f"error: there is no folder `{tmp_path}/none/`\nhint: `mkdir -p "),
        ]
        for line, sentence in table:
            assert sentence in (await stage.ctl(*line.split())).err
        never = await stage.run()
        row = StepRow(0, "prepare", StepState.WAITING)
        await stage.ledger.write(moves.add_steps(never, [row], 1))
        await stage.ledger.write(
            moves.finish_step(never, 0, StepOutcome.FAILED, "input x: there is no `x`", 2),
            moves.finish_run(never, RunOutcome.FAILED, 3),
        )
        done = await stage.ctl("wait", never)
        assert "there is no `x`" in done.err
        assert "mlpipectl logs" not in done.err  # it never ran, so it printed nothing


async def test_compute_shows_each_card_who_is_on_it_and_what_is_drained() -> None:
    async with staged() as stage:
        shown = (await stage.ctl("compute")).out
        assert "7/train" in shown and "in use by python (pid 4242), not ours" in shown and "1/2" in shown
        done = await stage.ctl("compute", "drain", "local")
        assert (done.code, done.out) == (0, "")
        assert done.err == "`local` is drained: its steps finish, nothing new starts\n"
        assert "drained by bob: its steps finish" in (await stage.ctl("compute")).out
        assert re.search(r"^ +local +local +1/2 +drained by bob; 7/train$", (await stage.ctl("status")).out, re.M)
        assert stage.acts.asked[-1] == ("drain", {"compute": "local", "drained": True, "who": getpass.getuser()})
        await stage.ctl("compute", "undrain", "local")
        assert "drained" not in (await stage.ctl("compute")).out
        assert "did you mean `local`?" in (await stage.ctl("compute", "drain", "lokal")).err


async def test_compute_shows_the_nodes_of_a_cluster_our_jobs_by_its_words_and_that_its_queue_is_full() -> None:
    async with staged() as stage:
        (local,) = stage.acts.compute()
        cluster = {
            "partition": "main", "nodes_up": 1, "nodes_down": 2, "jobs": {"RUNNING": 2, "PENDING": 31}, "full": None,
            "away": [{"nodes": "n[1-2]", "state": "drained", "reason": "bad \x1b[31mdisk"}],
        }  # fmt: skip
        far = {**local, "name": "far", "kind": "slurm", "cards": [], "holders": [], "cluster": cluster}
        stage.acts.compute = lambda: [local, far]  # type: ignore[method-assign]
        shown = (await stage.ctl("compute")).out
        assert re.search(r"^far +main +1 +2 +31 PENDING, 2 RUNNING$", shown, re.MULTILINE)
        assert re.search(r"^far +n\[1-2\] +drained +bad .*disk$", shown, re.MULTILINE) and "\x1b" not in shown
        assert "takes no more" not in shown
        cluster["full"] = "QOSMaxSubmitJobPerUserLimit"
        shown = (await stage.ctl("compute")).out
        assert "its queue takes no more jobs: QOSMaxSubmitJobPerUserLimit" in shown
        stage.acts.compute = lambda: [local]  # type: ignore[method-assign]
        assert "CLUSTER" not in (await stage.ctl("compute")).out


async def test_status_says_that_the_disk_of_the_ledger_is_full() -> None:
    async with staged() as stage:
        assert "disk" not in (await stage.ctl("status")).out
        stage.ledger._writer.full = True
        done = await stage.ctl("status")
        assert "the disk of the ledger is full: nothing new is dispatched\nhint: free space" in done.out
        assert json.loads((await stage.ctl("status", "--json")).out)["daemon"]["disk_full"] is True
        stage.ledger._writer.full = False


async def test_stdout_that_is_full_or_closed_is_told_in_a_sentence() -> None:
    async with staged() as stage:
        for redirect, code, said in ((">/dev/full", 1, "error: cannot write what was asked for to stdout: no space"),
                                     (">&-", 0, "")):  # fmt: skip
            done = await anyio.run_process(["/bin/sh", "-c", f"{CTL} status {redirect}"], env=stage.env(), check=False)
            assert done.returncode == code
            err = done.stderr.decode()
            assert said in err and "Traceback" not in err and "unexpected" not in err and "ignored" not in err
