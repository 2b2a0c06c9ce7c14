"""What a `true` costs on the local backend, all told. No test: `python tests/bench/measure_local.py [jobs] [slots]`."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import anyio

from mlpiped.backends.base import Exited, Job, JobOutput, Part
from mlpiped.backends.local import LocalBackend


class Account:
    """The kernel's account of this process and of all that it starts; the supervisors are waited for by nobody."""

    def __init__(self) -> None:
        self.folder = Path(f"/sys/fs/cgroup/cpuacct/measure-{os.getpid()}")
        try:
            self.folder.mkdir()
            (self.folder / "cgroup.procs").write_text("0")
        except OSError:
            self.folder = Path("/nowhere")

    def seconds(self) -> float:
        try:
            return int((self.folder / "cpuacct.usage").read_text()) / 1e9
        except OSError:
            return float("nan")

    def close(self) -> None:
        if self.folder.exists():
            Path("/sys/fs/cgroup/cpuacct/cgroup.procs").write_text("0")
            time.sleep(0.2)
            self.folder.rmdir()


def ticks(pid: int) -> tuple[float, float]:
    """(own, its children's) CPU seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    hertz = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / hertz, (int(fields[13]) + int(fields[14])) / hertz


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(count: int, slots: int) -> None:
    account = Account()
    with tempfile.TemporaryDirectory(dir=os.environ.get("MEASURE_DIR")) as place:
        async with AsyncExitStack() as stack:
            backend = LocalBackend(
                "local", Path(place, "jobs"), Path(place, "envs"), slots=slots, memory=None, cpus=None
            )
            await backend.start(stack)
            usage = [0.0, 0.0]

            async def one(number: int) -> None:
                outputs = (JobOutput("model", "model", "file"),)
                job = Job(token=f"t-{number}", arguments=((Part("text", "true"),),), outputs=outputs)
                outcome = await backend.wait(await backend.submit(job))
                assert isinstance(outcome, Exited) and outcome.code == 0, outcome
                usage[0] += outcome.cpu or 0.0
                await backend.discard(job.token, keep_logs=True)

            await one(-1)
            usage[0] = 0.0
            todo = iter(range(count))

            async def slot() -> None:
                for number in todo:
                    await one(number)

            total = account.seconds()
            daemon, began = own_cpu(), time.perf_counter()
            zygote = backend._launcher.pid
            assert zygote is not None
            below = ticks(zygote)
            async with anyio.create_task_group() as group:
                for _ in range(slots):
                    group.start_soon(slot)
            wall = time.perf_counter() - began
            await backend.removed()
            daemon = own_cpu() - daemon
            await anyio.sleep(0.1)
            after, total = ticks(zygote), account.seconds() - total
            print(f"{count} jobs, {slots} slots: {count / wall:.0f} jobs/s, {wall / count * 1e3:.2f} ms wall a job")
            print(f"  daemon      {daemon / count * 1e3:.2f} ms CPU a job")
            print(f"  zygote      {(after[0] - below[0]) / count * 1e3:.2f}")
            print(f"  steps       {usage[0] / count * 1e3:.2f}")
            print(f"  all told    {total / count * 1e3:.2f}")
    account.close()


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    anyio.run(measure, *(numbers + [500, 2][len(numbers) :]))
