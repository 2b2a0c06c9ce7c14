"""Steps in containers through the real daemon: what an engine does to them, what they see, and what is left of them."""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, steps, until
from lab import docker_rig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.docker_rig import Engine

pytestmark = pytest.mark.lab


def on(engine: Engine, more: str = "", extra: str = "", url: str | None = None) -> Daemon:
    """A daemon whose compute `box` is this engine."""
    settings = f'kind = "docker"\nurl = "{url or engine.url}"\nslots = 4\npull = "never"\n{more}\n'
    return Daemon(extra=f"[compute.box]\n{settings}\n{extra}")


@pytest.fixture
def daemon(docker_engine: Engine) -> Iterator[Daemon]:
    with on(docker_engine) as found:
        yield found


def test_after_gc_the_engine_and_the_state_folder_are_as_they_were(docker_engine: Engine) -> None:
    with on(docker_engine, extra='[retention]\nruns = "1ms"\nlogs = "1ms"\n') as daemon:
        before = docker_engine.holds()
        (daemon.plugins / "Dockerfile").write_text(
            f"FROM lab-python AS first\nRUN echo {secrets.token_hex(8)} > /made\nVOLUME /cache\n"
            "FROM lab-python\nCOPY --from=first /made /made\n"
        )
        (daemon.plugins / "Broken").write_text(f"FROM lab-python\nRUN echo {secrets.token_hex(8)}\nRUN false\n")
        daemon.install(
            "built",
            """
made = Environment(dockerfile="Dockerfile")
both = [CommandStep(["cat", "/made"], name="good", environment=made, allow_reuse=False),
        CommandStep(["false"], name="bad", environment=made)]
built = Pipeline("built", steps=both)
broken = Pipeline("broken", steps=[CommandStep(["true"], name="s", environment=Environment(dockerfile="Broken"))])
quick = Pipeline("quick", steps=[CommandStep(["true"], name="s", allow_reuse=False)])
""",
            "built", "broken", "quick",
        )  # fmt: skip
        assert steps(daemon.go("built")) == {"good": "succeeded", "bad": "failed"}
        assert steps(daemon.go("broken")) == {"s": "failed"}
        assert docker_engine.holds()["images"] > before["images"]
        planned = {part["what"]: part["count"] for part in daemon.json("gc", "--plan")["parts"]}

        def clean() -> bool:
            """The engine tells times to the second."""
            assert daemon.json("gc")["faults"] == []
            return docker_engine.holds() == before

        assert planned["images"] >= 1
        until(clean, "nothing is left on the engine", pause=0.5)
        left = sorted(path.name for path in (daemon.state / "jobs").iterdir() if not path.name.startswith("."))
        assert left == [] and list((daemon.state / "docker-images").iterdir()) == []
        assert steps(daemon.go("built"))["good"] == "succeeded"
        until(clean, "nothing is left on the engine", pause=0.5)


# --- what a step sees of the machine ------------------------------------------------------------------------------
def test_what_a_step_asks_for_and_the_config_allows_is_what_its_container_has(
    docker_engine: Engine, tmp_path: Path
) -> None:
    for name in ("read", "write", "hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
        (tmp_path / name).chmod(0o777)
    more = f'user = "1234:2345"\nallow_mounts = ["{tmp_path}/read", "{tmp_path}/write:rw"]'
    with on(docker_engine, more) as daemon:
        daemon.install(
            "inside",
            f"""
look = '''
cd /sys/fs/cgroup
cat memory/memory.limit_in_bytes memory.max 2>/dev/null
cat cpu/cpu.cfs_quota_us cpu.max 2>/dev/null | head -c 5; echo
df -m /dev/shm | tail -1 | awk '{{{{print $2}}}}' || true
id -u; id -g
ls -m /sys/class/net
cat {tmp_path}/read/a; echo; touch {tmp_path}/read/b 2>/dev/null || echo "read only"
touch {tmp_path}/write/b && echo written
ls {tmp_path}
'''
image = Environment(image="lab-python")
wide = Resources(cpus=0.5, memory="96M", shm_size="32M", network=True)
inside = Pipeline("inside", steps=[CommandStep(look, name="wide", environment=image, resources=wide),
                                   CommandStep("true;" + look, name="plain", environment=image)])
""".replace("{{{{", "{").replace("}}}}", "}"),
        )  # fmt: skip
        run = daemon.go("inside")
        said = {name: daemon.ctl("logs", f"{run['id']}/{name}").stdout.splitlines() for name in ("wide", "plain")}
    mounts = ["read", "read only", "written", "read", "write"]
    assert said["wide"] == [str(96 << 20), "50000", "32", "1234", "2345", "eth0, lo", *mounts]
    assert said["plain"][1:] == ["10000", "64", "1234", "2345", "lo", *mounts]


# --- what happens to it, each in its own words ----------------------------------------------------------------------
TOLD = """
image = Environment(image="lab-python")
bare = Environment(image="lab-bare")
small = Resources(memory="64M")
eat = ["python", "-c", "x = bytearray(300 << 20)"]
told = Pipeline("told", steps=[
    CommandStep(eat, name="memory", environment=image, resources=small),
    CommandStep(["/busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=300M", "count=1"], name="bare_memory",
                environment=bare, resources=small),
    CommandStep(["no-such-program"], name="command", environment=image),
    CommandStep(["/etc/passwd"], name="program", environment=image),
    CommandStep("echo hello", name="shell", environment=bare),
    CommandStep(["true"], name="image", environment=Environment(image="no/such:v1")),
    CommandStep(["true"], name="processors", environment=image, resources=Resources(cpus=1000)),
])
"""
WORDS = {
    "memory": "out of memory: it needed more than its limit of 64 MiB",
    "bare_memory": "out of memory: it needed more than its limit of 64 MiB",
    "command": "command not found: `no-such-program`",
    "program": "permission denied: `/etc/passwd` is not an executable file",
    "shell": "the step's command is a text for /bin/sh, and its image has none",
    "image": "image `no/such:v1`: no image `no/such:v1` on `box`",
    "processors": "the engine refuses the step's container: ",
}


def test_I3_each_way_in_which_a_step_fails_has_its_own_sentence(daemon: Daemon) -> None:
    daemon.install("told", TOLD)
    run = daemon.go("told")
    assert set(steps(run).values()) == {"failed"}
    for name, words in WORDS.items():
        assert words in daemon.ctl("why", f"{run['id']}/{name}").stdout, name


# --- what is done to it, and to the engine --------------------------------------------------------------------------
GATED = """
gate = Pipeline("gate", steps=[CommandStep(
    "echo $MLPIPED_ATTEMPT; until [ -e {flag} ]; do sleep 0.02; done; echo went", name="s",
    environment=Environment(image="lab-python"), allow_reuse=False)])
"""


@pytest.fixture
def shaken(own_engine: Engine, tmp_path: Path) -> Iterator[Daemon]:
    """On an engine that may be killed; a step of `gate` runs until there is a file `go`."""
    tmp_path.chmod(0o777)
    with on(own_engine, f'allow_mounts = ["{tmp_path}:rw"]') as daemon:
        daemon.install("gate", GATED.format(flag=tmp_path / "go"))
        yield daemon
    if own_engine.process is not None:
        own_engine.stop()
    own_engine.start()


def attempts(daemon: Daemon, run: int) -> list[str]:
    """What the attempts of the step have printed first, so far: their numbers."""
    return daemon.ctl("logs", f"{run}/s").stdout.split()


def running(daemon: Daemon, run: int, attempt: int = 1) -> None:
    until(lambda: attempts(daemon, run)[:1] == [str(attempt)], f"attempt {attempt} runs", 60)


def why(daemon: Daemon, run: int) -> str:
    return daemon.ctl("why", f"{run}/s").stdout


def test_I5_a_container_that_is_removed_by_hand_is_told_and_its_step_runs_again(
    shaken: Daemon, own_engine: Engine, tmp_path: Path
) -> None:
    run = shaken.run("gate")
    running(shaken, run)
    own_engine.docker("rm", "--force", *own_engine.containers())
    running(shaken, run, 2)
    assert "its container is gone: somebody removed it" in why(shaken, run)
    (tmp_path / "go").touch()
    assert shaken.end(run)["outcome"] == "succeeded"


def test_I2_an_engine_that_took_its_containers_with_it_is_told_and_the_step_runs_again(
    shaken: Daemon, own_engine: Engine, tmp_path: Path
) -> None:
    run = shaken.run("gate")
    running(shaken, run)
    own_engine.kill()
    own_engine.start()
    running(shaken, run, 2)
    assert "its container was ended from outside: the engine was restarted, or somebody stopped it" in why(shaken, run)
    (tmp_path / "go").touch()
    assert shaken.end(run)["outcome"] == "succeeded"


def test_I1_an_engine_that_left_its_containers_alone_is_waited_for_and_the_step_goes_on(
    shaken: Daemon, own_engine: Engine, tmp_path: Path
) -> None:
    own_engine.stop()
    own_engine.start(live_restore=True)
    run = shaken.run("gate")
    running(shaken, run)
    own_engine.kill()
    until(lambda: "does not answer" in why(shaken, run), "that it is away", 60)
    (tmp_path / "go").touch()
    own_engine.start(live_restore=True)
    found = shaken.end(run)
    assert found["outcome"] == "succeeded" and found["steps"][0]["attempts"] == 1
    assert attempts(shaken, run) == ["1", "went"]


class Rival:
    """Somebody who takes the name of each container just before we do, while there is a file `rival`: our words to the
    engine come through here."""

    def __init__(self, engine: Engine, place: Path) -> None:
        self.engine, self.socket, self.on = engine, place / "engine", place / "rival"
        self.on.touch()
        self.taken: list[str] = []
        self._server = socket.create_server(str(self.socket), family=socket.AF_UNIX)
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def close(self) -> None:
        self._server.close()
        for name in self.taken:
            self.engine.docker("rm", "--force", name, check=False)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._server.accept()
                theirs = socket.socket(socket.AF_UNIX)
                theirs.connect(str(self.engine.socket))
                for source, sink in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                wanted = re.search(rb"containers/create\?name=([a-z0-9.-]+) ", data)
                if wanted is not None and self.on.exists():
                    self.taken.append(wanted[1].decode())
                    self.engine.docker("create", "--name", self.taken[-1], docker_rig.PYTHON, "true", check=False)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def test_I4_a_name_that_a_stranger_took_is_told_and_the_stranger_left_alone(
    docker_engine: Engine, tmp_path: Path
) -> None:
    rival = Rival(docker_engine, tmp_path)
    try:
        with on(docker_engine, url=rival.url) as daemon:
            daemon.install("gate", GATED.format(flag="/bin/sh"))
            run = daemon.run("gate")
            until(lambda: "a container that is not ours has the name `mlp-" in why(daemon, run), "who has the name", 60)
            rival.on.unlink()
            found = daemon.end(run, 120)
            assert found["outcome"] == "succeeded"
        assert rival.taken and all(docker_engine.inspect(name) for name in rival.taken)
    finally:
        rival.close()


def test_the_log_of_a_container_without_a_shell_is_followed_while_it_runs(
    docker_engine: Engine, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    with on(docker_engine, f'allow_mounts = ["{tmp_path}"]') as daemon:
        script = f"echo ready; until /busybox test -e {tmp_path}/go; do /busybox sleep 0.02; done; echo went"
        daemon.install(
            "bare",
            f"""
bare = Pipeline("bare", steps=[CommandStep(["/busybox", "sh", "-c", {script!r}], name="s",
                                           environment=Environment(image="lab-bare"))])
""",
        )
        run = daemon.run("bare")
        with daemon.following("logs", f"{run}/s", "-f") as follower:
            assert follower.stdout is not None
            assert follower.stdout.readline().endswith("ready\n")
            assert steps(daemon.show(run)) == {"s": "running"}
            (tmp_path / "go").touch()
            assert follower.stdout.readline().endswith("went\n")
        assert daemon.end(run)["outcome"] == "succeeded"
