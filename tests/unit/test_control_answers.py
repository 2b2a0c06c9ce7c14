"""What the API answers: documents, keys, numbers, refusals of what is not there."""

from __future__ import annotations

import io
import os
import tarfile
from typing import Any

import aiohttp
import pytest
from control_stage import spec, staged

from mlpiped.control.access import look_up
from mlpiped.control.times import moment
from mlpiped.errors import BadParameter, Fault, UsageError
from mlpiped.ledger import moves
from mlpiped.model import RunOutcome
from mlpiped.protocol import typed_parameters

pytestmark = pytest.mark.anyio


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


async def test_moments_are_read_as_people_write_them() -> None:
    now = 1_800_000_000_000_000
    assert moment("1h", now) == now - 3_600_000_000
    assert moment("2027-01-15T08:00:00Z", now) == now
    assert moment("2027-01-15T09:00:00+01:00", now) == now
    with pytest.raises(UsageError):
        moment("soon", now)
