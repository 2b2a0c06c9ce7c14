"""Who may ask the API, and what who asks may do."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from control_stage import staged

from mlpiped.control.access import Access, Peer, look_up
from mlpiped.control.routes import ROUTES
from mlpiped.errors import NotPermitted

pytestmark = pytest.mark.anyio
NOBODY = Peer(65534, 65534, 1, "nobody", frozenset({"nogroup"}))


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
