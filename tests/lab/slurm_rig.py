"""A Slurm cluster of its own on this machine: munged, slurmctld, two slurmd; slurmdbd and MariaDB if asked for.

Everything lies below one folder and on free ports of loopback; nothing of the machine's own Slurm is touched. Each
server is a child that can be killed, stopped and started again. `close` ends them and all that their jobs left running.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from . import packages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
NODES = ("n1", "n2")
CPUS = 16  # what each node claims to have: jobs of tests sleep
MEMORY = 8000  # MiB
GPUS = 2
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
UP = 60.0  # seconds until a server answers
CONFIG = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0,max_rpc_cnt=0
MinJobAge={min_job_age}
InactiveLimit=0
KillWait={kill_wait}
SlurmctldTimeout=60
SlurmdTimeout={node_timeout}
MessageTimeout=5
JobAcctGatherType={gather}
JobAcctGatherFrequency={frequency}
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] \
  CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode={preempt}
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=empty MaxTime=INFINITE State=UP
"""
DBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


def _tools(accounting: bool) -> dict[str, str]:
    return {**PACKAGES, **(ACCOUNTING if accounting else {})}


def free_ports(count: int) -> list[int]:
    """So many consecutive ports of loopback on which nobody listens now."""
    for _ in range(200):
        first = 20000 + secrets.randbelow(12000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return list(range(first, first + count))
    raise RuntimeError("no free ports")


def die_with_parent() -> None:
    """However the tests end, no server outlives them."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Cluster:
    def __init__(
        self,
        *,
        accounting: bool = False,
        min_job_age: int = 300,
        kill_wait: int = 5,
        node_timeout: int = 300,
        preempt: str = "OFF",
        more: str = "",
        within: Sequence[str] = (),
    ) -> None:
        """`preempt`: what becomes of a job of partition `main` when one of `urgent` wants its place. `more`: lines for
        slurm.conf. `within`: words before the command of each server."""
        self.folder = Path(tempfile.mkdtemp(prefix="mlpd-slurm-"))
        self.folder.chmod(0o755)
        self.accounting = accounting
        self.within = list(within)
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, list[str]] = {}
        self._starter = ThreadPoolExecutor(1)  # what dies with its parent dies with the thread that started it
        self.ctld, self.first, self.last, self.dbd, self.sql = free_ports(5)
        self.conf = self.folder / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf), "LC_ALL": "C", "PATH": packages.PATH}
        text = CONFIG.format(
            folder=self.folder, host=socket.gethostname(), ctld=self.ctld, first=self.first, last=self.last,
            min_job_age=min_job_age, kill_wait=kill_wait, node_timeout=node_timeout, preempt=preempt,
            cpus=CPUS, memory=MEMORY, gpus=GPUS,
            gather="jobacct_gather/linux" if accounting else "jobacct_gather/none", frequency=1,
        )  # fmt: skip
        if preempt != "OFF":
            text += "PreemptType=preempt/partition_prio\nPreemptMode=CANCEL\n"
        if accounting:
            text += "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            text += "AccountingStorageEnforce=associations,limits,qos\n"
            text += f"AccountingStoragePort={self.dbd}\nAccountingStoragePass={self.folder}/munge/socket\n"
        self.conf.write_text(text + more)
        for name in ("state", "munge", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        for number in range(GPUS):
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        gres = f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")

    # --- the servers ------------------------------------------------------------------------------------------------
    def start(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        files = [f"--{what}={munge / name}" for what, name in (
            ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"),
        )]  # fmt: skip
        self.serve("munged", ["munged", "--foreground", "--force", *files])
        self.wait_for(lambda: (munge / "socket").exists(), "munged listens")
        if self.accounting:
            self._start_accounting()
        self.serve("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
        for node in NODES:
            self.serve(node, ["slurmd", "-D", "-N", node, "-f", str(self.conf)])
        self.ready()

    def ready(self) -> None:
        """Until both nodes take jobs."""

        def look() -> bool:
            said = self.resume()
            states = [line.split() for line in said.splitlines()]
            return sum(int(count) for state, count in states if state in ("idle", "mixed", "allocated")) == len(NODES)

        self.wait_for(look, "both nodes are up")

    def resume(self) -> str:
        """What an administrator does to nodes that are not well; how they were."""
        said = self.command("sinfo", "-h", "-p", "main", "-o", "%T %D", check=False)
        if "drain" in said or "down" in said or "unk" in said:
            self.command("scontrol", "update", "nodename=n[1-2]", "state=resume", check=False)
        return said

    def compare(self) -> None:
        """Let the nodes tell the controller what they run, as they do by themselves every few minutes."""
        self.command("scontrol", "reconfigure", check=False)

    def _start_accounting(self) -> None:
        data, password = self.folder / "sql", secrets.token_hex(8)
        install = [
            "mariadb-install-db",
            f"--datadir={data}",
            "--user=root",
            "--skip-test-db",
            "--auth-root-authentication-method=socket",
        ]
        subprocess.run(install, env=self.env, check=True, capture_output=True, timeout=120)
        sock = self.folder / "sql.sock"
        self.serve("mariadbd", [
            "mariadbd", "--no-defaults", f"--datadir={data}", "--user=root", f"--socket={sock}", f"--port={self.sql}",
            "--bind-address=127.0.0.1", f"--pid-file={self.folder}/sql.pid", "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=2",
        ])  # fmt: skip
        statement = (
            f"CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '{password}'; CREATE USER slurm@localhost IDENTIFIED BY "
            f"'{password}'; CREATE DATABASE slurm; GRANT ALL ON slurm.* TO slurm@'127.0.0.1'; "
            "GRANT ALL ON slurm.* TO slurm@localhost;"
        )
        client = ["mariadb", "--no-defaults", f"--socket={sock}", "-u", "root", "-e"]

        def answers() -> bool:
            done = subprocess.run([*client, "SELECT 1"], env=self.env, capture_output=True, timeout=30, check=False)
            return done.returncode == 0

        self.wait_for(answers, "mariadbd answers")
        subprocess.run([*client, statement], env=self.env, capture_output=True, timeout=60, check=True)
        conf = self.folder / "slurmdbd.conf"
        conf.write_text(DBD.format(folder=self.folder, dbd=self.dbd, sql=self.sql, password=password))
        conf.chmod(0o600)
        self.serve("slurmdbd", ["slurmdbd", "-D"])
        self.wait_for(
            lambda: self.command("sacctmgr", "-n", "list", "cluster", check=None) is not None, "slurmdbd answers"
        )
        for words in (
            ("cluster", "lab"),
            ("account", "ml"),
            ("user", "root", "account=ml"),
            ("user", "nobody", "account=ml"),
        ):
            self.command("sacctmgr", "-i", "add", *words, check=False)

    def serve(self, name: str, command: list[str] | None = None) -> None:
        """Start a server, or start it again as it was."""
        self._commands[name] = command = command or self._commands[name]
        with open(self.folder / f"{name}.out", "ab") as out:
            started = self._starter.submit(
                subprocess.Popen, [*self.within, *command], env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
            self.servers[name] = started.result()

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal a server; returns when it is gone, where that is what the signal means."""
        self.servers[name].send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.servers[name].wait(30)

    def save(self) -> None:
        """Until the controller has written down all that it knows now: killed after that, it gives no id out again."""
        name = f"saved-{secrets.token_hex(6)}"
        job = self.command(
            "sbatch", "--parsable", "--hold", f"--job-name={name}", "--wrap=true", "--chdir=/tmp"
        ).strip()
        kept = self.folder / "state" / "job_state"
        self.wait_for(
            lambda: kept.exists() and name.encode() in kept.read_bytes(), "the controller has saved its state"
        )
        self.command("scancel", job)

    @contextlib.contextmanager
    def forgetting(self) -> Iterator[None]:
        """Of what is done meanwhile the controller knows nothing afterwards: it was killed, and is as it was before."""
        state, before = self.folder / "state", self.folder / "state.before"
        self.kill("slurmctld", signal.SIGTERM)  # it saves all
        shutil.copytree(state, before)
        self.restart()
        yield
        self.kill("slurmctld")
        shutil.rmtree(state)
        before.rename(state)
        self.restart()

    def unread(self) -> set[int]:
        """The sockets (their inodes) of those whose words the controller has received and not read."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        here = f":{self.ctld:04X}"
        told = {row[2] for row in rows if row[1].endswith(here) and int(row[4].partition(":")[2], 16)}
        return {int(row[9]) for row in rows if row[1] in told and row[2].endswith(here)}

    def controller_answers(self) -> bool:
        return "is UP" in self.command("scontrol", "ping", check=False)

    def restart(self, name: str = "slurmctld") -> None:
        self.serve(name)
        self.wait_for(self.controller_answers, "slurmctld answers")

    # --- what people do ---------------------------------------------------------------------------------------------
    def command(self, *argv: str, check: bool | None = True, user: int | None = None, stdin: str = "") -> str:
        """What it said; with `check` None: nothing (`None`) when it has failed."""
        done = subprocess.run(
            argv, env=self.env, cwd="/", input=stdin, capture_output=True, text=True, timeout=60, check=False,
            user=user, group=user,
        )  # fmt: skip
        if done.returncode and check:
            raise AssertionError(f"{' '.join(argv)}: {done.stderr}")
        return done.stdout if done.returncode == 0 or check is False else None  # type: ignore[return-value]

    def jobs(self) -> dict[int, tuple[str, str]]:
        """Id -> (state, name) of all that the controller knows."""
        said = self.command("squeue", "-h", "-t", "all", "-o", "%i|%T|%j")
        found = (line.split("|", 2) for line in said.splitlines() if re.match(r"\d+\|", line))
        return {int(job): (state, name) for job, state, name in found}

    def wait_for(self, look: Callable[[], object], what: str, timeout: float = UP) -> None:
        deadline = time.monotonic() + timeout
        while not look():
            dead = [name for name, server in self.servers.items() if server.poll() not in (None, -9, -15, 0)]
            if dead or time.monotonic() > deadline:
                raise AssertionError(f"not so: {what}; ended: {dead}\n{self.last_words()}")
            time.sleep(0.1)

    def last_words(self) -> str:
        found = []
        for path in sorted(self.folder.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-25:]
            found.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(found)

    # --- taken down -------------------------------------------------------------------------------------------------
    def close(self) -> None:
        for server in self.servers.values():
            with contextlib.suppress(ProcessLookupError):
                server.send_signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.command("scancel", "-u", "root", check=False)
        for name in reversed(list(self.servers)):
            server = self.servers[name]
            if server.poll() is None:
                server.send_signal(signal.SIGTERM)
                try:
                    server.wait(10)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait(10)
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._starter.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stepds(self) -> set[int]:
        """Who looks after the jobs that run; they outlive slurmd."""

        def name(pid: int) -> bytes:
            with contextlib.suppress(OSError):
                return Path("/proc", str(pid), "cmdline").read_bytes()
            return b""

        return {pid for pid in self._left() if name(pid).startswith(b"slurmstepd")}

    def _left(self) -> Iterator[int]:
        """Processes that this cluster has started: its slurmstepd, and steps of its jobs."""
        mark = f"SLURM_CONF={self.conf}".encode()
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                        yield int(name)


@contextlib.contextmanager
def running(**options: Any) -> Iterator[Cluster]:
    """A cluster that takes jobs. Where none can be had it is a skip that says why, and in CI a failure."""
    accounting = bool(options.get("accounting"))
    if (reason := packages.why_not("starting a Slurm cluster", _tools(accounting))) is not None:
        packages.not_here(reason)
    packages.install(_tools(accounting))
    cluster = Cluster(**options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """For all tests that leave it running as they found it."""
    with running() as cluster:
        yield cluster
