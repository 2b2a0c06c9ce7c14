"""ALL runs: whose turn it is. The real ledger; steps are played by the scripted backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import anyio
import pytest
from test_run import WHERE, Lab

from mlpiped.clock import SystemClock
from mlpiped.ledger import Ledger
from mlpiped.model import RunState
from mlpiped.placement.decide import Place
from mlpiped.scheduling.dispatch import Dispatch
from mlpiped.scheduling.scheduler import Scheduler
from mlpiped.spec import PipelineSpec, version_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


def registry(**fields: Any) -> Any:
    step = {"name": "a", "where": WHERE, "arguments": [{"kind": "text", "text": "true"}], "allow_reuse": False}
    plain = {"name": "p", "where": WHERE, "experiment": "p", "steps": [step], **fields}
    spec = PipelineSpec.model_validate(plain)
    loaded = SimpleNamespace(spec=spec, version=version_of(spec), owner="alice")
    return SimpleNamespace(get=lambda name: loaded if name == "p" else None, all=lambda: [loaded])


@pytest.mark.parametrize("overlap", ["queue", "parallel", "cancel_previous"])
async def test_a_run_that_opens_just_as_the_one_before_ends_is_not_left_behind(tmp_path: Path, overlap: str) -> None:
    (tmp_path / "lab").mkdir()
    ledger = await Ledger.open(tmp_path, SystemClock())
    try:
        lab = Lab(ledger, tmp_path)
        dispatch = Dispatch([Place("fake", 2)], {}, None)
        scheduler = Scheduler(
            lab.world, registry(overlap=overlap, max_parallel=1), {"fake": lab.backend}, lab.clock, dispatch
        )
        write = ledger.write

        async def write_when_nobody_is_left(*ops: Any, **facts: Any) -> list[Any]:
            """The ledger takes its time over the opening: the run before ends meanwhile."""
            if len(scheduler.executions) == 1 and any("open_run" in op.__qualname__ for op in ops):
                with ledger.subscribe(kinds=("run.finished",)) as ends:
                    await ends.receive()
                while scheduler.executions:
                    await anyio.lowlevel.checkpoint()
            return await write(*ops, **facts)

        cast(Any, ledger).write = write_when_nobody_is_left
        lab.backend.run_for = 0.2
        async with anyio.create_task_group() as tasks:
            await scheduler.recover(tasks)
            with ledger.subscribe(kinds=("run.finished",)) as ends, anyio.fail_after(20):
                await scheduler.start("p", parameters={}, who="alice")
                second, _ = await scheduler.start("p", parameters={}, who="alice")
                seen = 0
                while seen < 2:
                    seen += len(await ends.receive())
        row = await ledger.run(second)
        assert row is not None
        assert row.state is RunState.FINISHED
    finally:
        await ledger.close()
