"""The API on its real socket: routes, refusals, streams, audit."""

from __future__ import annotations

import grp
import json
import os
import shutil
import socket
import stat
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from control_stage import Acts, Stage, staged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpiped.control import listening, log_files, requests, server
from mlpiped.control.openapi import openapi_document
from mlpiped.control.routes import ROUTES
from mlpiped.control.server import CONNECTIONS_PER_USER, ControlServer
from mlpiped.errors import Conflict, MlpipedError, UsageError
from mlpiped.ledger import StepRow, moves
from mlpiped.model import AttemptEnd, RunOutcome, StepOutcome, StepState
from mlpiped.protocol import path, quote, reference

pytestmark = pytest.mark.anyio


# --- the socket -----------------------------------------------------------------------------------------------------
async def test_socket_and_its_folder_are_closed_to_strangers() -> None:
    async with staged() as stage:
        assert stat.S_IMODE(os.lstat(stage.socket).st_mode) == 0o660
        assert stat.S_IMODE(os.lstat(stage.socket.parent).st_mode) == 0o750
    assert not stage.socket.exists()


async def test_socket_of_a_dead_daemon_is_replaced() -> None:
    async with staged(serve=False) as stage:
        stage.socket.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(stage.socket))
        async with AsyncExitStack() as stack:
            await ControlServer(stage.socket, stage.service).start(stack)
            assert (await stage.get("/v1/status"))["daemon"]["version"] == "0.1.0"


async def test_a_socket_file_that_somebody_removes_is_made_anew_and_who_is_connected_stays_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "LOOK", 0.01)
    async with staged(serve=False) as stage, anyio.create_task_group() as tasks:
        async with AsyncExitStack() as stack:
            control = ControlServer(stage.socket, stage.service)
            await control.start(stack)
            tasks.start_soon(control.guard)
            peer = await anyio.connect_unix(str(stage.socket))
            await peer.send(b"GET /v1/events?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in await peer.receive()
            shutil.rmtree(stage.socket.parent)
            with anyio.fail_after(10):
                while not stage.socket.exists():
                    await anyio.sleep(0.005)
            assert await stage.get("/v1/status")
            assert stat.S_IMODE(os.lstat(stage.socket).st_mode) == 0o660
            await stage.run()
            with anyio.fail_after(10):
                assert b"run.queued" in await peer.receive()
        await peer.aclose()
    assert not stage.socket.exists()  # the guard has ended by itself, and has not made it once more


async def test_socket_that_somebody_answers_on_is_left_alone() -> None:
    async with staged() as stage:
        with pytest.raises(MlpipedError, match="somebody listens on the control socket"):
            listening.bind(stage.socket, None)
        assert await stage.get("/v1/status")


@pytest.mark.parametrize("what", ["symlink", "file", "long"])
async def test_socket_path_that_cannot_be_used_is_refused_in_a_sentence(tmp_path: Path, what: str) -> None:
    target = tmp_path / "s"
    if what == "symlink":
        target.symlink_to(tmp_path / "elsewhere")
    elif what == "file":
        target.write_text("precious")
    else:
        target = tmp_path / ("x" * 120)
    words = {
        "symlink": "is a symlink: refused",
        "file": "is in the way",
        "long": "too long for a socket: .* at most 107",
    }
    with pytest.raises(MlpipedError, match=words[what]):
        listening.bind(target, None)
    assert what != "file" or target.read_text() == "precious"
    assert what != "symlink" or target.is_symlink()


async def test_socket_from_systemd_is_taken_and_its_variables_go(monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in (str(os.getpid() + 1), "", "x"):
        environ = {"LISTEN_PID": pid, "LISTEN_FDS": "1", "HOME": "/"}
        assert listening.passed(environ) is None
        assert environ == {"HOME": "/"}
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.setattr(listening, "_FIRST_PASSED", os.dup(made.fileno()))
        environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
        taken = listening.passed(environ)
        assert taken is not None
        assert taken.family == socket.AF_UNIX
        taken.close()


async def test_unknown_group_of_readers_is_named(tmp_path: Path) -> None:
    with pytest.raises(MlpipedError, match="no group named `no-such-group`"):
        listening.bind(tmp_path / "s", "no-such-group")


@pytest.mark.skipif(os.getuid() != 0, reason="changes a group")
async def test_group_that_is_named_later_gets_through_the_folder_of_the_socket(tmp_path: Path) -> None:
    nogroup = grp.getgrnam("nogroup").gr_gid
    listening.bind(tmp_path / "run" / "s", None).close()
    listening.bind(tmp_path / "run" / "s", "nogroup").close()
    assert (tmp_path / "run").stat().st_gid == nogroup
    (tmp_path / "home").mkdir(mode=0o750)
    (tmp_path / "home" / "precious").write_text("")
    listening.bind(tmp_path / "home" / "s", "nogroup").close()
    assert (tmp_path / "home").stat().st_gid == os.getegid()  # not a folder of ours: nobody new is let in


@pytest.mark.skipif(os.getuid() != 0, reason="changes a group")
async def test_doctor_says_that_the_folder_keeps_the_group_of_the_socket_out() -> None:
    async with staged() as stage:
        os.chown(stage.socket, -1, grp.getgrnam("nogroup").gr_gid)
        found = {check["name"]: check for check in (await stage.get("/v1/doctor"))["checks"]}
        assert "keeps the group out" in found["socket"]["message"]
        assert "chgrp" in found["socket"]["hint"]


# --- the document and the router ------------------------------------------------------------------------------------
async def test_openapi_document_lists_exactly_the_routes_that_the_router_has() -> None:
    async with staged() as stage:
        document = await stage.get("/v1/openapi.json")
        app = ControlServer(stage.socket, stage.service).application()
        served = set()
        for route in app.router.routes():
            assert route.resource is not None
            served.add((route.method, route.resource.canonical))
    listed = {(method.upper(), route) for route, methods in document["paths"].items() for method in methods}
    assert listed == served
    assert len(listed) == len(ROUTES)


async def test_openapi_document_has_every_model_that_it_refers_to() -> None:
    document = openapi_document(ROUTES, "1")
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"], name
    names = [op["operationId"] for methods in document["paths"].values() for op in methods.values()]
    assert len(names) == len(set(names))


async def test_every_looking_route_answers_on_a_ledger_with_runs() -> None:
    async with staged() as stage:
        run = await stage.whole()
        names = {"pipeline": "digits", "run": str(run), "step": "train", "output": "model"}
        for route in ROUTES:
            if route.method == "GET" and route.media == "application/json":
                answer = await stage.get(route.path.format(**names))
                assert isinstance(answer, dict), route.path


# --- refusals -------------------------------------------------------------------------------------------------------
BAD_BODIES = [
    (b"{", "not JSON"),
    (b"[]", "must be a JSON object"),
    (b'"x"', "must be a JSON object"),
    (b"\xff\xfe", "not UTF-8"),
    (b'{"parameters": {"rate": NaN}}', "NaN is no number"),
    (b'{"parameters": {"rate": -Infinity}}', "-Infinity is no number"),
    (b'{"parameters": {"rate": 1e999}}', "too large a number"),
    (b'{"parameters": {"epochs": ' + b"9" * 50 + b"}}", "too large a number"),
    (b'{"force": true, "force": false}', "'force' is there twice"),
    (b"[" * 100_000, "more than 32 levels deep"),
    (b'{"a":' * 40 + b"1" + b"}" * 40, "more than 32 levels deep"),
    (b'{"target": "a\\u0000b"}', "NUL or half a surrogate"),
    (b'{"target": "\\ud800"}', "NUL or half a surrogate"),
    (b'{"colour": 1}', "unknown word `colour`"),
    (b'{"parameters": {"rate": [1]}}', "`parameters.rate`: must be a text, a number"),
    (b'{"parameters": {"rate": {"text": "a", "b": 1}}}', "`parameters.rate`: must be"),
    (b'{"parameters": {"rate": "fast"}}', "parameter `rate` must be a number"),
    (b'{"parameters": {"rat": 1}}', "no parameter named `rat`"),
    (b'{"parameters": {"fast": 1}}', "parameter `fast` must be true or false"),
    (b'{"parameters": {"epochs": true}}', "parameter `epochs` must be a whole number"),
    (b'{"force": "train"}', "`force`: must be true, false or a list"),
    (b'{"force": ["trian"]}', "no step named `trian`"),
    (b'{"target": "trian"}', "no step named `trian`"),
    (b'{"tags": {"a": 1}}', "`tags.a`"),
    (b'{"parameters": {"label": "' + b"x" * (1 << 20) + b'"}}', "larger than 1 MiB"),
]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES, ids=[words[:30] for _, words in BAD_BODIES])
async def test_bad_body_is_one_sentence_and_changes_nothing(body: bytes, words: str) -> None:
    async with staged() as stage:
        status, answer = await stage.post_raw("/v1/pipelines/digits/runs", body)
        assert status in (400, 404, 413), answer
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"kind", "message", "hint"}
        assert words in answer["error"]["message"]
        assert stage.acts.asked == []


@pytest.mark.parametrize(
    ("method", "asked", "status", "words"),
    [
        ("GET", "/v1/nothing", 404, "no such path"),
        ("GET", "/", 404, "no such path"),
        ("DELETE", "/v1/status", 405, "DELETE is not possible here"),
        ("POST", "/v1/runs/1/logs", 405, "POST is not possible here"),
        ("GET", "/v1/runs/99", 404, "no run 99"),
        ("GET", "/v1/runs/latest", 404, "no run yet"),
        ("GET", "/v1/runs/digits:latest", 404, "no run of `digits` yet"),
        ("GET", "/v1/runs/digit:latest", 404, "no pipeline named `digit`"),
        ("GET", "/v1/runs/first", 400, "not a run: `first`"),
        ("GET", "/v1/runs/%C2%B2", 400, "not a run"),
        ("GET", "/v1/runs/-1", 400, "not a run"),
        ("GET", "/v1/runs/" + "9" * 40, 400, "not a run"),
        ("GET", "/v1/runs/%00", 400, "no name"),
        ("GET", "/v1/runs/..%2F..%2Fetc%2Fpasswd", 400, "not a run"),
        ("GET", "/v1/pipelines/..%2Fdigits", 404, "no pipeline named `../digits`"),
        ("GET", "/v1/pipelines/digit", 404, "no pipeline named `digit`"),
        ("GET", "/v1/runs?limit=0", 400, "`limit`"),
        ("GET", "/v1/runs?limit=x", 400, "`limit`"),
        ("GET", "/v1/runs?limit=1&limit=2", 400, "`limit` is there twice"),
        ("GET", "/v1/runs?tag=a", 400, "not a tag: `a`"),
        ("GET", "/v1/runs?since=yesterday", 400, "not a time: `yesterday`"),
        ("GET", "/v1/runs?state=happy", 400, "`state`"),
        ("GET", "/v1/runs?colour=red", 400, "unknown word `colour`"),
        ("GET", "/v1/runs?pipeline=digit", 404, "no pipeline named `digit`"),
        ("GET", "/v1/events?after=-1", 400, "`after`"),
        ("GET", "/v1/status?x=1", 400, "unknown word `x`"),
    ],
)
async def test_wrong_question_is_one_sentence(method: str, asked: str, status: int, words: str) -> None:
    async with staged() as stage:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(stage.socket))) as session:
            from yarl import URL

            async with session.request(method, URL(f"http://x{asked}", encoded=True)) as answer:
                document = await answer.json()
        assert answer.status == status, document
        assert words in document["error"]["message"]


async def test_near_names_are_suggested() -> None:
    async with staged() as stage:
        run = await stage.whole()
        for asked, near in (
            ("/v1/pipelines/digts", "`digits`"),
            (f"/v1/runs/{run}/steps/trian/why", "`train`"),
            (f"/v1/runs/{run}/outputs/train/modl", "`model`"),
        ):
            status, answer = await stage.ask("GET", asked)
            assert status == 404
            assert near in answer["error"]["hint"]


async def test_fault_of_our_own_is_a_sentence_without_a_traceback() -> None:
    async with staged() as stage:
        stage.acts.raises = RuntimeError("secret detail")
        status, answer = await stage.ask("POST", "/v1/reload", {})
        assert status == 500
        assert answer["error"]["kind"] == "internal"
        assert "secret" not in json.dumps(answer)
        assert "Traceback" not in json.dumps(answer)


async def test_refusal_of_the_scheduler_keeps_its_words_and_status() -> None:
    async with staged() as stage:
        stage.acts.raises = Conflict("`digits` is busy", hint="wait")
        status, answer = await stage.ask("POST", "/v1/reload", {})
        assert status == 409
        assert answer == {"error": {"kind": "conflict", "message": "`digits` is busy", "hint": "wait"}}


@pytest.mark.parametrize(
    "data",
    [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00",
     b"A" * 20_000 + b"\r\n\r\n",
     b"POST /v1/plan HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
     b"POST /v1/plan HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
)  # fmt: skip
async def test_what_is_not_http_gets_400_and_the_server_lives(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpiped.control.server.FIRST_REQUEST_TIME", 0.3)
    async with staged() as stage:
        answer = await stage.raw(data)
        assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]
        assert b"Traceback" not in answer
        assert await stage.get("/v1/status")


async def test_connection_that_says_nothing_whole_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpiped.control.server.FIRST_REQUEST_TIME", 0.2)
    async with staged() as stage:
        assert await stage.raw(b"GET /v1/status HT") == b""


async def test_body_that_does_not_come_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpiped.control.server.BODY_TIME", 0.1)
    async with staged() as stage:
        head = b"POST /v1/plan HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{"
        assert b"the body did not arrive" in await stage.raw(head)


async def test_too_many_connections_of_one_user_are_refused_fast_and_the_rest_served() -> None:
    async with staged() as stage:
        async with AsyncExitStack() as stack:
            for _ in range(CONNECTIONS_PER_USER):
                await stack.enter_async_context(await anyio.connect_unix(str(stage.socket)))
            answer = await stage.raw(b"")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b" 503 " in head
            assert f"Content-Length: {len(body)}".encode() in head
            assert json.loads(body)["error"]["kind"] == "busy"
        with anyio.fail_after(5):
            while (await stage.raw(b"GET /v1/status HTTP/1.0\r\n\r\n"))[9:12] != b"200":
                await anyio.sleep(0.01)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=8), each, max_size=3),
    max_leaves=8,
)
WORDS = st.sampled_from(["parameters", "force", "target", "tags", "file", "pipeline", "step", "text", "x"])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode())
       | st.dictionaries(WORDS, JSON, max_size=4).map(lambda v: json.dumps(v).encode()))  # fmt: skip
def test_any_bytes_as_a_body_give_a_model_or_one_usage_error(body: bytes) -> None:
    for model in (requests.StartRun, requests.SubmitFile, requests.AskPlan, requests.CancelRun, requests.Empty):
        try:
            found = requests.body(model, body)
        except UsageError as error:
            assert error.message
            assert "Traceback" not in error.message
            assert len(error.message) < 5000
        else:
            found.model_dump_json()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_as_a_run_is_a_reference_or_one_usage_error(text: str) -> None:
    try:
        pipeline, number = reference(text)
    except UsageError:
        return
    assert number is None or (pipeline is None and 0 <= number < 1 << 63)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t)))
def test_what_is_quoted_for_a_path_comes_back_whole(text: str) -> None:
    from urllib.parse import unquote

    assert unquote(quote(text)) == text
    assert "/" not in quote(text)


# --- streams --------------------------------------------------------------------------------------------------------
class Sse:
    """Server-sent events as they come."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer

    async def next(self) -> tuple[str, Any, int | None]:
        event, number, value = "message", None, None
        with anyio.fail_after(5):
            async for raw in self.answer.content:
                line = raw.decode().rstrip("\n")
                if line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("id: "):
                    number = int(line[4:])
                elif line.startswith("data: "):
                    value = json.loads(line[6:])
                elif not line and value is not None:
                    return event, value, number
        raise EOFError


async def test_events_follow_without_gap_and_go_on_after_the_last_one_known() -> None:
    async with staged() as stage:
        run = await stage.run()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(stage.socket))) as session:
            async with session.get("http://x/v1/events?follow=1&after=0") as answer:
                assert answer.headers["Content-Type"] == "text/event-stream"
                stream = Sse(answer)
                kinds = [(await stream.next())[1]["kind"] for _ in range(2)]
                assert kinds == ["run.queued", "run.running"]
                await stage.begin(run, 0, "t")
                seen = [await stream.next() for _ in range(3)]
                assert seen[0][1]["step"] == "prepare"
                last = seen[-1][2]
            async with session.get("http://x/v1/events?follow=1", headers={"Last-Event-ID": str(last - 1)}) as answer:  # type: ignore[operator]
                assert (await Sse(answer).next())[2] == last


async def test_events_of_one_run_end_with_it() -> None:
    async with staged() as stage:
        run, _other = await stage.whole(), await stage.run()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(stage.socket))) as session:
            async with session.get(f"http://x/v1/events?follow=1&run={run}") as answer:
                stream, seen = Sse(answer), []
                while (item := await stream.next())[0] != "end":
                    seen.append(item[1])
        assert {event["run"] for event in seen} == {run}
        assert seen[-1]["kind"] == "run.finished"


async def test_history_gives_the_newest_events() -> None:
    async with staged() as stage:
        await stage.whole()
        events = (await stage.get("/v1/events?limit=2"))["events"]
        assert [event["kind"] for event in events] == ["step.finished", "run.finished"]
        of_run = (await stage.get("/v1/events?limit=1&run=latest"))["events"]
        assert of_run == events[-1:]


async def pieces(stage: Stage, query: str) -> list[dict[str, Any]]:
    found = []
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(stage.socket))) as session:
        async with session.get(f"http://x/v1/runs/{query}") as answer:
            assert answer.status == 200, await answer.text()
            stream = Sse(answer)
            while (item := await stream.next())[0] != "end":
                found.append(item[1])
    return found


async def test_logs_of_a_finished_run_come_whole_and_end() -> None:
    async with staged() as stage:
        run = await stage.whole(outcome=RunOutcome.FAILED)
        found = await pieces(stage, f"{run}/logs?follow=1")
        assert [(p["step"], p["stream"], p["text"]) for p in found] == [
            ("prepare", "stdout", "prepared\n"), ("train", "stderr", "Traceback: boom\n")
        ]  # fmt: skip
        assert [p["step"] for p in await pieces(stage, f"{run}/logs?stream=stderr")] == ["train"]
        assert await pieces(stage, f"{run}/logs?step=train&stream=stdout") == []


async def test_logs_of_a_reused_step_are_the_original_ones_and_say_so() -> None:
    async with staged() as stage:
        run = await stage.whole()
        [piece] = await pieces(stage, f"{await stage.reused(run)}/logs?step=train")
        assert piece["note"] == f"reused: this is the log of run {run}, step train"
        assert piece["text"] == "naïve café\n"


async def test_logs_follow_a_file_that_grows_until_the_run_ends() -> None:
    async with staged() as stage:
        run = await stage.run()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(stage.socket))) as session:
            async with session.get(f"http://x/v1/runs/{run}/logs?follow=1&step=prepare") as answer:
                stream = Sse(answer)
                await stage.begin(run, 0, "t")
                stage.job("t", stdout=b"one\n")
                assert (await stream.next())[1]["text"] == "one\n"
                stage.job("t", stdout=b"\xff\n", stderr=b"warn\n")
                more = [(await stream.next())[1] for _ in range(2)]
                assert {(p["stream"], p.get("text"), p.get("data")) for p in more} == {
                    ("stdout", None, "/wo="), ("stderr", "warn\n", None)
                }  # fmt: skip
                stage.job("t", stdout=b"last words\n")
                await stage.succeed(run, 0, "t")
                assert (await stream.next())[1]["text"] == "last words\n"
                assert (await stream.next())[0] == "end"


async def test_logs_show_the_newest_attempt_or_the_one_asked_for() -> None:
    async with staged() as stage:
        run = await stage.run()
        await stage.begin(run, 0, "first")
        stage.job("first", stdout=b"one\n")
        await stage.ledger.write(
            moves.attempt_ended("first", AttemptEnd.FAILED, StepState.QUEUED, "x", 1, "x", None, stage.now)
        )
        await stage.begin(run, 0, "second", n=2)
        stage.job("second", stdout=b"two\n")
        assert [p["text"] for p in await pieces(stage, f"{run}/logs?step=prepare")] == ["two\n"]
        assert [p["text"] for p in await pieces(stage, f"{run}/logs?step=prepare&attempt=1")] == ["one\n"]
        status, answer = await stage.ask("GET", f"/v1/runs/{run}/logs?step=prepare&attempt=3")
        assert status == 404
        assert answer["error"]["hint"] == "there are: 1, 2"


async def test_log_that_is_a_symlink_or_a_fifo_is_not_read() -> None:
    async with staged() as stage:
        run = await stage.run()
        await stage.begin(run, 0, "t")
        folder = stage.job("t")
        (folder / "stdout").unlink()
        (folder / "stdout").symlink_to("/etc/passwd")
        (folder / "stderr").unlink()
        os.mkfifo(folder / "stderr")
        assert await pieces(stage, f"{run}/logs") == []


def test_pieces_of_a_log_are_not_cut_inside_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "CHUNK", 5)
    text = "aż€𝄞b" * 7
    file = tmp_path / "log"
    file.write_text(text)
    read, at = [], 0
    while found := log_files._read(file, at):
        read.append(found[1].decode())
        at += len(found[1])
    assert "".join(read) == text


async def test_wait_answers_at_the_end_of_the_run_and_at_the_end_of_the_time() -> None:
    async with staged() as stage:
        run = await stage.run()
        assert (await stage.get(f"/v1/runs/{run}/wait?timeout=0.05"))["state"] == "running"
        answers: list[Any] = []

        async def wait() -> None:
            answers.append(await stage.get(f"/v1/runs/{run}/wait"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            rows = [StepRow(0, "prepare")]
            await stage.ledger.write(moves.add_steps(run, rows, stage.now))
            await stage.ledger.write(
                moves.finish_step(run, 0, StepOutcome.CANCELLED, "x", stage.now),
                moves.finish_run(run, RunOutcome.CANCELLED, stage.now),
            )
        assert answers[0]["outcome"] == "cancelled"


async def test_streams_and_waits_end_when_the_daemon_stops_and_nothing_hangs() -> None:
    async with staged(serve=False) as stage:
        run = await stage.run()
        ends: list[Any] = []
        async with AsyncExitStack() as stack:
            await ControlServer(stage.socket, stage.service).start(stack)
            session = await stack.enter_async_context(
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(stage.socket)))
            )
            events = await session.get("http://x/v1/events?follow=1&after=0")
            await Sse(events).next()
            async with anyio.create_task_group() as tasks:

                async def wait() -> None:
                    ends.append(await stage.get(f"/v1/runs/{run}/wait"))

                async def follow() -> None:
                    stream = Sse(events)
                    while (item := await stream.next())[0] != "end":
                        pass
                    ends.append(item[1])

                tasks.start_soon(wait)
                tasks.start_soon(follow)
                await anyio.wait_all_tasks_blocked()
                stage.service.closing.set()
        assert {"reason": "stopping"} in ends
        assert any(isinstance(end, dict) and end.get("state") == "running" for end in ends)


async def test_stopping_with_an_open_stream_takes_under_three_seconds() -> None:
    async with staged(serve=False) as stage:
        stack = AsyncExitStack()
        await ControlServer(stage.socket, stage.service).start(stack)
        peer = await anyio.connect_unix(str(stage.socket))
        await peer.send(b"GET /v1/events?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await peer.receive()
        with anyio.fail_after(3):
            await stack.aclose()
        await peer.aclose()
        assert not stage.socket.exists()


async def test_handlers_that_are_unknown_to_the_table_do_not_exist() -> None:
    """A verb is a row of the table: no attribute of anything is looked up by a name from outside."""
    async with staged() as stage:
        for name in ("__class__", "start", "submit%2F..%2Fstatus"):
            status, _ = await stage.ask("GET", f"/v1/{name}")
            assert status == 404
        assert stage.acts.asked == []


def test_acts_stand_in_has_every_verb_of_the_protocol() -> None:
    from mlpiped.control.service import Actions

    wanted = {name for name in vars(Actions) if not name.startswith("_")}
    assert wanted <= {name for name in vars(Acts) if not name.startswith("_")}


def test_paths_of_the_client_are_routes_of_the_server() -> None:
    assert (
        path("runs", "digits:latest", "logs", step="a b", follow=True)
        == "/v1/runs/digits:latest/logs?step=a%20b&follow=1"
    )
    assert path("runs", tag=["a=1", "b=2"], limit=None) == "/v1/runs?tag=a%3D1&tag=b%3D2"
