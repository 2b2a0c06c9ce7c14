"""The job of an attempt: its step, and what the facts say of it, in a backend's words; and the words for its end."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

from mlpiped.backends.base import Job, JobOutput, Part
from mlpiped.errors import BackendUnavailable
from mlpiped.execution.kept import digest_for
from mlpiped.spec import Concat, Upstream

if TYPE_CHECKING:
    from mlpiped.backends.base import Backend, Exited, Handle
    from mlpiped.execution.attempt import Attempt
    from mlpiped.execution.facts import StepFacts
    from mlpiped.resolve import Plan
    from mlpiped.spec import Arg, StepSpec

LAUNCHER = re.compile(r"(?:srun|slurmstepd(?:-\S+)?): ")  # a line of its own


async def job_of(attempt: Attempt, facts: StepFacts) -> Job:
    """What it submits. Raises MlpipedError: the code could not be snapshot."""
    step, plan, code = attempt.step, attempt.execution.plan, None
    if facts.source is not None and facts.code is not None:
        code = str(await attempt.world.code.snapshot(facts.source, facts.code))
    env = dict(step.environment.env)
    env.update({f"MLPIPED_PARAM_{variable(n)}": as_text(v) for n, v in facts.parameters.items()})
    env.update(
        MLPIPED_PIPELINE=plan.graph.spec.name,
        MLPIPED_STEP=step.name,
        MLPIPED_RUN_ID=str(attempt.execution.id),
        MLPIPED_TOKEN=attempt.token,
        MLPIPED_ATTEMPT=str(attempt.number),
        MLPIPED_STEP_KEY=facts.key,
    )
    return Job(
        token=attempt.token,
        arguments=tuple(parts_of(a, facts) for a in step.arguments),
        inputs=facts.paths,
        outputs=outputs_of(step),
        env=env,
        input_env={f"MLPIPED_INPUT_{variable(p.name)}": p.name for p in step.inputs if not p.in_arguments},
        parameters=facts.parameters,
        shell=step.shell,
        code=code,
        requirements=step.environment.requirements,
        python=step.environment.python,
        modules=step.environment.modules,
        image=None if facts.image is None else facts.image.run,
        network=step.resources.network,
        shm_size=step.resources.shm_size,
        contents=_contents(step, plan, facts, attempt.backend.name),
        nodes=step.resources.nodes,
        tasks=step.resources.tasks,
        cpus=step.resources.cpus,
        memory=step.resources.memory,
        gpus=attempt.cards,
        gpu_memory=step.resources.gpu_memory,
        timeout=step.timeout,
        grace=step.grace,
    )


def outputs_of(step: StepSpec) -> tuple[JobOutput, ...]:
    return tuple(JobOutput(o.name, o.file_name, o.output_kind) for o in step.outputs)


def _contents(step: StepSpec, plan: Plan, facts: StepFacts, compute: str) -> dict[str, str]:
    """Input path -> the digest that is in the key, of files and folders."""
    found: dict[str, str] = {}
    for port in step.inputs:
        if isinstance(port.source, Upstream):
            made = (plan.outputs[plan.graph.index[port.source.step]] or {})[port.source.output]
            found[made.path] = digest_for(made, compute)
            continue
        outside, paths = facts.outside[port.name], facts.paths[port.name]
        if not port.source.glob:
            found[paths[0]] = outside.digest
        elif outside.entries is not None and len(outside.entries) == len(paths):  # else two names print alike
            found.update(zip(paths, outside.entries.values(), strict=True))
    return found


def parts_of(argument: Arg, facts: StepFacts) -> tuple[Part, ...]:
    found = []
    for part in argument.parts if isinstance(argument, Concat) else (argument,):
        match part.kind:
            case "text":
                found.append(Part("text", part.text))
            case "parameter":
                found.append(Part("text", as_text(facts.parameters[part.name])))
            case "input":
                found.append(Part("input", part.port))
            case "output":
                found.append(Part("output", part.port))
    return tuple(found)


def as_text(value: object) -> str:
    """A parameter as one argument: `true`, `0.1`, text as it is; nothing for None."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def variable(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).upper()


# --- its end ----------------------------------------------------------------------------------------------------
def exit_words(outcome: Exited) -> str:
    if outcome.signal is None:
        return f"exited with status {outcome.code}"
    try:
        name = signal.Signals(outcome.signal).name
    except ValueError:
        name = str(outcome.signal)
    return f"was ended by {name}"


async def last_words(backend: Backend, handle: Handle) -> str:
    """`: <the last line of stderr>`, or nothing. What starts several processes adds how each of them was ended: that is
    not what the step has to say."""
    tail = b""
    try:
        async for chunk in backend.logs(handle, "stderr", -4096, False):
            tail = (tail + chunk)[-4096:]
    except BackendUnavailable:
        return ""
    lines = tail.decode(errors="replace").strip().splitlines()
    own = [line for line in lines if line.strip() and not LAUNCHER.match(line)]
    return f": {(own or lines)[-1].strip()[:200]}" if lines else ""


def seconds(outcome: Exited) -> float | None:
    if outcome.started is None or outcome.ended is None:
        return None
    return max(0.0, outcome.ended - outcome.started)
