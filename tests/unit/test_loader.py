"""One plugin file, well-behaved or not, in a real child process."""

from __future__ import annotations

import os
import textwrap
import time
from pathlib import Path

import anyio
import pytest

from mlpiped.loader.load import ABSENT, Known, LoadResult, Trust, digest_of, load_file
from mlpiped.loader.process import Limits

pytestmark = pytest.mark.anyio

GOOD = """\
from mlpiped import CommandStep, Pipeline
digits = Pipeline("digits", steps=[CommandStep(["true"])])
"""
LIMITS = Limits(deadline=10, memory=512 << 20)
SHORT = Limits(deadline=3, memory=1 << 30)


def write(folder: Path, text: str, name: str = "plugin.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


async def load(folder: Path, text: str, limits: Limits = LIMITS) -> LoadResult:
    return await load_file(write(folder, text), limits=limits)


def alive(marker: str) -> list[int]:
    """Processes whose command line holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


async def test_a_good_plugin_comes_back_as_specs_with_places_and_digests(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    result = await load_file(path)
    assert result.faults == ()
    assert result.imported
    (spec,) = result.pipelines
    assert (spec.name, spec.where.file, spec.where.line) == ("digits", str(path), 2)
    assert result.files == {str(path): digest_of(str(path))}
    assert not (tmp_path / "__pycache__").exists()


FAULTS = [
    ("syntax error", "x = 1\ndef broken(:\n", 2, "syntax error: invalid syntax"),
    ("exception", "def f():\n    return 1 / 0\n\nf()\n", 2, "ZeroDivisionError: division by zero"),
    ("exit", "import sys\n\nsys.exit(3)\n", 3, "calls `sys.exit`: 3"),
    ("own base exception", "class Odd(BaseException): pass\nraise Odd\n", 2, "Odd"),
    ("exception that cannot be shown", "class Odd(Exception):\n def __str__(self): 1/0\nraise Odd\n", 3, "Odd"),
    ("missing module", "import sys\nimport no_such_thing\n", 2, "no module named `no_such_thing`"),
    ("deep recursion", "def f(): f()\nf()\n", 1, "RecursionError: maximum recursion depth exceeded"),
    ("too deep to parse", "x = " + "(" * 500 + ")" * 500, 1, "syntax error: too many nested parentheses"),
    (
        "wrong type",
        "from mlpiped import Datastore\n\nDatastore(3)\n",
        3,
        "the name of a datastore must be a string, not int: 3",
    ),
    (
        "unknown name in mlpiped",
        "from mlpiped import Pipelin\n",
        1,
        "ImportError: cannot import name 'Pipelin' from 'mlpiped'",
    ),
    (
        "keyword",
        "from mlpiped import CommandStep\n\nCommandStep(['x'], nam='y')\n",
        3,
        "unexpected keyword argument 'nam'",
    ),
    (
        "missing script",
        "from mlpiped import *\n\n\n\np = Pipeline('p', [PythonScriptStep('gone.py')])\n",
        5,
        "no such script: `",
    ),
    (
        "two of one name",
        GOOD + 'other = Pipeline("digits", steps=[CommandStep(["false"])])\n',
        3,
        "two pipelines are named `digits`: lines 2 and 3",
    ),
    (
        "spec fault",
        GOOD + 'x = Pipeline("x", [CommandStep(["a"])], triggers=__import__("mlpiped").OnSuccess("x"))\n',
        3,
        "would start itself",
    ),
    (
        "memory",
        "hoard = []\nwhile True:\n    hoard.append(bytearray(10_000_000))\n",
        3,
        "ran out of memory: the limit is 0.5 GiB",
    ),
    ("recursing JSON", GOOD + "digits.tags = t = {}\nt['t'] = t\n", 0, "ValueError: Circular reference detected"),
    ("abort", "import os\nos.abort()\n", 2, "crashed the interpreter: SIGABRT"),
    ("segfault", "import ctypes\nctypes.string_at(0)\n", 2, "crashed the interpreter: SIGSEGV"),
    ("kills itself", "import os\nos.kill(0, 9)\n", 0, "crashed the interpreter: SIGKILL"),
    ("silent exit", "import os\nos._exit(0)\n", 0, "ended the interpreter before it was loaded: exit status 0"),
    (
        "closes all descriptors",
        GOOD + "import os\nos.closerange(0, 100)\n",
        0,
        "ended the interpreter before it was loaded",
    ),
    (
        "garbage in the pipe",
        (
            "import os\nfor fd in range(3, 9):\n  try: os.write(fd, b'\\0\\0\\0\\3xxx')\n"
            "  except OSError: pass\nos._exit(0)\n"
        ),
        0,
        "ended the interpreter",
    ),
]


@pytest.mark.parametrize(("text", "line", "message"), [one[1:] for one in FAULTS], ids=[one[0] for one in FAULTS])
async def test_G1_G3_a_bad_plugin_is_one_fault_at_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = write(tmp_path, text)
    result = await load_file(path, limits=LIMITS)
    assert [fault.line for fault in result.faults] == [line], result
    assert message in result.faults[0].message
    assert "\n" not in result.faults[0].message
    assert "Traceback" not in result.faults[0].message
    assert result.faults[0].file == str(path)
    assert str(path) in result.files


async def test_a_fault_in_a_helper_is_named_at_the_helpers_line(tmp_path: Path) -> None:
    helper = write(tmp_path, "x = 1\n\nraise KeyError('colour')\n", "helper.py")
    result = await load(tmp_path, "import helper\n")
    assert (result.faults[0].file, result.faults[0].line) == (str(helper), 3)
    assert set(result.files) == {str(helper), str(tmp_path / "plugin.py")}


async def test_G2_a_plugin_that_hangs_is_killed_at_the_deadline_and_its_line_named(tmp_path: Path) -> None:
    hanging = {
        "loop.py": ("while True:\n    pass\n", {1, 2}),
        "sleep.py": ("import time\n\ntime.sleep(1000)\n", {3}),
        "stubborn.py": ("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)\n", {3}),
    }
    results: dict[str, LoadResult] = {}

    async def one(name: str, text: str) -> None:
        results[name] = await load_file(write(tmp_path, text, name), limits=SHORT)

    start = time.monotonic()
    async with anyio.create_task_group() as tasks:
        for name, (text, _) in hanging.items():
            tasks.start_soon(one, name, text)
    assert time.monotonic() - start < 10
    assert not alive(str(tmp_path))
    for name, (_, lines) in hanging.items():
        assert results[name].faults[0].message == "still loading after 3 s"
        assert results[name].faults[0].line in lines
        assert list(results[name].files) == [str(tmp_path / name)]


async def test_G3_a_flood_on_stdout_is_read_and_dropped(tmp_path: Path) -> None:
    result = await load(tmp_path, GOOD + "import sys\nfor _ in range(300): sys.stdout.write('x' * 1_000_000)\n")
    assert [spec.name for spec in result.pipelines] == ["digits"]
    assert len(result.detail) <= 64 << 10


async def test_G3_a_file_without_end_stops_at_the_limit_of_a_files_size(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    result = await load(
        tmp_path,
        f"""\
        with open({str(huge)!r}, "wb") as file:
            while True:
                file.write(bytes(1 << 20))
        """,
    )
    assert "file too large" in result.faults[0].message.lower(), result
    assert result.faults[0].line == 3
    assert 0 < huge.stat().st_size <= LIMITS.file_size


@pytest.mark.parametrize("escape", ["", "os.setsid()"], ids=["same group", "own session"])
async def test_G2_a_forked_child_that_holds_the_pipe_neither_delays_nor_survives(tmp_path: Path, escape: str) -> None:
    pid_file = tmp_path / "pid"
    text = f"""
        import os, time
        if os.fork() == 0:
            {escape or "pass"}
            open({str(pid_file)!r}, "w").write(str(os.getpid()))
            time.sleep(1000)
        while not os.path.exists({str(pid_file)!r}) or not open({str(pid_file)!r}).read():
            pass
        os._exit(0)
        """
    start = time.monotonic()
    result = await load(tmp_path, text)
    assert time.monotonic() - start < 10
    assert "ended the interpreter" in result.faults[0].message
    assert gone(int(pid_file.read_text()))


def gone(pid: int) -> bool:
    """Not there, or a zombie that its new parent has not reaped yet; waits for the kill to arrive."""
    for _ in range(500):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


async def test_G2_a_process_that_left_the_group_and_holds_nothing_does_not_survive(tmp_path: Path) -> None:
    text = f"""
        import subprocess
        away = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdin=-3, stdout=-3, stderr=-3)
        open({str(tmp_path / "pid")!r}, "w").write(str(away.pid))
        """
    result = await load(tmp_path, text)
    assert result.faults == ()
    assert gone(int((tmp_path / "pid").read_text()))


async def test_a_fork_that_comes_back_out_of_the_import_does_not_answer_twice(tmp_path: Path) -> None:
    result = await load(tmp_path, "import os\nos.fork()\n" + GOOD)
    assert [spec.name for spec in result.pipelines] == ["digits"]


async def test_G2_a_thread_that_never_ends_does_not_delay(tmp_path: Path) -> None:
    start = time.monotonic()
    result = await load(
        tmp_path, GOOD + "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
    )
    assert result.faults == ()
    assert time.monotonic() - start < 10


async def test_files_of_other_kinds_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "link.py").symlink_to(write(tmp_path, GOOD))
    (tmp_path / "large.py").write_bytes(b"#" * (LIMITS.source + 1))
    for name, message in {
        "pipe.py": "not a regular file",
        "folder.py": "a folder without `__init__.py` is no plugin",
        "link.py": "a symbolic link is not loaded",
        "large.py": "larger than 4 MiB",
        "gone.py": "no such file",
    }.items():
        result = await load_file(tmp_path / name)
        assert [fault.message for fault in result.faults] == [message]
        assert result.refused


async def test_text_that_is_not_utf8_or_holds_a_nul_names_the_line(tmp_path: Path) -> None:
    for data, line, message in (
        (b"# caf\xe9\nx = 1\n", 1, "syntax error: invalid or missing encoding declaration"),
        (b"x = 1\n\n# caf\xe9\n", 3, "syntax error: not utf-8 text"),
        (b"# coding: klingon\n", 1, "syntax error: unknown encoding: klingon"),
        (b"x = 1\n\0\n", 2, "syntax error: it holds a NUL"),
    ):
        path = tmp_path / "plugin.py"
        path.write_bytes(data)
        result = await load_file(path)
        assert [tuple(fault[:3]) for fault in result.faults] == [(str(path), line, message)]


async def test_a_package_loads_with_its_modules_and_relative_imports(tmp_path: Path) -> None:
    write(tmp_path, "from .graph import p\n", "lab/__init__.py")
    write(
        tmp_path,
        "from mlpiped import *\np = Pipeline('p', [PythonScriptStep('s.py', source_directory='code')])\n",
        "lab/graph.py",
    )
    write(tmp_path, "", "lab/code/s.py")
    result = await load_file(tmp_path / "lab")
    assert result.faults == ()
    assert result.pipelines[0].steps[0].source is not None
    assert result.pipelines[0].steps[0].source.directory == str(tmp_path / "lab/code")
    assert set(result.files) == {str(tmp_path / "lab/__init__.py"), str(tmp_path / "lab/graph.py")}


async def test_what_the_plugin_reads_beside_itself_belongs_to_it(tmp_path: Path) -> None:
    write(tmp_path, "numpy==2\n", "requirements.txt")
    write(tmp_path, '{"x": 1}', "settings.json")
    result = await load(
        tmp_path,
        """
        import json, os
        from mlpiped import *
        json.load(open("settings.json"))
        open(os.path.join(os.path.dirname(__file__), "settings.json")).close()
        step = CommandStep(["x"], environment=Environment(requirements="requirements.txt"))
        p = Pipeline("p", [step])
        """,
    )
    assert {Path(path).name for path in result.files} == {"plugin.py", "requirements.txt", "settings.json"}
    assert result.pipelines[0].steps[0].environment.requirements == "numpy==2"


async def test_what_was_missing_is_remembered(tmp_path: Path) -> None:
    result = await load(tmp_path, "import helper\n")
    assert result.files[str(tmp_path / "helper.py")] == ABSENT
    result = await load(
        tmp_path, "from mlpiped import *\np = Pipeline('p', [PythonScriptStep('a.py', source_directory='src')])\n"
    )
    assert result.files[str(tmp_path / "src")] == ABSENT
    assert result.named == {"p"}


async def test_neighbours_cannot_stand_in_for_the_standard_library_or_mlpiped(tmp_path: Path) -> None:
    for name in ("json", "mlpiped", "random"):
        write(tmp_path, "raise RuntimeError('the wrong one')\n", f"{name}.py")
    result = await load(tmp_path, "import json, random\n" + GOOD)
    assert result.faults == ()


async def test_a_pipeline_that_another_plugin_holds_is_that_plugins(tmp_path: Path) -> None:
    other = write(tmp_path, GOOD, "other.py")
    path = write(tmp_path, "from other import digits\n")
    result = await load_file(path, plugins=[str(other), str(path)])
    assert result.pipelines == ()
    assert str(other) in result.files


async def test_a_reference_is_named_by_its_variable(tmp_path: Path) -> None:
    result = await load(
        tmp_path,
        """
        from mlpiped import *
        samples = DataReference("lab", "incoming/*.csv")
        p = Pipeline("p", [CommandStep(["cat", samples, DataReference("lab", "other/x")])])
        """,
    )
    assert [port.name for port in result.pipelines[0].steps[0].inputs] == ["samples", "x"]


async def test_known_names_and_cron_are_checked(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        from mlpiped import *
        good = Pipeline("good", [CommandStep(["true"])])
        p = Pipeline("p", [CommandStep([DataReference("lba", "x")], compute_target="gpu")], triggers=Cron("61 * * * *"))
        """,
    )
    result = await load_file(
        path, known=Known({"lab"}, {"local"}), check_cron=lambda expression, zone: f"bad {expression} {zone}"
    )
    assert [(fault.line, fault.message) for fault in result.faults] == [
        (4, "no datastore named `lba`"),
        (4, "no compute or pool named `gpu`"),
        (4, "bad 61 * * * * UTC"),
    ]
    assert [spec.name for spec in result.pipelines] == ["good"]
    assert result.named == {"good", "p"}


async def test_secrets_of_the_daemons_environment_do_not_reach_a_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_TOKEN", "hush")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = await load(
        tmp_path, "import os\nassert 'LAB_TOKEN' not in os.environ and 'PYTHONPATH' not in os.environ\n" + GOOD
    )
    assert result.faults == ()


async def test_a_cancelled_load_leaves_nobody_behind(tmp_path: Path) -> None:
    path = write(tmp_path, f"import time\nopen({str(tmp_path / 'started')!r}, 'w').close()\ntime.sleep(1000)\n")
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load_file, path)
            while not await anyio.Path(tmp_path / "started").exists():
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    assert not alive(str(path))


async def test_G4_a_file_that_never_holds_still_is_not_half_loaded(tmp_path: Path) -> None:
    result = await load(tmp_path, "open(__file__, 'a').write('# more\\n')\n" + GOOD)
    assert result.pipelines == ()
    assert result.faults[0].message == "changes all the time while it is loaded"
    assert result.refused


async def test_strictly_no_file_that_everybody_may_write_is_executed(tmp_path: Path) -> None:
    strict = Trust(strict=True)
    path = write(tmp_path, GOOD)
    assert (await load_file(path, trusted=strict)).faults == ()

    path.chmod(0o666)
    (fault,) = (await load_file(path, trusted=strict)).faults
    assert (fault.message, fault.hint) == ("everybody may write it: mode 0666", f"chmod o-w {path}")
    path.chmod(0o664)
    assert (await load_file(path, trusted=strict)).faults == ()

    tmp_path.chmod(0o1777)
    (fault,) = (await load_file(path, trusted=strict)).faults
    assert fault.message == f"everybody may write its folder `{tmp_path}`: mode 1777"
    tmp_path.chmod(0o770)

    os.link(path, tmp_path / "twin.py")
    (fault,) = (await load_file(path, trusted=strict)).faults
    assert fault.message == "it has a second name (a hard link)"
    (tmp_path / "twin.py").unlink()

    helper = write(tmp_path, "", "helper.py")
    helper.chmod(0o666)
    path.write_text("import helper\n" + GOOD)
    (fault,) = (await load_file(path, trusted=strict)).faults
    assert f"everybody may write `{helper}`" in fault.message
    assert fault.line == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
async def test_strictly_a_folder_of_a_stranger_is_refused_and_of_an_author_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, "alice/plugin.py")
    os.chown(path.parent, 12345, -1)
    (fault,) = (await load_file(path, trusted=Trust(strict=True))).faults
    assert fault.message == f"its folder `{path.parent}` belongs to uid 12345"
    assert (await load_file(path, trusted=Trust(strict=True, authors=frozenset({12345})))).faults == ()


NEAR = [
    ("CommandStep(['true'], ouputs=[])", "did you mean `outputs` or `inputs`?"),
    ("PythonScriptStep('x.py', argument=[])", "did you mean `arguments`?"),
    ("Pipeline('p', [], trigger=[])", "did you mean `triggers`?"),
    ("Resources(gpu=1)", "did you mean `gpus`?"),
    ("Retry(wholly_unlike=1)", None),
    ("from mlpiped import Pipelin", "did you mean `Pipeline` or `PipelineData`?"),
]


@pytest.mark.parametrize(("line", "hint"), NEAR, ids=[line for line, _ in NEAR])
async def test_a_misspelt_word_of_ours_is_met_with_the_nearest_one(tmp_path: Path, line: str, hint: str | None) -> None:
    (fault,) = (await load(tmp_path, f"from mlpiped import *\n{line}\n")).faults
    assert (fault.line, fault.hint) == (2, hint)
