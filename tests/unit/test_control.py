"""The API on its real socket: routes, permissions, refusals, streams, audit."""

from __future__ import annotations

import dataclasses
import grp
import io
import json
import os
import socket
import stat
import tarfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from control_stage import Acts, Stage, spec, staged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpiped.control import doctor_host, listening, log_files, requests
from mlpiped.control.access import Access, Peer, look_up
from mlpiped.control.doctor import has_wal_reset_bug
from mlpiped.control.openapi import openapi_document
from mlpiped.control.routes import ROUTES
from mlpiped.control.server import CONNECTIONS_PER_USER, ControlServer
from mlpiped.control.times import moment
from mlpiped.errors import BadParameter, Conflict, Fault, MlpipedError, NotPermitted, UsageError
from mlpiped.ledger import StepRow, moves
from mlpiped.model import AttemptEnd, RunOutcome, StepOutcome, StepState
from mlpiped.protocol import path, quote, reference, typed_parameters
from mlpiped.triggers.mounts import Mount

pytestmark = pytest.mark.anyio
NOBODY = Peer(65534, 65534, 1, "nobody", frozenset({"nogroup"}))


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


# --- who may --------------------------------------------------------------------------------------------------------
MAY: list[tuple[str, Access, Peer, bool, bool]] = [
    ("stranger", Access(None, (), 1), NOBODY, False, False),
    ("root", Access(None, (), 1), Peer(0, 0, 1, "root"), True, True),
    ("the daemon's user", Access(None, (), 65534), NOBODY, True, True),
    ("member of the group", Access("nogroup", (), 1), NOBODY, True, False),
    ("operator by name", Access(None, ("nobody",), 1), NOBODY, True, True),
    ("operator by group", Access(None, ("@nogroup",), 1), NOBODY, True, True),
    ("group of that name is not a user", Access(None, ("nogroup",), 1), NOBODY, False, False),
    ("user of that name is not a group", Access(None, ("@nobody",), 1), NOBODY, False, False),
    ("other group", Access("lab", ("@ops", "alice"), 1), NOBODY, False, False),
]


@pytest.mark.parametrize(("who", "access", "peer", "reads", "acts"), MAY, ids=[row[0] for row in MAY])
async def test_who_may_read_and_act(who: str, access: Access, peer: Peer, reads: bool, acts: bool) -> None:
    assert access.may_read(peer) is reads
    assert access.may_act(peer) is acts


async def test_owner_may_act_on_his_own_run_only() -> None:
    access = Access("nogroup", (), 1)
    access.own(NOBODY, "cancel", 3, "nobody")
    for owner in ("alice", "", None):
        with pytest.raises(NotPermitted, match="may not cancel run 3"):
            access.own(NOBODY, "cancel", 3, owner)


async def test_owner_of_the_plugin_file_may_start_its_pipeline(tmp_path: Path) -> None:
    plugin = tmp_path / "digits.py"
    plugin.touch()
    access = Access("nogroup", (), 1)
    with pytest.raises(NotPermitted, match="may not start `digits`"):
        access.start(NOBODY, "digits", str(plugin))
    os.chown(plugin, 65534, 65534) if os.getuid() == 0 else pytest.skip("needs root")
    access.start(NOBODY, "digits", str(plugin))
    with pytest.raises(NotPermitted):
        access.start(NOBODY, "digits", str(tmp_path / "gone.py"))


def test_user_without_a_name_is_looked_up_without_harm() -> None:
    name, groups = look_up(4_000_000, 4_000_000)
    assert name == "uid 4000000"
    assert groups == frozenset()


class Stranger(Access):
    """What the kernel says is replaced: these tests cannot become another user in their own process."""

    async def peer(self, sock: socket.socket) -> Peer:
        return NOBODY


async def test_stranger_gets_one_sentence_for_every_path_and_nothing_else() -> None:
    async with staged() as stage:
        run = await stage.whole()
        stage.service.access = Stranger(None, (), 1)
        for asked in ("/v1/status", f"/v1/runs/{run}", "/v1/nothing", "/metrics", "/v1/runs/999"):
            status, answer = await stage.ask("GET", asked)
            assert status == 403
            assert answer["error"]["kind"] == "not_permitted"
            assert answer["error"]["message"] == "`nobody` may not read from this daemon"


async def test_reader_may_look_and_may_not_act_and_no_deed_is_done() -> None:
    async with staged() as stage:
        run = await stage.run()
        stage.service.access = Stranger("nogroup", (), 1)
        assert (await stage.ask("GET", "/v1/status"))[0] == 200
        names = {"pipeline": "digits", "run": str(run), "compute": "local"}
        bodies: dict[str, Any] = {"submit": {"file": "/x.py"}}
        for route in ROUTES:
            if route.verb is not None:
                status, answer = await stage.ask("POST", route.path.format(**names), bodies.get(route.verb, {}))
                assert (status, answer["error"]["kind"]) == (403, "not_permitted"), route.path
        assert (await stage.ask("POST", "/v1/plan", {"file": "/x.py"}))[0] == 403
        assert (await stage.ask("POST", "/v1/plan", {"pipeline": "digits"}))[0] == 200
        assert [verb for verb, _ in stage.acts.asked] == ["plan"]
        await stage.ledger.write(lambda c: None)
        assert await stage.ledger.audit() == []


async def test_reader_may_cancel_and_retry_his_own_run() -> None:
    async with staged() as stage:
        mine = await stage.run(owner="nobody")
        stage.service.access = Stranger("nogroup", (), 1)
        assert (await stage.ask("POST", f"/v1/runs/{mine}/cancel", {}))[0] == 200
        assert stage.acts.asked == [("cancel", {"run": mine, "step": None, "who": "nobody"})]


async def test_every_mutation_leaves_an_audit_row_with_who_and_what() -> None:
    async with staged() as stage:
        running, ended = await stage.run(), await stage.whole()
        runs = {"cancel": running, "retry": ended}
        bodies: dict[str, Any] = {"submit": {"file": "/x.py"}, "run": {"parameters": {"rate": 0.5}}}
        for route in ROUTES:
            if route.verb is not None:
                names = {"pipeline": "digits", "run": str(runs.get(route.verb, 1)), "compute": "local"}
                if route.media == "application/json":
                    status, answer = await stage.ask("POST", route.path.format(**names), bodies.get(route.verb, {}))
                    assert status == route.status, answer
                else:
                    assert await stage.download("POST", route.path.format(**names), {})
        await stage.ledger.write(lambda c: None)
        rows = await stage.ledger.audit()
        assert {row.verb for row in rows} == {route.verb for route in ROUTES if route.verb}
        assert {(row.uid, row.pid) for row in rows} == {(os.getuid(), os.getpid())}
        started = next(row for row in rows if row.verb == "run")
        assert started.args == {"pipeline": "digits", "parameters": {"rate": 0.5}}


async def test_every_post_but_plan_is_a_mutation_with_a_permission() -> None:
    for route in ROUTES:
        if route.method == "POST" and route.path != "/v1/plan":
            assert route.verb is not None, route.path
            assert route.permit is not None, route.path
        else:
            assert route.verb is None, route.path


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


# --- answers --------------------------------------------------------------------------------------------------------
async def test_json_of_a_run_has_exactly_the_keys_of_the_contract() -> None:
    async with staged() as stage:
        run = await stage.whole()
        answer = await stage.get(f"/v1/runs/{run}")
    assert list(answer) == [
        "id", "pipeline", "version", "experiment", "owner", "cause", "parameters", "tags", "state", "outcome",
        "created_at", "started_at", "finished_at", "steps",
    ]  # fmt: skip
    assert list(answer["steps"][0]) == [
        "name", "state", "outcome", "why", "compute", "attempts", "exit_code", "key", "reused_from", "started_at",
        "finished_at",
    ]  # fmt: skip
    assert answer["cause"] == {"kind": "manual", "detail": "by alice"}
    assert (answer["state"], answer["outcome"]) == ("finished", "succeeded")
    assert [s["outcome"] for s in answer["steps"]] == ["succeeded", "succeeded", "skipped"]
    assert answer["created_at"].endswith("Z")
    assert len(answer["created_at"]) == len("2026-11-23T10:00:00.123Z")


async def test_steps_without_a_row_are_waiting_and_those_of_a_cancelled_run_ended_with_it() -> None:
    async with staged() as stage:
        run = await stage.run()
        await stage.begin(run, 0, "t")
        steps = (await stage.get(f"/v1/runs/{run}"))["steps"]
        assert [(s["name"], s["state"]) for s in steps] == [
            ("prepare", "running"), ("train", "waiting"), ("report", "waiting")
        ]  # fmt: skip
        early = await stage.run(start=False)
        await stage.ledger.write(moves.finish_run(early, RunOutcome.CANCELLED, stage.now))
        steps = (await stage.get(f"/v1/runs/{early}"))["steps"]
        assert {(s["state"], s["outcome"]) for s in steps} == {("finished", "cancelled")}


async def test_latest_and_latest_of_a_pipeline_are_runs() -> None:
    async with staged() as stage:
        await stage.run()
        other = await stage.run("other")
        digits = await stage.run()
        await stage.run("other")
        assert (await stage.get("/v1/runs/latest"))["id"] == 4
        assert (await stage.get("/v1/runs/digits:latest"))["id"] == digits
        assert (await stage.get(f"/v1/runs/{other}"))["pipeline"] == "other"


async def test_runs_are_filtered_by_everything_at_once() -> None:
    async with staged() as stage:
        good, bad = await stage.whole(), await stage.whole(outcome=RunOutcome.FAILED)
        tagged = await stage.run(tags={"why": "paper", "n": "1"})

        async def ids(query: str) -> list[int]:
            return [run["id"] for run in (await stage.get(f"/v1/runs?{query}"))["runs"]]

        assert await ids("") == [tagged, bad, good]
        assert await ids("outcome=failed") == [bad]
        assert await ids("state=running&pipeline=digits") == [tagged]
        assert await ids("state=finished&limit=1") == [bad]
        assert await ids("tag=why%3Dpaper&tag=n%3D1") == [tagged]
        assert await ids("tag=why%3Dpaper&tag=n%3D2") == []
        assert await ids("since=1h") == [tagged, bad, good]
        assert await ids("since=2999-01-01") == []
        assert "steps" not in (await stage.get("/v1/runs"))["runs"][0]
        assert len((await stage.get("/v1/runs?steps=1"))["runs"][0]["steps"]) == 3


async def test_status_names_the_failed_step_the_next_fire_and_what_is_broken() -> None:
    async with staged() as stage:
        run = await stage.whole(outcome=RunOutcome.FAILED)
        stage.plugins.faults = [Fault("/plugins/bad.py", 7, "syntax error", "mend it")]
        answer = await stage.get("/v1/status")
        [failure] = answer["failures"]
        assert (failure["id"], failure["step"], failure["exit_code"]) == (run, "train", 3)
        assert answer["next"][0]["pipeline"] == "digits"
        assert answer["broken"] == [
            {"file": "/plugins/bad.py", "line": 7, "message": "syntax error", "hint": "mend it"}
        ]
        assert answer["pipelines"] == {"loaded": 1, "broken": 1, "paused": 0}
        assert answer["active"][0]["started_at"].endswith("Z")


async def test_schedules_have_those_that_wait_for_a_run_too() -> None:
    async with staged() as stage:
        kinds = {s["kind"]: s for s in (await stage.get("/v1/schedules"))["schedules"]}
        assert set(kinds) == {"cron", "success"}
        assert kinds["success"]["waits_for"] == "`other` to succeed"


async def test_pause_shows_and_resume_takes_it_back() -> None:
    async with staged() as stage:
        assert await stage.ask("POST", "/v1/pipelines/digits/pause") == (200, {"pipeline": "digits", "paused": True})
        assert (await stage.get("/v1/pipelines"))["pipelines"][0]["paused"] is True
        await stage.ask("POST", "/v1/pipelines/digits/resume")
        assert (await stage.get("/v1/pipelines"))["pipelines"][0]["paused"] is False


async def test_same_idempotency_key_gives_the_same_run() -> None:
    async with staged() as stage:
        headers = {"Idempotency-Key": "order-7"}
        first = await stage.ask("POST", "/v1/pipelines/digits/runs", {}, headers=headers)
        second = await stage.ask("POST", "/v1/pipelines/digits/runs", {}, headers=headers)
        assert first == (201, {"id": 1, "pipeline": "digits", "created": True})
        assert second == (200, {"id": 1, "pipeline": "digits", "created": False})
        status, _ = await stage.ask("POST", "/v1/pipelines/digits/runs", {}, headers={"Idempotency-Key": "x" * 300})
        assert status == 400


async def test_start_gives_typed_parameters_force_and_who() -> None:
    async with staged() as stage:
        body = {"parameters": {"rate": {"text": "0.5"}, "fast": {"text": "yes"}, "epochs": 4}, "force": ["train"],
                "tags": {"a": "b"}, "target": "train"}  # fmt: skip
        assert (await stage.ask("POST", "/v1/pipelines/digits/runs", body))[0] == 201
        [(verb, words)] = stage.acts.asked
        assert verb == "start"
        assert words["parameters"] == {"rate": 0.5, "fast": True, "epochs": 4}
        assert (words["force"], words["target"], words["tags"]) == (["train"], "train", {"a": "b"})
        assert (words["kind"], words["who"]) == ("api", look_up(os.getuid(), os.getgid())[0])


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"rate": 1}, {"rate": 1.0}),
        ({"rate": {"text": "1e-3"}}, {"rate": 0.001}),
        ({"rate": {"text": "nan"}}, None),
        ({"rate": {"text": "inf"}}, None),
        ({"rate": True}, None),
        ({"epochs": {"text": "7"}}, {"epochs": 7}),
        ({"epochs": {"text": "7.0"}}, None),
        ({"epochs": 7.0}, None),
        ({"fast": {"text": "TRUE"}}, {"fast": True}),
        ({"fast": {"text": "maybe"}}, None),
        ({"fast": "true"}, None),
        ({"label": {"text": "7"}}, {"label": "7"}),
        ({"label": 7}, None),
        ({"label": None}, None),
    ],
)
async def test_parameters_get_their_declared_type_or_a_fault(
    given: dict[str, Any], made: dict[str, Any] | None
) -> None:
    declared = spec().parameters
    if made is None:
        with pytest.raises(BadParameter, match="parameter `"):
            typed_parameters(given, declared)
    else:
        found = typed_parameters(given, declared)
        assert found == made
        assert typed_parameters(found, declared) == made
        assert [type(value) for value in found.values()] == [type(value) for value in made.values()]


async def test_why_is_past_for_what_ended_and_present_for_what_waits() -> None:
    async with staged() as stage:
        ended, going = await stage.whole(), await stage.run()
        past = await stage.get(f"/v1/runs/{ended}/steps/train/why")
        assert (past["why"], past["waiting"]) == ("never ran", None)
        assert past["attempts"][0]["end"] == "committed"
        assert past["parts"] == {"command": "x"}
        present = await stage.get(f"/v1/runs/{going}/steps/train/why")
        assert present["waiting"] == "waits for a slot on `local`: 2 slots, 2 in use"


async def test_metrics_of_a_reused_step_are_those_of_the_attempt_that_made_it() -> None:
    async with staged() as stage:
        run = await stage.whole()
        again = await stage.reused(run)
        for asked, origin in ((run, None), (again, f"{run}/train")):
            [prepare, train] = (await stage.get(f"/v1/runs/{asked}/metrics"))["steps"]
            assert prepare["last"] == {"rows": 100}
            assert train["last"] == {"accuracy": 0.97}
            assert len(train["metrics"]) == 2
            assert train["reused_from"] == origin


async def test_output_comes_as_a_file_or_as_a_tar_that_unpacks_to_the_same() -> None:
    async with staged() as stage:
        run = await stage.reused(await stage.whole())
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(stage.socket))) as session:
            async with session.get(f"http://x/v1/runs/{run}/outputs/prepare/clean") as answer:
                assert await answer.read() == b"a,b\n1,2\n"
                assert answer.headers["X-Digest"] == "b3:clean"
            async with session.get(f"http://x/v1/runs/{run}/outputs/train/model") as answer:
                data = await answer.read()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert sorted(tar.getnames()) == ["deep", "deep/run.sh", "weights.bin"]
            assert tar.extractfile("weights.bin").read() == bytes(range(256)) * 10  # type: ignore[union-attr]
            assert tar.getmember("deep/run.sh").mode & 0o111


async def test_output_whose_bytes_are_gone_is_a_sentence_with_what_to_do() -> None:
    async with staged() as stage:
        run = await stage.whole()
        (stage.folder / "artifacts" / "aa" / "clean.csv").unlink()
        status, answer = await stage.ask("GET", f"/v1/runs/{run}/outputs/prepare/clean")
        assert status == 409
        assert "gone from the store" in answer["error"]["message"]
        assert answer["error"]["hint"] == "`mlpipectl run digits --force prepare` makes it again"


async def test_symlink_in_place_of_an_artifact_is_never_followed() -> None:
    async with staged() as stage:
        run = await stage.whole()
        artifact = stage.folder / "artifacts" / "aa" / "clean.csv"
        artifact.unlink()
        artifact.symlink_to("/etc/passwd")
        assert (await stage.ask("GET", f"/v1/runs/{run}/outputs/prepare/clean"))[0] == 409


async def test_prometheus_text_names_runs_slots_and_commits() -> None:
    async with staged() as stage:
        await stage.run()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(stage.socket))) as session:
            async with session.get("http://x/metrics") as answer:
                text = await answer.text()
        for line in ('mlpiped_runs{state="running"} 1', 'mlpiped_slots{compute="local"} 2', "mlpiped_pipelines 1"):
            assert line in text.splitlines()
        assert text.endswith("\n")


async def test_doctor_finds_a_broken_plugin_a_lost_datastore_and_a_socket_open_to_all() -> None:
    async with staged() as stage:
        assert (await stage.get("/v1/doctor"))["level"] != "fail"
        stage.plugins.faults = [Fault("/plugins/bad.py", 7, "syntax error")]
        stage.service.about = stage.service.about.__class__(
            "1", 1, 0, stage.folder, stage.socket, datastores={"lab": stage.folder / "gone"}, sqlite=(3, 40, 1)
        )
        stage.socket.chmod(0o666)
        answer = await stage.get("/v1/doctor")
        found = {check["name"]: check for check in answer["checks"] if check["level"] != "ok"}
        assert {"plugins", "datastores", "sqlite", "socket"} <= set(found)
        assert all(check["hint"] for check in found.values())
        assert answer["level"] == "fail"


async def test_doctor_looks_at_the_state_folder_the_clock_and_the_tools() -> None:
    async with staged() as stage:
        stage.folder.chmod(0o770)
        (stage.folder / "ballast").unlink()
        stage.service.about = dataclasses.replace(stage.service.about, python="/none/python")
        later = stage.now + 3_600_000_000
        await stage.ledger.write(moves.set_paused("digits", True, "alice", later))
        stage.service.orphans = orphans
        answer = await stage.get("/v1/doctor")
        found = {(check["name"], check["level"]): check for check in answer["checks"] if check["level"] != "ok"}
        assert "others may write" in found["state", "fail"]["message"]
        assert "chmod go-w" in found["state", "fail"]["hint"]
        assert "kept back" in found["state", "warn"]["message"]
        assert "60 min behind" in found["clock", "warn"]["message"]
        assert "/none/python" in found["tools", "fail"]["message"]
        assert "mlp-1" in found["processes", "warn"]["message"] and "kill 7 8" in found["processes", "warn"]["hint"]
        assert all(check["hint"] for check in found.values())


async def orphans() -> dict[str, list[int]]:
    return {"mlp-1": [7, 8]}


async def test_doctor_tells_each_compute_by_what_it_says_now() -> None:
    async with staged() as stage:
        one = next(iter(stage.acts.compute()))
        card = {"uuid": "GPU-1", "index": 0, "name": "A", "memory": 1, "foreign": None, "holders": []}
        stage.acts.compute = lambda: [  # type: ignore[method-assign]
            {**one, "name": "gpu1", "kind": "ssh", "cards": [card, card], "drained": True},
            {**one, "name": "gpu2", "kind": "ssh", "cards": [], "cards_trouble": "nvidia-smi is not there"},
            {**one, "name": "box", "kind": "docker", "cards": []},
        ]

        async def healths() -> dict[str, str | None]:
            return {"gpu1": None, "gpu2": None, "box": "the engine does not answer"}

        stage.service.healths = healths
        found = [
            (c["level"], c["message"]) for c in (await stage.get("/v1/doctor"))["checks"] if c["name"] == "compute"
        ]
        assert found == [
            ("ok", "`gpu1` (ssh): 2 slots, 2 cards, drained"),
            ("ok", "`gpu2` (ssh): 2 slots"),
            ("warn", "the cards of `gpu2`: nvidia-smi is not there"),
            ("fail", "`box`: the engine does not answer"),
        ]


async def test_doctor_says_which_datastore_is_not_seen_by_inotify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host.mounts, "mount_of", lambda path: Mount(b"/", "nfs4"))
    async with staged() as stage:
        about = dataclasses.replace(stage.service.about, datastores={"lab": stage.folder}, watch={"lab": "inotify"})
        stage.service.about = about
        found = await doctor_host.datastores(stage.service)
        assert [(f.level, "nfs4" in f.message, f.hint and "poll" in f.hint) for f in found] == [("warn", True, True)]
        stage.service.about = dataclasses.replace(about, watch={"lab": "auto"})
        assert [f.level for f in await doctor_host.datastores(stage.service)] == ["ok"]
        assert [f.level for f in await doctor_host.state(stage.service)] == ["warn"]  # it is on a network too


async def test_doctor_reads_the_ledger_and_says_how_to_bring_a_damaged_one_back() -> None:
    async with staged() as stage:

        async def faults() -> list[str]:
            return ["row 7 missing from index runs_open"]

        stage.service.ledger_faults = faults
        found = {check["name"]: check for check in (await stage.get("/v1/doctor"))["checks"]}
        assert (found["ledger"]["level"], "row 7" in found["ledger"]["message"]) == ("fail", True)
        assert "mlpiped restore FILE" in found["ledger"]["hint"]
        stage.service.ledger_faults = stage.ledger.faults  # the real look, at a ledger whose index lies
        await stage.run()
        assert "ledger" not in await _ails(stage)
        await stage.ledger.checkpoint()
        with open(stage.ledger.path, "r+b") as file:  # a page of the disk that reads as zeros
            file.seek(await _page_of(stage, "runs_by_outcome"))
            file.write(bytes(4096))
        assert "is damaged" in (await _ails(stage))["ledger"]["message"]


async def _page_of(stage: Any, index: str) -> int:
    """Where an index begins in the ledger's file."""
    sql = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
    ((page,),) = await stage.ledger._db.call(lambda c: c.execute(sql, (index,)).fetchall())
    ((size,),) = await stage.ledger._db.call(lambda c: c.execute("PRAGMA page_size").fetchall())
    return int((page - 1) * size)


async def _ails(stage: Any) -> dict[str, Any]:
    """What of `doctor` is not well, by name; each says what to do."""
    found = {each["name"]: each for each in (await stage.get("/v1/doctor"))["checks"] if each["level"] != "ok"}
    assert all(each["hint"] for each in found.values()), found
    return found


@pytest.mark.parametrize(("free", "inodes", "level"), [(0.05, 0.9, "warn"), (0.01, 0.9, "fail"), (0.9, 0.01, "fail")])
async def test_doctor_says_that_a_disk_is_nearly_full(
    monkeypatch: pytest.MonkeyPatch, free: float, inodes: float, level: str
) -> None:
    use = os.statvfs_result((4096, 4096, 1000, 1000, int(1000 * free), 1000, 1000, int(1000 * inodes), 0, 255))
    monkeypatch.setattr(doctor_host.os, "statvfs", lambda path: use)
    async with staged() as stage:
        found = await _ails(stage)
        assert found["disk"]["level"] == level
        assert "gc --plan" in found["disk"]["hint"] or "free space" in found["disk"]["hint"]


async def test_doctor_says_that_the_ledgers_disk_is_full() -> None:
    async with staged() as stage:
        stage.ledger._writer.full = True
        found = await _ails(stage)
        assert (found["ledger"]["level"], found["ledger"]["hint"]) == ("fail", "free space on that disk")


async def test_doctor_says_which_limit_of_inotify_is_low_and_how_to_raise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "WATCHES_WARN", 1 << 40)
    async with staged() as stage:
        found = await _ails(stage)
        assert found["inotify"]["message"].startswith("max_user_watches is ")
        assert found["inotify"]["hint"].startswith(f"`sysctl fs.inotify.max_user_watches={4 << 40}`")


async def test_doctor_says_which_compute_is_not_well_and_that_a_clock_was_never_set() -> None:
    async with staged() as stage:
        compute = [
            {
                "name": "local",
                "kind": "local",
                "slots": 1,
                "cards": [],
                "cards_trouble": None,
                "drained": False,
                "health": "its folder is read-only",
            }
        ]
        stage.service.actions.compute = lambda: compute  # type: ignore[method-assign]
        stage.service.clock = _Stopped()
        found = await _ails(stage)
        assert found["compute"]["message"] == "`local`: its folder is read-only"
        assert found["clock"]["message"] == "says 1970-01-01" and "timedatectl" in found["clock"]["hint"]


class _Stopped:
    def now(self) -> int:
        return 0

    def monotonic(self) -> float:
        return 0.0


async def test_doctor_says_what_it_could_not_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(service: Any) -> list[Any]:
        raise OSError("no such thing")

    async def hangs(service: Any) -> list[Any]:
        await anyio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(doctor_host, "inotify", broken)
    monkeypatch.setattr(doctor_host, "tools", hangs)
    monkeypatch.setattr("mlpiped.control.doctor.CHECK_TIME", 0.2)
    async with staged() as stage:
        found = {each["name"]: each for each in (await stage.get("/v1/doctor"))["checks"] if each["level"] == "fail"}
        assert "could not be looked at: no such thing" in found["inotify"]["message"]
        assert found["tools"]["message"] == "gave no answer in time"
        assert found["inotify"]["hint"] and found["tools"]["hint"]


@pytest.mark.parametrize(
    ("version", "bad"),
    [((3, 40, 1), True), ((3, 44, 5), True), ((3, 44, 6), False), ((3, 45, 0), True), ((3, 50, 7), False),
     ((3, 51, 2), True), ((3, 51, 3), False), ((3, 53, 4), False)],
)  # fmt: skip
async def test_sqlite_versions_with_the_wal_reset_bug(version: tuple[int, ...], bad: bool) -> None:
    assert has_wal_reset_bug(version) is bad


async def test_moments_are_read_as_people_write_them() -> None:
    now = 1_800_000_000_000_000
    assert moment("1h", now) == now - 3_600_000_000
    assert moment("2027-01-15T08:00:00Z", now) == now
    assert moment("2027-01-15T09:00:00+01:00", now) == now
    with pytest.raises(UsageError):
        moment("soon", now)


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
