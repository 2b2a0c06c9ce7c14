"""From the config to backends: which are built, who the daemon is to others, and a start without one of them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AsyncExitStack
from types import ModuleType
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mlpiped import computes, daemon
from mlpiped.backends.fake import FakeBackend
from mlpiped.backends.local import LocalBackend
from mlpiped.config import settings as config
from mlpiped.daemon import Daemon
from mlpiped.errors import BackendUnavailable, MlpipedError

if TYPE_CHECKING:
    from pathlib import Path


class Built(FakeBackend):
    """Stands in for a backend: its room has tests of its own."""

    def __init__(self, name: str, state_dir: Path, settings: Any, **more: Any) -> None:
        super().__init__(name)
        self.kind = settings.kind
        self.state_dir, self.settings, self.more = state_dir, settings, more
        self.refusals = 0
        self.back: anyio.Event | None = None

    async def start(self, stack: object) -> None:
        if self.refusals:
            self.refusals -= 1
            raise BackendUnavailable(f"`{self.name}` does not answer")
        if self.back is not None:
            await self.back.wait()


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("docker", "DockerBackend"), ("ssh", "SshBackend"), ("slurm", "SlurmBackend")):
        module = f"mlpiped.backends.{module}"
        room = ModuleType(module)
        setattr(room, name, Built)
        monkeypatch.setitem(sys.modules, module, room)


def settings(folder: Path, of_cluster: str = "") -> config.Settings:
    path = folder / "mlpiped.toml"
    path.write_text(
        """
[daemon]
state_dir = "state"
runtime_dir = "run"
python = "/bin/sh"
[datastores.lab]
path = "lab"
[compute.local]
kind = "local"
slots = 3
[compute.box]
kind = "docker"
[compute.gpu1]
kind = "ssh"
host = "gpu1"
slots = 2
[compute.cluster]
kind = "slurm"
"""
        + of_cluster
    )
    (folder / "state").mkdir(exist_ok=True)
    return config.load(path)


# --- who this daemon is -----------------------------------------------------------------------------------------
def test_the_id_of_a_daemon_is_made_once_and_differs_from_others(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    made = computes.instance_of(one)
    assert computes.instance_of(one) == made == (one / "instance").read_text().strip()
    assert len(made) == 32 and computes.instance_of(two) != made
    assert [path.name for path in one.iterdir()] == ["instance"]


@pytest.mark.parametrize("text", ["", "x" * 32, "é"])
def test_a_damaged_id_stops_the_daemon_and_is_not_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "instance").write_text(text)
    with pytest.raises(MlpipedError, match="the daemon's id "):
        computes.instance_of(tmp_path)
    assert (tmp_path / "instance").read_text() == text


def test_an_id_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MlpipedError, match=r"cannot be written: `.*/gone/instance`: No such file"):
        computes.instance_of(tmp_path / "gone")


# --- what is built ----------------------------------------------------------------------------------------------
def test_each_compute_is_built_by_its_kind(tmp_path: Path, rooms: None) -> None:
    found = settings(tmp_path)
    built = computes.backends_of(found)
    assert list(built) == ["local", "box", "gpu1", "cluster"]
    local, box, gpu1, cluster = built.values()
    assert isinstance(local, LocalBackend) and local.capacity().slots == 3
    assert isinstance(box, Built) and isinstance(gpu1, Built)
    assert (tmp_path / "state/known_hosts").read_text() == ""
    instance = {"instance": computes.instance_of(tmp_path / "state")}
    assert (box.state_dir, box.settings, box.more) == (tmp_path / "state", found.compute["box"], instance)
    assert isinstance(cluster, Built) and cluster.settings is found.compute["cluster"]
    assert cluster.more == instance | {"python": "/bin/sh", "runner": None}
    assert (gpu1.settings, gpu1.more) == (found.compute["gpu1"], instance | {"datastores": {"lab": tmp_path / "lab"}})


def test_a_cluster_that_is_reached_through_a_box_uses_the_connection_of_that_box(tmp_path: Path) -> None:
    found = settings(tmp_path, f'via = "gpu1"\nwork_dir = "{tmp_path}"')
    built = computes.backends_of(found)
    assert list(built) == ["local", "box", "gpu1", "cluster"]
    runner: Any = built["cluster"]._controller._runner  # type: ignore[attr-defined]
    assert runner._shell.link is built["gpu1"].link  # type: ignore[attr-defined]


def test_a_cluster_that_shares_no_files_is_staged_through_that_box(tmp_path: Path) -> None:
    found = settings(tmp_path, 'via = "gpu1"\nwork_dir = "/only/there"\nshared = false\nstore = "5G"')
    built = computes.backends_of(found)
    stage: Any = built["cluster"]._stage  # type: ignore[attr-defined]
    assert stage.root == f"/only/there/{computes.instance_of(tmp_path / 'state')}"
    assert stage._keeper.link is built["gpu1"].link  # type: ignore[attr-defined]
    assert not built["cluster"].logs_here
    assert stage._pruning._store == 5 << 30


def test_a_daemon_with_local_computes_alone_loads_no_library_of_the_others(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import mlpiped.daemon; from mlpiped import computes;"
        "from mlpiped.config.settings import default_settings;"
        f"computes.backends_of(default_settings(Path({str(tmp_path)!r})));"
        "print([m for m in ('asyncssh', 'aiodocker', 'mlpiped.backends.slurm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# --- a start without one of them --------------------------------------------------------------------------------
@pytest.mark.anyio
async def test_the_daemon_starts_without_a_box_that_is_away_and_takes_it_when_it_is_back(
    tmp_path: Path, rooms: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as stack:
        made = await Daemon.build(settings(tmp_path), stack)
        box = made.backends["box"]
        assert isinstance(box, Built)
        box.refusals, box.back = 2, anyio.Event()
        place = made.dispatch.places["box"]
        async with anyio.create_task_group() as tasks:
            with anyio.fail_after(30):
                await made.start(tasks)
                assert place.unwell is not None and "`box` does not answer" in place.unwell
                assert made.dispatch.places["gpu1"].unwell is None
                box.back.set()
                while place.unwell is not None:
                    made.hosts.answered("box")  # look now, not when its pause is over
                    await anyio.sleep(0.005)
            await made.stop()
            tasks.cancel_scope.cancel()
    assert box.refusals == 0


@pytest.mark.anyio
async def test_doctor_is_told_how_each_compute_is_now_and_of_one_that_gives_no_answer(
    tmp_path: Path, rooms: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent() -> str | None:
        await anyio.sleep_forever()
        return None

    async with AsyncExitStack() as stack:
        made = await Daemon.build(settings(tmp_path), stack)
        made.backends["local"].health = silent  # type: ignore[method-assign]
        box = made.backends["box"]
        assert isinstance(box, Built)
        box.unavailable_for = 1
        monkeypatch.setattr(daemon, "HEALTH_LIMIT", 0.05)
        assert await made._healths() == {
            "local": "gave no answer in 0 s",
            "box": "`box` does not answer",
            "gpu1": None,
            "cluster": None,
        }
