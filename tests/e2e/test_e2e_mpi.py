"""MpiStep: ranks on two nodes of a real cluster, and several processes on one machine."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

import pytest
from harness import BIN, SDK, Daemon, lines, steps, until
from lab import packages, slurm_rig

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]
RANKS = """
import os, sys, time
rank, size, node = (os.environ[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURMD_NODENAME"))
with open(EFFECTS, "a") as file:
    file.write(f"{rank} of {size} on {node} with {os.environ['SLURM_CPUS_ON_NODE']}\\n")
made, what = sys.argv[1:]
if what == "fail" and rank == "1":
    print("rank 1 has no such model", file=sys.stderr)
    sys.exit(3)
if what != "run":
    time.sleep(150)
if rank == "0":
    open(made, "w").write(f"made by {size}\\n")
"""
STEP = """
made = PipelineData("made")
step = MpiStep("ranks.py", source_directory="code", name="step", arguments=[made, "WHAT"], outputs=[made], MORE)
pipeline = Pipeline("ranks", steps=[step])
"""
STEP_LINE = STEP.splitlines()[2]
NODES = 'node_count=2, process_count_per_node=2, compute_target="cluster", grace="2s"'


STARTS = """
# Stands in for programs that are not here: as many processes as it is told to start, in the words of either.
import os, subprocess, sys
first, *words = sys.argv[1:]
count = words.pop(0) if first == "-n" else {"--standalone": words}[first].pop(0).removeprefix("--nproc-per-node=")
command = words if first == "-n" else [sys.executable, *words]
ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}) for rank in range(int(count))]
sys.exit(max(rank.wait() for rank in ranks))
"""


class Desk:
    """A daemon beside a cluster of two nodes, and a script that is run by all ranks."""

    def __init__(self, cluster: slurm_rig.Cluster) -> None:
        self.cluster = cluster
        extra = '[compute.cluster]\nkind = "slurm"\npartition = "main"\npoll_interval = "200ms"\n'
        self.tools = cluster.folder / "tools"
        self.tools.mkdir(exist_ok=True)
        env = {**cluster.env, "PATH": f"{self.tools}:{BIN}:{packages.PATH}"}
        self.daemon = Daemon(extra=extra, env={name: env[name] for name in ("SLURM_CONF", "LC_ALL", "PATH")})
        self.effects = self.daemon.root / "effects"
        code = self.daemon.plugins / "code"
        code.mkdir(parents=True)
        (code / "ranks.py").write_text(RANKS.replace("EFFECTS", repr(str(self.effects))))

    def install(self, what: str = "run", more: str = NODES) -> None:
        self.daemon.install("ranks", STEP.replace("WHAT", what).replace("MORE", more))

    def why(self, run: int) -> str:
        return self.daemon.ctl("why", f"{run}/step").stdout

    def tool(self, name: str, text: str) -> None:
        path = self.tools / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def close(self) -> None:
        self.daemon.close()
        self.cluster.command("scancel", "-u", "root", check=False)


@pytest.fixture
def desk(slurm_cluster: slurm_rig.Cluster) -> Iterator[Desk]:
    found = Desk(slurm_cluster)
    yield found
    found.close()


def test_ranks_of_both_nodes_run_in_one_attempt_and_their_number_is_part_of_its_identity(desk: Desk) -> None:
    daemon = desk.daemon.start()
    desk.install()
    found = daemon.go("ranks")
    assert steps(found) == {"step": "succeeded"}, desk.why(found["id"])
    assert sorted(line.split(" with")[0] for line in lines(desk.effects)) == [
        "0 of 4 on n1", "1 of 4 on n1", "2 of 4 on n2", "3 of 4 on n2",
    ]  # fmt: skip
    assert daemon.ctl("get", f"{found['id']}/made", "-").stdout == "made by 4\n"
    assert found["steps"][0]["attempts"] == 1
    assert steps(daemon.go("ranks")) == {"step": "reused"}
    desk.install(more=NODES.replace("process_count_per_node=2", "process_count_per_node=1"))
    assert steps(daemon.go("ranks")) == {"step": "succeeded"}
    assert len(lines(desk.effects)) == 4 + 2


def test_a_rank_that_fails_ends_the_others_and_the_step_fails_with_its_words(desk: Desk) -> None:
    daemon = desk.daemon.start()
    desk.install("fail")
    found = daemon.go("ranks")
    assert steps(found) == {"step": "failed"}
    assert "rank 1 has no such model" in desk.why(found["id"])
    assert len(lines(desk.effects)) == 4
    until(lambda: not _ranks(desk), "no rank is left")


def test_cancel_ends_the_ranks_of_all_nodes(desk: Desk) -> None:
    daemon = desk.daemon.start()
    desk.install("sleep")
    run = daemon.run("ranks")
    until(lambda: len(lines(desk.effects)) == 4, "all ranks run")
    assert len(_ranks(desk)) == 4
    assert daemon.ctl("cancel", run).returncode == 0
    assert steps(daemon.end(run)) == {"step": "cancelled"}
    until(lambda: not _ranks(desk), "no rank is left")


def test_a_step_with_more_nodes_than_there_are_waits_and_says_why(desk: Desk) -> None:
    daemon = desk.daemon.start()
    desk.install(more=NODES.replace("node_count=2", "node_count=3"))
    run = daemon.run("ranks")
    until(lambda: "cluster has 2 nodes in all, 3 are asked for" in desk.why(run), "the reason")
    assert lines(desk.effects) == []


def test_a_step_that_needs_two_nodes_is_not_loaded_for_a_compute_that_is_one_machine(desk: Desk) -> None:
    daemon = desk.daemon.start()
    more = 'node_count=2, compute_target="local"'
    daemon.plugin("ranks", SDK + STEP.replace("WHAT", "run").replace("MORE", more))
    (fault,) = until(daemon.broken, "the fault")
    assert fault["message"] == "step `step` needs 2 nodes, and `local` is no cluster"
    assert (fault["file"].endswith("ranks.py"), fault["line"]) == (True, (SDK + STEP).splitlines().index(STEP_LINE) + 1)


def test_mpirun_and_torchrun_are_started_on_one_machine(desk: Desk) -> None:
    for name in ("mpirun", "torchrun"):
        desk.tool(name, f"#!{sys.executable}\n{STARTS}")
    (desk.daemon.plugins / "code" / "ranks.py").write_text(
        f"import os, sys\nwith open({str(desk.effects)!r}, 'a') as f: f.write(os.environ['RANK'] + '\\n')\n"
        "if os.environ['RANK'] == '0': open(sys.argv[1], 'w').write('made')\n"
    )
    daemon = desk.daemon.start()
    for launcher in ("mpirun", "torchrun"):
        desk.effects.unlink(missing_ok=True)
        desk.install(more=f'process_count_per_node=3, launcher="{launcher}", compute_target="local"')
        found = daemon.go("ranks")
        assert steps(found) == {"step": "succeeded"}, desk.why(found["id"])
        assert sorted(lines(desk.effects)) == ["0", "1", "2"], launcher


def test_torchrun_over_nodes_is_started_once_on_each_and_told_where_they_meet(desk: Desk) -> None:
    desk.tool(
        "torchrun", f'#!/bin/sh\necho "$SLURMD_NODENAME $SLURM_CPUS_PER_TASK $*" >> {desk.effects}\necho x > "$7"\n'
    )
    daemon = desk.daemon.start()
    desk.install(more=NODES + ', launcher="torchrun", resources=Resources(cpus=2)')
    found = daemon.go("ranks")
    assert steps(found) == {"step": "succeeded"}, desk.why(found["id"])
    said = sorted(lines(desk.effects))
    assert [line.split()[:2] for line in said] == [["n1", "4"], ["n2", "4"]]
    assert said[0].split()[2:8] == said[1].split()[2:8]
    assert "--nnodes=2 --nproc-per-node=2" in said[0] and "--rdzv-endpoint=n1:2" in said[0]


def _ranks(desk: Desk) -> list[int]:
    """Processes of the script that live."""
    mark = str(desk.effects).encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
                with open(f"/proc/{name}/environ", "rb") as file:
                    around = file.read()
            except OSError:
                continue
            if (
                b"ranks.py" in words
                and b"srun" not in words[0]
                and b"SLURM_PROCID=" in around
                and mark.rpartition(b"/")[0] in around
            ):
                found.append(int(name))
    return found
