"""Steps in containers through the real daemon: what an engine does to them, what they see, and what is left of them."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, steps, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.docker_rig import Engine

pytestmark = pytest.mark.lab


def on(engine: Engine, more: str = "", extra: str = "") -> Daemon:
    """A daemon whose compute `box` is this engine."""
    settings = f'kind = "docker"\nurl = "{engine.url}"\nslots = 4\npull = "never"\n{more}\n'
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
