"""MpiStep: one script as several processes, on one machine or on several nodes of a cluster.

It is the same primitive as any other step: a command, which begins with the program that starts the processes. So how
many there are, and by what they find each other, is a part of the command and of the step's identity: what N processes
compute together is not what N + 1 do (batches, seeds, the order of sums), wherever they run.
"""

from __future__ import annotations

from mlpiped.sdk import values
from mlpiped.sdk.errors import DefinitionError
from mlpiped.sdk.steps import PythonScriptStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import Literal, Unpack

    from mlpiped.sdk.steps import Argument, Settings

LAUNCHERS = ("srun", "torchrun", "mpirun")
MOST = 10_000  # of each; a slip of the finger must not fill a cluster

# Each node has one torchrun, which starts the processes there; they meet on the first node. $1, $2: nodes, processes.
MEET = (
    'nodes=$1 each=$2; shift 2; head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); '
    'exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --export=ALL '
    '--cpus-per-task="$((each * ${SLURM_CPUS_PER_TASK:-1}))" torchrun --nnodes="$nodes" --nproc-per-node="$each" '
    '--rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" "$@"'
)


class MpiStep(PythonScriptStep):
    """Runs `script_name` as `process_count_per_node` processes on each of `node_count` nodes.

    `launcher="srun"` is Slurm's own: the processes find each other by PMI and `SLURM_*`. `"torchrun"` starts them on
    one machine of any kind, or with `node_count=` above 1 on nodes of a Slurm cluster. `"mpirun"` starts them on one
    machine of any kind. When one of them fails the others are ended and the step has failed.
    `cpus=` of `Resources` are for each process; `memory=` and `gpus=` for each node.
    """

    def __init__(
        self,
        script_name: str | os.PathLike[str],
        *,
        arguments: Sequence[Argument] = (),
        node_count: int = 1,
        process_count_per_node: int = 1,
        launcher: Literal["srun", "torchrun", "mpirun"] = "srun",
        code: Literal["tree", "imports"] = "tree",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(script_name, arguments=arguments, code=code, **settings)
        self.nodes = self._count(node_count, "node_count")
        self.tasks = self._count(process_count_per_node, "process_count_per_node")
        self.launcher = values.choice(launcher, LAUNCHERS, "launcher", self.where)
        if self.launcher == "mpirun" and self.nodes > 1:
            hint = 'over several nodes it is Slurm that starts them: `launcher="srun"`'
            raise DefinitionError(
                f"mpirun starts processes on one machine, and node_count is {self.nodes}", self.where, hint
            )

    def _count(self, value: object, what: str) -> int:
        count = values.whole(value, what, self.where, least=1)
        if count > MOST:
            raise DefinitionError(f"{what} must be at most {MOST}: {count}", self.where)
        return count

    def start(self) -> list[str]:
        nodes, tasks, script = str(self.nodes), str(self.tasks), str(self.script)
        if self.launcher == "srun":
            counts = [f"--nodes={nodes}", f"--ntasks={self.nodes * self.tasks}", f"--ntasks-per-node={tasks}"]
            return ["srun", *counts, "--kill-on-bad-exit=1", "--export=ALL", "python", script]
        if self.launcher == "mpirun":
            return ["mpirun", "-n", tasks, "python", script]
        if self.nodes == 1:
            return ["torchrun", "--standalone", f"--nproc-per-node={tasks}", script]
        return ["/bin/sh", "-c", MEET, "torchrun", nodes, tasks, script]

    def shape(self) -> dict[str, object]:
        return {"nodes": self.nodes, "tasks": self.tasks, "cluster": self.launcher == "srun" or self.nodes > 1}
