"""Environment modules before a step on a real cluster, by Debian's environment-modules and modulefiles of our own."""

from __future__ import annotations

import os
import secrets
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from lab import packages, slurm_rig
from lab.slurm_modules import PACKAGES, modulefiles

from mlpiped.backends.base import Exited, Job, Part
from mlpiped.backends.slurm import SlurmBackend
from mlpiped.backends.slurm.runner import HostRunner
from mlpiped.config.computes import SlurmCompute

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.lab, pytest.mark.timeout(200)]


class Site:
    """A cluster whose modules are those of `modulefiles`."""

    def __init__(self, folder: Path) -> None:
        self.init = modulefiles(folder)
        self.backend: SlurmBackend
        self.state = folder / "state"

    async def run(self, script: str, *modules: str, **fields: Any) -> tuple[Exited, str]:
        """(how it ended, what it printed and complained of)"""
        token = f"t-{secrets.token_hex(6)}"
        job = Job(token, ((Part("text", script),),), shell=True, modules=modules, grace=3.0, **fields)
        outcome = await self.backend.wait(await self.backend.submit(job))
        assert isinstance(outcome, Exited)
        place = self.state / "jobs" / token
        return outcome, (place / "stdout").read_text() + (place / "stderr").read_text()


@pytest.fixture
async def site(slurm_cluster: slurm_rig.Cluster, tmp_path: Path, anyio_backend: str) -> AsyncIterator[Site]:
    packages.install(PACKAGES)
    found = Site(tmp_path)
    settings = SlurmCompute(kind="slurm", poll_interval="200ms", modules_init=found.init)
    async with AsyncExitStack() as stack:
        runner = HostRunner(slurm_cluster.env)
        found.backend = SlurmBackend("cluster", found.state, settings, instance="0" * 32, runner=runner)
        await found.backend.start(stack)
        yield found


async def test_a_step_has_what_its_modules_bring_and_no_module_overrides_what_its_author_set(site: Site) -> None:
    script = "echo $CUDA_HOME; of-the-module; echo $OMP_NUM_THREADS; echo $LOADEDMODULES"
    outcome, said = await site.run(script, "cuda/12", env={"OMP_NUM_THREADS": "a 'b'"})
    assert outcome.code == 0
    assert said.splitlines() == ["/opt/cuda-12", "brought by the module", "a 'b'", "cuda/12"]
    _, without = await site.run("echo $CUDA_HOME; command -v of-the-module || echo none")
    assert without.splitlines() == ["", "none"]


async def test_a_command_of_many_words_reaches_the_step_as_it_was_written(site: Site) -> None:
    words = ["printf", "%s|", "a b", "$HOME", "'", "*", ""]
    token = f"t-{secrets.token_hex(6)}"
    job = Job(token, tuple((Part("text", word),) for word in words), modules=("cuda/12",))
    outcome = await site.backend.wait(await site.backend.submit(job))
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert (site.state / "jobs" / token / "stdout").read_text() == "a b|$HOME|'|*||"


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (("nosuch/1",), "Unable to locate a modulefile for 'nosuch/1'"),
        (("cuda/12", "broken/1"), "its licence has run out"),
    ],
)
async def test_a_module_that_does_not_load_ends_the_step_with_the_tool_s_words_for_good(
    site: Site, modules: tuple[str, ...], words: str
) -> None:
    outcome, said = await site.run("echo ran; exit 3", *modules)
    assert outcome.code is None and outcome.final and "ran" not in said.splitlines()
    assert outcome.error is not None and outcome.error.startswith(f"cannot load modules {' '.join(modules)}: ")
    assert words in outcome.error and words in said


async def test_a_step_that_ends_with_the_same_status_of_its_own_is_no_refusal(site: Site) -> None:
    outcome, _ = await site.run("exit 78", "cuda/12")
    assert (outcome.code, outcome.error, outcome.final) == (78, None, False)


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (None, "no file "),
        ("true", "does not define `module`"),
        ("exit 0", "the shell ended while it loaded modules"),
        ("module() { return 7; }", "module load ended with 7"),
    ],
)
async def test_a_node_where_modules_cannot_be_loaded_never_lets_the_step_pass_for_done(
    site: Site, init: str | None, words: str
) -> None:
    site.init.unlink() if init is None else site.init.write_text(init + "\n")
    outcome, _ = await site.run("true", "cuda/12")
    assert outcome.code is None and outcome.final and words in (outcome.error or "")


async def test_without_a_word_of_the_config_the_site_s_modules_are_found_where_they_usually_are(
    site: Site,
) -> None:
    site.backend.settings = SlurmCompute(kind="slurm", poll_interval="200ms")
    files = os.fspath(site.init.parent / "modulefiles")
    outcome, said = await site.run("of-the-module", "cuda/12")
    assert outcome.final and "Unable to locate a modulefile for 'cuda/12'" in said  # found, and it knows none of ours
    site.backend._environments._base["MODULEPATH"] = files
    outcome, said = await site.run("of-the-module", "cuda/12")
    assert outcome.code == 0 and said == "brought by the module\n"


async def test_what_the_daemon_has_loaded_is_not_taken_for_loaded_on_the_node(site: Site) -> None:
    site.backend._environments._base.update(LOADEDMODULES="cuda/12", _LMFILES_="/nowhere/cuda/12")
    outcome, said = await site.run("echo $CUDA_HOME", "cuda/12")
    assert outcome.code == 0 and said == "/opt/cuda-12\n"
