"""What a step finds, leaves and suffers on a machine that executes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
import pytest

from mlpiped.backends.base import Exited, JobOutput, Part
from mlpiped.errors import InvalidJob

from .conftest import EXECUTING

if TYPE_CHECKING:
    from mlpiped.backends.base import Backend, Handle, Job

    from .conftest import Bench

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("bench", EXECUTING, indirect=True)]


async def ended(backend: Backend, job: Job) -> tuple[Handle, Exited]:
    handle = await backend.submit(job)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited), outcome
    return handle, outcome


async def log(
    backend: Backend, handle: Handle, stream: Literal["stdout", "stderr"] = "stdout", offset: int = 0
) -> bytes:
    return b"".join([chunk async for chunk in backend.logs(handle, stream, offset, follow=False)])


async def line(backend: Backend, handle: Handle) -> bytes:
    """The first line that the job prints, as soon as it does."""
    seen = b""
    async for chunk in backend.logs(handle, "stdout", 0, follow=True):
        seen += chunk
        if b"\n" in seen:
            break
    return seen.partition(b"\n")[0]


async def test_a_signal_is_told_as_a_signal(bench: Bench, backend: Backend) -> None:
    _, outcome = await ended(backend, bench.job("sh", "-c", "kill -11 $$"))
    assert (outcome.code, outcome.signal) == (None, 11)


async def test_a_command_that_is_not_there_fails_with_a_sentence(bench: Bench, backend: Backend) -> None:
    _, outcome = await ended(backend, bench.job("no-such-command", "x"))
    assert outcome.code != 0 and outcome.error == "command not found: `no-such-command`"


async def test_a_file_that_cannot_be_executed_fails_with_a_sentence(bench: Bench, backend: Backend) -> None:
    _, outcome = await ended(backend, bench.job("/etc/passwd"))
    assert outcome.code != 0 and outcome.error == "permission denied: `/etc/passwd` is not an executable file"


async def test_a_program_of_the_shell_is_one_argument(bench: Bench, backend: Backend) -> None:
    handle, outcome = await ended(backend, bench.job("echo $((6 * 7)) | tr 4 5", shell=True))
    assert outcome.code == 0 and await log(backend, handle) == b"52\n"


async def test_a_nul_byte_in_an_argument_is_refused_for_good(bench: Bench, backend: Backend) -> None:
    with pytest.raises(InvalidJob):
        await backend.submit(bench.job("echo", "a\0b"))


@pytest.mark.parametrize("token", ["", "../x", "a/b", ".x", "A"])
async def test_a_token_that_is_no_name_is_refused(bench: Bench, backend: Backend, token: str) -> None:
    with pytest.raises(InvalidJob):
        await backend.submit(bench.job("true", token=token))


async def test_outputs_lie_where_their_paths_said(bench: Bench, backend: Backend, tmp_path: Path) -> None:
    outputs = (JobOutput("model", "model.bin", "file"), JobOutput("plots", "plots", "folder"))
    job = bench.job(
        "sh", "-c", 'printf made > "$1"; mkdir "$2"; printf plot > "$2/a"', "sh",
        Part("output", "model"), Part("output", "plots"), outputs=outputs,
    )  # fmt: skip
    handle, outcome = await ended(backend, job)
    home = await backend.fetch(handle, tmp_path / "home")
    assert outcome.code == 0
    assert (home / "out/model/model.bin").read_text() == "made"
    assert (home / "out/plots/plots/a").read_text() == "plot"


async def test_a_port_is_as_many_arguments_as_it_has_paths(bench: Bench, backend: Backend, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a b", "c\nd", "e")]
    for number, path in enumerate(paths):
        path.write_text(str(number))
    job = bench.job("cat", Part("input", "data"), inputs={"data": tuple(str(path) for path in paths)})
    handle, _ = await ended(backend, job)
    assert await log(backend, handle) == b"012"


async def test_stdout_and_stderr_are_kept_apart_byte_for_byte(bench: Bench, backend: Backend) -> None:
    handle, _ = await ended(backend, bench.job("printf '\\377\\000\\303' ; printf '\\200err' >&2", shell=True))
    assert await log(backend, handle) == b"\xff\x00\xc3"
    assert await log(backend, handle, "stderr") == b"\x80err"
    assert await log(backend, handle, offset=2) == b"\xc3"


async def test_the_end_of_a_log_can_be_read_alone(bench: Bench, backend: Backend) -> None:
    handle, _ = await ended(backend, bench.job("sh", "-c", "echo a long story; echo boom >&2"))
    assert await log(backend, handle, offset=-6) == b"story\n"
    assert await log(backend, handle, "stderr", offset=-4096) == b"boom\n"


async def test_an_argument_that_is_no_utf8_reaches_the_step_as_it_is(bench: Bench, backend: Backend) -> None:
    handle, _ = await ended(backend, bench.job("printf", "%s", os.fsdecode(b"caf\xe9")))
    assert await log(backend, handle) == b"caf\xe9"


async def test_a_step_finds_its_environment(bench: Bench, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "WATCHDOG_USEC", "PYTHONHASHSEED", "MLPIPED_CONFIG"):
        monkeypatch.setenv(name, "x")
    job = bench.job(
        "env",
        env={"MLPIPED_ATTEMPT": "2", "OWN": "a=b c"},
        inputs={"data": ("/data/1", "/data/2")},
        input_env={"MLPIPED_INPUT_DATA": "data"},
    )
    backend = await bench.another()
    handle, _ = await ended(backend, job)
    text = (await log(backend, handle)).decode()
    found = dict(item.split("=", 1) for item in text.splitlines() if "=" in item)
    assert found["MLPIPED_TOKEN"] == job.token
    assert (found["MLPIPED_ATTEMPT"], found["OWN"]) == ("2", "a=b c")
    assert "MLPIPED_INPUT_DATA=/data/1\n/data/2\n" in text
    assert not found.keys() & {"NOTIFY_SOCKET", "LISTEN_FDS", "WATCHDOG_USEC", "PYTHONHASHSEED", "MLPIPED_CONFIG"}


async def test_a_step_finds_its_parameters_and_writes_metrics(bench: Bench, backend: Backend, tmp_path: Path) -> None:
    script = 'cat "$MLPIPED_PARAMS"; echo "{}" >> "$MLPIPED_METRICS"; touch "$MLPIPED_SCRATCH/x"'
    handle, outcome = await ended(backend, bench.job(script, shell=True, parameters={"rate": 0.1, "name": "ż"}))
    assert outcome.code == 0
    assert json.loads(await log(backend, handle)) == {"rate": 0.1, "name": "ż"}
    home = await backend.fetch(handle, tmp_path / "home")
    assert (home / "metrics.jsonl").read_text() == "{}\n"


async def test_python_is_an_interpreter_that_can_import_mlpiped(bench: Bench, backend: Backend) -> None:
    script = "import importlib.util, sys; print(importlib.util.find_spec('mlpiped').name, sys.version_info[:2])"
    handle, outcome = await ended(backend, bench.job("python", "-c", script))
    assert outcome.code == 0, await log(backend, handle, "stderr")
    assert (await log(backend, handle)).decode() == f"mlpiped {sys.version_info[:2]}\n"


async def test_a_step_works_on_a_writable_copy_of_its_code(bench: Bench, backend: Backend, tmp_path: Path) -> None:
    code = tmp_path / "snapshot"
    (code / "package").mkdir(parents=True)
    (code / "main.py").write_text("import package.part; open('main.py', 'a').write('#'); print(package.part.WORD)")
    (code / "package/part.py").write_text("WORD = 'here'")
    (code / "run.sh").write_text("#!/bin/sh\nexec python main.py\n")
    (code / "run.sh").chmod(0o555)
    (code / "main.py").chmod(0o444)
    before = (code / "main.py").read_bytes()
    handle, outcome = await ended(backend, bench.job("./run.sh", code=str(code)))
    assert (outcome.code, await log(backend, handle)) == (0, b"here\n")
    assert (code / "main.py").read_bytes() == before


async def test_what_a_step_leaves_running_is_ended_with_it(bench: Bench, backend: Backend) -> None:
    hidden = "setsid sh -c 'exec 9>held; flock 9; touch locked; sleep 300' &"
    script = f"{hidden} while ! test -e locked; do sleep 0.01; done; pwd"
    handle, outcome = await ended(backend, bench.job(script, shell=True))
    work = (await log(backend, handle)).decode().strip()
    assert outcome.code == 0
    # the lock is free at once: the process that held it is gone
    assert await bench.beside(backend, "flock", "-n", f"{work}/held", "true") == 0


async def test_cancel_ends_the_whole_tree_though_it_ignores_SIGTERM_and_hides(bench: Bench, backend: Backend) -> None:
    script = """
        trap '' TERM
        setsid sh -c 'trap "" TERM; exec 8>deep; flock 8; touch one; while :; do sleep 1; done' &
        (setsid setsid sh -c 'trap "" TERM; exec 9>deeper; flock 9; touch two; while :; do sleep 1; done' &)
        while ! test -e one || ! test -e two; do sleep 0.01; done
        pwd
        while :; do sleep 1; done
    """
    handle = await backend.submit(bench.job(script, shell=True, grace=0.2))
    work = (await line(backend, handle)).decode()
    await backend.cancel(handle)
    with anyio.fail_after(10):
        outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.cancelled and outcome.signal == 9
    for name in ("deep", "deeper"):
        assert await bench.beside(backend, "flock", "-n", f"{work}/{name}", "true") == 0, name


async def test_a_step_can_end_in_order_within_its_grace(bench: Bench, backend: Backend) -> None:
    script = "trap 'echo saved; exit 7' TERM; echo ready; while :; do sleep 0.01; done"
    handle = await backend.submit(bench.job(script, shell=True, grace=30))
    assert await line(backend, handle) == b"ready"
    await backend.cancel(handle)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.cancelled and outcome.code == 7
    assert await log(backend, handle) == b"ready\nsaved\n"


async def test_a_timeout_that_is_ignored_kills_after_the_grace(bench: Bench, backend: Backend) -> None:
    job = bench.job("trap '' TERM; while :; do sleep 1; done", shell=True, timeout=0.1, grace=0.1)
    _, outcome = await ended(backend, job)
    assert outcome.timed_out and outcome.signal == 9


async def test_logs_that_are_followed_come_while_the_step_runs_and_end_with_it(bench: Bench, backend: Backend) -> None:
    script = "echo first; while ! test -e go; do sleep 0.01; done; head -c 200000 /dev/zero; echo last"
    handle = await backend.submit(bench.job(f"pwd; {script}", shell=True))
    seen = b""
    with anyio.fail_after(30):
        async for chunk in backend.logs(handle, "stdout", 0, follow=True):
            seen += chunk
            if seen.endswith(b"first\n"):
                assert await bench.beside(backend, "touch", f"{seen.split()[0].decode()}/go") == 0
    assert seen.endswith(b"\0last\n") and seen.count(b"\0") == 200000


async def test_stdin_is_empty_and_signals_are_as_a_program_expects(bench: Bench, backend: Backend) -> None:
    script = "import signal, sys; print(sys.stdin.read() == '', signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    handle, _ = await ended(backend, bench.job("python", "-c", script))
    assert await log(backend, handle) == b"True set()\n"
    handle, _ = await ended(backend, bench.job("grep -E 'SigIgn|SigBlk' /proc/self/status", shell=True))
    masks = [int(word, 16) for word in (await log(backend, handle)).split()[1::2]]
    assert [mask & 0x7FFFFFFF for mask in masks] == [0, 0]  # 32 and 33 are the C library's own


async def test_no_descriptor_of_ours_reaches_the_step(bench: Bench, backend: Backend) -> None:
    handle, _ = await ended(backend, bench.job("python", "-c", "import os; print(sorted(os.listdir('/proc/self/fd')))"))
    assert await log(backend, handle) == b"['0', '1', '2', '3']\n"  # 3 is the listing itself


async def test_use_of_processor_and_memory_is_told(bench: Bench, backend: Backend) -> None:
    script = "x = bytearray(64 << 20); sum(range(3_000_000))"
    _, outcome = await ended(backend, bench.job("sh", "-c", f"python -c '{script}'; true"))
    assert outcome.cpu is not None and outcome.cpu > 0.02
    if bench.measures_memory:
        assert outcome.max_rss is not None and outcome.max_rss > 64 << 20
    else:
        assert outcome.max_rss is None
    assert outcome.started is not None and outcome.ended is not None and outcome.started <= outcome.ended


async def test_discard_keeps_the_logs_or_nothing(bench: Bench, backend: Backend, tmp_path: Path) -> None:
    script = 'echo said; echo secret > "$MLPIPED_SCRATCH/x"; mkdir sealed; touch sealed/y; chmod 0 sealed'
    handle, _ = await ended(backend, bench.job(script, shell=True))
    await backend.discard(handle["token"], keep_logs=True)
    await bench.removed(backend)
    home = await backend.fetch(handle, tmp_path / "home")
    assert await log(backend, handle) == b"said\n"
    assert not {"work", "scratch", "out", "job.json"} & {path.name for path in home.iterdir()}
    assert isinstance(await backend.wait(handle), Exited)
    await backend.discard(handle["token"], keep_logs=False)
    await backend.discard(handle["token"], keep_logs=False)
    await bench.removed(backend)
    assert await log(backend, handle) == b""
    assert await backend.find([handle["token"]]) == {}
