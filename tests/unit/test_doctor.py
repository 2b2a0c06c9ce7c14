"""What `doctor` looks at, and what it says."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import anyio
import pytest
from control_stage import staged

from mlpiped.control import doctor_host
from mlpiped.control.doctor import has_wal_reset_bug
from mlpiped.errors import Fault
from mlpiped.files.mounts import Mount
from mlpiped.ledger import moves

pytestmark = pytest.mark.anyio


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
