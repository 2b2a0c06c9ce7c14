"""The environments of steps: clean, built once per content, and refused with a sentence that helps."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import anyio
import pytest

from mlpiped.backends.base import Job, Part
from mlpiped.backends.environments import DONE, Environments, clean
from mlpiped.errors import InvalidJob

pytestmark = pytest.mark.anyio
JOB = Job(token="t", arguments=((Part("text", "python"),),))


def wheel(place: Path, name: str) -> Path:
    """A package that one can install without a network; it has a script, as many have."""
    path = place / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "def main(): print('it runs')\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{name}-tool = {name}:main\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_what_is_meant_for_the_daemon_does_not_reach_steps() -> None:
    given = {
        "HOME": "/h",
        "PATH": "/bin",
        "LISTEN_FDS": "1",
        "WATCHDOG_USEC": "1",
        "PYTHONPATH": "/x",
        "MLPIPED_A": "1",
    }
    assert clean({**given, "NOTIFY_SOCKET": "/n", "CREDENTIALS_DIRECTORY": "/c"}) == {"HOME": "/h", "PATH": "/bin"}


async def test_steps_can_import_mlpiped_and_none_of_the_daemons_packages(tmp_path: Path) -> None:
    environments = Environments(tmp_path)
    environments.prepare()
    environments.prepare()
    folder = Path((await environments.of(JOB))["PYTHONPATH"])
    assert [path.name for path in folder.iterdir() if path.is_dir()] in (["mlpiped", "bin"], ["bin", "mlpiped"])
    assert (folder / "mlpiped/sdk").is_dir()


async def left_by_a_builder_that_was_killed(environments: Environments, requirements: str) -> Path:
    """A home that looks begun and is not complete."""
    async with anyio.create_task_group() as group:
        group.start_soon(environments.build, None, requirements)
        while not (begun := list(environments.envs_dir.glob("[!.]*/bin/python"))):
            await anyio.sleep(0.005)
        group.cancel_scope.cancel()
    home = begun[0].parent.parent
    assert home.is_dir() and not (home / DONE).exists()
    return home


async def test_requirements_are_installed_once_for_their_content_also_when_many_ask_at_once(tmp_path: Path) -> None:
    requirements = f"{wheel(tmp_path, 'tinypackage')}\n"
    environments = Environments(tmp_path / "envs")
    environments.prepare()
    killed = await left_by_a_builder_that_was_killed(environments, requirements)
    homes: list[Path] = []

    async def build() -> None:
        homes.append(await environments.build(None, requirements))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(build)
    (home,) = set(homes)
    assert home == killed
    built = (home / DONE).stat().st_mtime_ns
    done = await anyio.run_process([str(home / "bin/tinypackage-tool")])
    assert done.stdout == b"it runs\n"  # the path in its first line is the environment's final one
    again = Environments(tmp_path / "envs")
    job = Job(
        token="t", arguments=JOB.arguments, requirements=requirements, python=".".join(map(str, sys.version_info[:2]))
    )
    env = await again.of(job)
    assert env["PATH"].startswith(f"{home}/bin:") and env["VIRTUAL_ENV"] == str(home)
    assert (home / DONE).stat().st_mtime_ns == built


async def test_requirements_that_cannot_be_installed_refuse_the_job_and_name_the_log(tmp_path: Path) -> None:
    environments = Environments(tmp_path / "envs")
    environments.prepare()
    with pytest.raises(InvalidJob) as refused:
        await environments.build(None, f"{tmp_path}/no-such-1.0-py3-none-any.whl\n")
    assert "cannot install the step's requirements" in refused.value.message and "no-such" in refused.value.message
    assert refused.value.hint is not None
    log = Path(refused.value.hint.removeprefix("see "))
    assert "no-such" in log.read_text()


async def test_an_interpreter_that_is_not_installed_is_named(tmp_path: Path) -> None:
    environments = Environments(tmp_path, which=lambda name: None)
    with pytest.raises(InvalidJob) as refused:
        await environments.of(Job(token="t", arguments=JOB.arguments, python="3.4"))
    assert refused.value.message == "python 3.4 is not installed on this host"
    assert "`python3.4`" in (refused.value.hint or "")


async def test_a_name_on_the_path_that_is_another_version_is_not_taken_for_it(tmp_path: Path) -> None:
    environments = Environments(tmp_path, which=lambda name: sys.executable)
    with pytest.raises(InvalidJob, match=r"python 3\.4 is not installed on this host; `python3\.4` is 3\."):
        await environments.of(Job(token="t", arguments=JOB.arguments, python="3.4"))


async def test_the_daemons_own_version_needs_no_environment(tmp_path: Path) -> None:
    environments = Environments(tmp_path, which=lambda name: None)
    environments.prepare()
    own = ".".join(map(str, sys.version_info[:2]))
    env = await environments.of(Job(token="t", arguments=JOB.arguments, python=own))
    assert env["PATH"].split(":")[0] == os.path.dirname(sys.executable) and "VIRTUAL_ENV" not in env
