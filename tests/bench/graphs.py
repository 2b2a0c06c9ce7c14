"""Plugin files that are generated for benchmarks, and the data that they want."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

HEAD = """\
from mlpiped import CommandStep, DataReference, Datastore, Every, OnArrival, Pipeline, PipelineData

lab = Datastore("lab")
"""


def sources(folder: Path, count: int, salt: str = "", size: int = 1024) -> None:
    """`count` files of about `size` bytes, no two alike, named 00000, 00001, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:05d}").write_text(f"{salt} {number}\n".ljust(size, "."))


def layered(name: str, steps: int, layers: int, source: str) -> str:
    """`steps` steps in `layers` layers: each copies one file of the layer above and depends on a second one."""
    return f"""{HEAD}
width = {steps // layers}
above = [DataReference(lab, f"{source}/{{i:05d}}") for i in range(width)]
steps = []
for layer in range({layers}):
    made = [PipelineData(f"o{{layer}}_{{i}}") for i in range(width)]
    for i in range(width):
        copy = ["cp", f"--suffix=.{{layer}}", above[i], made[i]]  # the suffix does nothing but tell layers apart
        other = above[(i + 1) % width]
        steps.append(CommandStep(copy, name=f"s{{layer}}_{{i}}", inputs=[other], outputs=[made[i]]))
    above = made
pipeline = Pipeline("{name}", steps=steps)
"""


def independent(name: str, count: int, source: str) -> str:
    """`count` steps that copy one file each."""
    return f"""{HEAD}
made = [PipelineData(f"o{{i}}") for i in range({count})]
steps = [
    CommandStep(["cp", DataReference(lab, f"{source}/{{i:05d}}"), made[i]], name=f"s{{i}}", outputs=[made[i]])
    for i in range({count})
]
pipeline = Pipeline("{name}", steps=steps)
"""


def chain(name: str, count: int, source: str) -> str:
    """`count` steps, each a copy of what the one before made."""
    return f"""{HEAD}
above = DataReference(lab, "{source}/00000")
steps = []
for i in range({count}):
    made = PipelineData(f"o{{i}}")
    steps.append(CommandStep(["cp", f"--suffix=.{{i}}", above, made], name=f"s{{i}}", outputs=[made]))
    above = made
pipeline = Pipeline("{name}", steps=steps)
"""


def trivial(name: str, count: int) -> str:
    """`count` steps that do nothing and are never reused."""
    return f"""{HEAD}
steps = [CommandStep(["true"], name=f"s{{i}}", allow_reuse=False) for i in range({count})]
pipeline = Pipeline("{name}", steps=steps)
"""


def nightly(name: str, count: int) -> str:
    """`count` steps that do nothing, each in its own way, and are reused from the second run on."""
    return f"""{HEAD}
steps = [CommandStep(["true", str(i)], name=f"s{{i}}") for i in range({count})]
pipeline = Pipeline("{name}", steps=steps)
"""


def stamp(name: str, effects: Path, trigger: str = "") -> str:
    """One step that appends the time at which it started, in nanoseconds, to `effects`."""
    return f"""{HEAD}
steps = [CommandStep("date +%s%N >> {effects}", name="stamp", allow_reuse=False)]
pipeline = Pipeline("{name}", steps=steps, triggers=[{trigger}])
"""


def gated(name: str, count: int, gate: Path) -> str:
    """`count` steps that wait, without work, until somebody has opened the fifo `gate` for writing and closed it."""
    return f"""{HEAD}
steps = [CommandStep(["cat", "{gate}"], name=f"s{{i}}", allow_reuse=False) for i in range({count})]
pipeline = Pipeline("{name}", steps=steps)
"""
