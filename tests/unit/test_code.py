from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from files_rig import fingerprinter, names, settle_all, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mlpiped.code.reader
from mlpiped.code import CodeReader
from mlpiped.code.sources import SourceFault, list_code
from mlpiped.code.syntax import Import, meaning_of
from mlpiped.spec import SourceSpec

pytestmark = pytest.mark.anyio

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tree(folder: Path, **more: str) -> SourceSpec:
    return SourceSpec(directory=str(folder), **more)  # type: ignore[arg-type]


def by_imports(folder: Path, script: str) -> SourceSpec:
    return SourceSpec(directory=str(folder), mode="imports", script=script)


def reader(tmp_path: Path) -> CodeReader:
    return CodeReader(fingerprinter(), tmp_path / "state")


# --- what counts of a Python file -------------------------------------------------------------------------------
SOURCE = b"""\
import os, sys
def f(a, *, b=None, **k):
    "doc"
    return [x for x in (a, b) if x] + [f"{a!r:>{b}} and {k}", b'1', 1.5, -2, ...]
class C(Base, metaclass=M):
    x: int = 3
"""
SAME = [
    SOURCE.replace(b"import os, sys", b"import os, sys  # comment\n\n\n"),
    SOURCE.replace(b'"doc"', b"'''doc'''"),
    SOURCE.replace(b"b'1', 1.5", b'(b"1"),   1.50'),
    SOURCE.replace(b"(a, b) if x]", b"(a, b,) if (x)\n  ]"),
    SOURCE.replace(b"x: int = 3", b"x: (int) = 0x3  # type: ignore"),
    SOURCE.replace(b"\n", b"\r\n"),
    b"\xef\xbb\xbf" + SOURCE,
    b"# -*- coding: utf-8 -*-\n" + SOURCE,
    SOURCE.replace(b"    return", b"    # why\n    return"),
]
OTHER = [
    SOURCE.replace(b"import os, sys", b"import sys, os"),
    SOURCE.replace(b'"doc"', b'"docs"'),
    SOURCE.replace(b"b'1'", b"'1'"),
    SOURCE.replace(b"b'1'", b"1"),
    SOURCE.replace(b"b=None", b"b='None'"),
    SOURCE.replace(b"1.5", b"1.6"),
    SOURCE.replace(b"-2", b"2"),
    SOURCE.replace(b"!r", b"!s"),
    SOURCE.replace(b"*, b", b"b"),
    SOURCE.replace(b"x: int = 3", b"x: int"),
    SOURCE.replace(b"class C", b"class D"),
    b"#!/usr/bin/env python3\n" + SOURCE,
    SOURCE.replace(b"def f", b"async def f"),
]


@pytest.mark.parametrize("source", SAME)
def test_writing_the_same_program_otherwise_does_not_count(source: bytes) -> None:
    assert source != SOURCE
    assert meaning_of(source).digest == meaning_of(SOURCE).digest


@pytest.mark.parametrize("source", OTHER)
def test_another_program_counts(source: bytes) -> None:
    assert meaning_of(source).digest.startswith("ast:")
    assert meaning_of(source).digest != meaning_of(SOURCE).digest


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (b"return_ = None", b"return_ = 'None'"),
        (b"x = [1, [2]]", b"x = [[1], 2]"),
        (b"f(a)(b)", b"f(a, b)"),
        (b"x = 1", b"x = True"),
        (b"x = 1", b"x = 1.0"),
        (b"x = {**a}", b"x = {a}"),
        (b"def f(): return", b"def f(): pass"),
        (b"x = '.body'", b"x = '.value'"),
        (b"x = f'{a}'", b"x = f'{{a}}'"),
        (b"import a.b", b"import a, b"),
        (b"from . import a", b"from .. import a"),
    ],
)
def test_programs_that_look_alike_are_told_apart(a: bytes, b: bytes) -> None:
    assert meaning_of(a).digest != meaning_of(b).digest


@pytest.mark.parametrize(
    "source",
    [b"print 'python 2'", b"\xff\xfe", b"a\0b", b"(" * 5000, b"x = " + b"-" * 20000 + b"1", b"# " + b"x" * 300_000],
)
def test_what_does_not_parse_counts_by_its_bytes(source: bytes) -> None:
    assert meaning_of(source).digest.startswith("b3:")
    assert meaning_of(source).digest != meaning_of(source + b" ").digest


def test_a_number_of_ten_thousand_digits_is_no_trouble() -> None:
    assert meaning_of(b"x = 0x" + b"f" * 10_000).digest.startswith("ast:")


def test_what_the_parser_warns_of_is_not_printed_by_the_daemon() -> None:
    code = r"from mlpiped.code.syntax import meaning_of; assert meaning_of(b'x = \'\\d\'').digest.startswith('ast:')"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_have_a_meaning(source: bytes) -> None:
    assert meaning_of(source) == meaning_of(source)


def test_imports_are_found_wherever_they_stand() -> None:
    source = b"""
import a.b as c
from d import e, f
def g():
    from ..h import *
    importlib.import_module("i.j"); __import__("k"); import_module(name)
"""
    assert set(meaning_of(source).imports) == {
        Import(0, "a.b", ()),
        Import(0, "d", ("e", "f")),
        Import(2, "h", ("*",)),
        Import(0, "i.j", ()),
        Import(0, "k", ()),
    }


# --- which files ------------------------------------------------------------------------------------------------
def listed(folder: Path) -> set[str]:
    return {member.rel for member in list_code(str(folder))}


def test_ignore_files_are_honoured_each_for_its_own_folder(tmp_path: Path) -> None:
    for name in (
        "a.py",
        "a.log",
        "keep.log",
        "out/x",
        "sub/a.log",
        "sub/b.tmpl",
        "sub/out/y",
        "other/b.tmpl",
        "data/z",
    ):
        write(tmp_path / name)
    write(tmp_path / ".gitignore", "*.log\n!keep.log\n/out/\n# comment\n\n")
    write(tmp_path / ".amlignore", "data\n")
    write(tmp_path / "sub" / ".gitignore", "*.tmpl\n!a.log\n")
    assert listed(tmp_path) == {"a.py", "keep.log", "sub/a.log", "sub/out/y", "other/b.tmpl"}


def test_what_tools_leave_behind_is_no_code(tmp_path: Path) -> None:
    for name in (
        ".git/HEAD", "__pycache__/a.pyc", "b.pyc", ".venv/bin/python", "env/pyvenv.cfg", "env/lib/x.py",
        ".mypy_cache/x", ".ipynb_checkpoints/x", "a.egg-info/x", ".a.py.swp", "a.py~", ".DS_Store", "train.py", ".env",
    ):  # fmt: skip
        write(tmp_path / name)
    assert listed(tmp_path) == {"train.py", ".env"}


def test_an_ignore_file_may_bring_back_what_is_built_in(tmp_path: Path) -> None:
    write(tmp_path / "model.pyc")
    write(tmp_path / ".amlignore", "!model.pyc")
    assert listed(tmp_path) == {"model.pyc"}


async def test_touching_moving_and_commenting_does_not_change_the_key(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.py", "x = 1")
    write(tmp_path / "a" / "conf" / "c.yaml", "k: 1")
    code = reader(tmp_path)
    first = await code.read(tree(tmp_path / "a"))
    os.utime(tmp_path / "a" / "train.py", (1, 1))
    (tmp_path / "a" / "empty").mkdir()
    write(tmp_path / "a" / "__pycache__" / "train.pyc")
    assert await code.read(tree(tmp_path / "a")) == first
    (tmp_path / "a").rename(tmp_path / "b")
    moved = await code.read(tree(tmp_path / "b"))
    assert (moved.key, moved.raw, moved.files) == (first.key, first.raw, first.files)
    write(tmp_path / "b" / "train.py", "x = 1  # one")
    commented = await code.read(tree(tmp_path / "b"))
    assert commented.key == first.key
    assert commented.raw != first.raw


@pytest.mark.parametrize("change", ["code", "yaml comment", "exec", "new", "gone", "renamed"])
async def test_every_change_of_the_code_changes_the_key(tmp_path: Path, change: str) -> None:
    source = tmp_path / "src"
    script, config = write(source / "train.py", "x = 1"), write(source / "c.yaml", "k: 1")
    code = reader(tmp_path)
    before = await code.read(tree(source))
    match change:
        case "code":
            write(script, "x = 2")
        case "yaml comment":
            write(config, "k: 1 # one")
        case "exec":
            script.chmod(0o755)
        case "new":
            write(source / "new.py")
        case "gone":
            config.unlink()
        case "renamed":
            config.rename(source / "d.yaml")
    after = await code.read(tree(source))
    assert after.key != before.key
    assert after.files != before.files


async def test_unchanged_code_is_not_read_again(tmp_path: Path) -> None:
    for n in range(50):
        write(tmp_path / "src" / f"m{n}.py", f"x = {n}")
    settle_all(tmp_path / "src")
    prints = fingerprinter()
    code = CodeReader(prints, tmp_path / "state")
    first = await code.read(tree(tmp_path / "src"))
    read, parsed = prints.bytes_read, code.files_read
    assert await code.read(tree(tmp_path / "src")) == first
    assert (prints.bytes_read, code.files_read) == (read, parsed) == (read, 50)


async def test_links_inside_count_and_links_outside_are_refused_with_what_to_do(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write(source / "v1.yaml", "1")
    write(tmp_path / "data" / "big.csv", "1")
    (source / "conf.yaml").symlink_to("v1.yaml")
    code = reader(tmp_path)
    assert (await code.read(tree(source))).files["conf.yaml"] == "-> v1.yaml"
    (source / "data").symlink_to(tmp_path / "data")
    with pytest.raises(SourceFault, match=r"`data` in .* leads outside") as fault:
        await code.read(tree(source))
    assert ".amlignore" in (fault.value.hint or "")
    write(source / ".amlignore", "data/\n")
    assert "data" not in (await code.read(tree(source))).files


async def test_faults_of_the_source_are_sentences(tmp_path: Path) -> None:
    code = reader(tmp_path)
    with pytest.raises(SourceFault, match="is not there"):
        await code.read(tree(tmp_path / "gone"))
    write(tmp_path / "src" / "a.py")
    with pytest.raises(SourceFault, match=r"the script `train\.py` is not in"):
        await code.read(tree(tmp_path / "src", script="train.py"))
    with pytest.raises(SourceFault, match=r"the script `train\.py` is not in"):
        await code.read(by_imports(tmp_path / "src", "train.py"))
    with pytest.raises(SourceFault, match=r"`\.\.`"):
        await code.read(by_imports(tmp_path / "src", "../a.py"))


async def test_names_that_are_no_text_are_code_too(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.py")
    with open(os.fsencode(tmp_path) + b"/src/\xff\n.txt", "wb") as file:
        file.write(b"1")
    code = reader(tmp_path)
    fact = await code.read(tree(tmp_path / "src"))
    assert set(fact.files) == {"a.py", "\\xff\\n.txt"}
    assert len(os.listdir(await code.snapshot(tree(tmp_path / "src"), fact))) == 2


# --- imports ----------------------------------------------------------------------------------------------------
PROJECT = {
    "train.py": "import numpy, lab.model\nfrom lab import data\nfrom tools import *\nimport fast",
    "lab/__init__.py": "from .version import v",
    "lab/version.py": "v = 1",
    "lab/model.py": "from . import layers\nfrom .deep.net import Net",
    "lab/layers.py": "import lab.model",
    "lab/data.py": "def f():\n    import importlib\n    importlib.import_module('lab.late')",
    "lab/late.py": "",
    "lab/deep/net.py": "from .. import version\nimport broken",
    "lab/unused.py": "",
    "broken.py": "def (",
    "tools/__init__.py": "__all__ = ['one']",
    "tools/one.py": "",
    "fast.cpython-311-x86_64-linux-gnu.so": "elf",
    "other.py": "import lab.unused",
    "README.md": "",
}
REACHED = set(PROJECT) - {"lab/unused.py", "other.py", "README.md"}


async def test_imports_reach_the_modules_below_the_folder_and_no_more(tmp_path: Path) -> None:
    for name, text in PROJECT.items():
        write(tmp_path / "src" / name, text)
    code = reader(tmp_path)
    fact = await code.read(by_imports(tmp_path / "src", "train.py"))
    assert set(fact.files) == REACHED
    write(tmp_path / "src" / "lab" / "unused.py", "x = 1")
    assert (await code.read(by_imports(tmp_path / "src", "train.py"))).key == fact.key
    write(tmp_path / "src" / "lab" / "late.py", "x = 1")
    assert (await code.read(by_imports(tmp_path / "src", "train.py"))).key != fact.key
    write(tmp_path / "src" / "numpy.py", "shadows the installed one")
    assert "numpy.py" in (await code.read(by_imports(tmp_path / "src", "train.py"))).files


async def test_a_script_in_a_subfolder_finds_its_neighbours_and_the_top(tmp_path: Path) -> None:
    write(tmp_path / "jobs" / "train.py", "import near, far")
    write(tmp_path / "jobs" / "near.py")
    write(tmp_path / "far.py")
    fact = await reader(tmp_path).read(by_imports(tmp_path, "jobs/train.py"))
    assert set(fact.files) == {"jobs/train.py", "jobs/near.py", "far.py"}


async def test_what_imports_reach_is_what_the_interpreter_loads(tmp_path: Path) -> None:
    """The interpreter is the oracle: every module below the folder that it loads was reached."""
    for name, text in PROJECT.items():
        if name not in ("broken.py", "fast.cpython-311-x86_64-linux-gnu.so"):
            write(tmp_path / name, text.replace("import broken", "class Net: pass").replace("\nimport fast", ""))
    write(tmp_path / "numpy.py", "")
    script = write(tmp_path / "train.py", (tmp_path / "train.py").read_text() + "\ndata.f()")
    program = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2]);"
        "print('\\n'.join(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, str(tmp_path), str(script)], capture_output=True, text=True, check=True
    )
    loaded = {os.path.relpath(f, tmp_path) for f in done.stdout.split("\n") if f.startswith(f"{tmp_path}/")}
    fact = await reader(tmp_path).read(by_imports(tmp_path, "train.py"))
    assert loaded > {"lab/late.py", "lab/deep/net.py", "tools/__init__.py"}
    assert loaded <= set(fact.files)


# --- the copy ---------------------------------------------------------------------------------------------------
async def test_a_snapshot_is_the_code_byte_for_byte_and_stays(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write(source / "pkg" / "train.py", "x = 1  # comment")
    write(source / "run.sh", "#!/bin/sh", mode=0o755)
    write(source / "junk.pyc")
    (source / "link").symlink_to("run.sh")
    code = reader(tmp_path)
    fact = await code.read(tree(source))
    copy = await code.snapshot(tree(source), fact)
    assert copy.is_absolute()
    assert names(copy) == {"pkg", "pkg/train.py", "run.sh", "link"}
    assert (copy / "pkg" / "train.py").read_text() == "x = 1  # comment"
    assert os.access(copy / "run.sh", os.X_OK)
    assert os.readlink(copy / "link") == "run.sh"
    assert copy == tmp_path / "state" / "code" / fact.raw[4:6] / fact.raw[6:]
    write(source / "pkg" / "train.py", "x = 2")
    assert (copy / "pkg" / "train.py").read_text() == "x = 1  # comment"
    assert await code.snapshot(tree(source), fact) == copy
    assert os.listdir(copy.parent) == [copy.name]


async def test_a_snapshot_of_imports_has_what_was_reached_alone(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.py", "import b")
    write(tmp_path / "src" / "b.py")
    write(tmp_path / "src" / "c.py")
    code = reader(tmp_path)
    source = by_imports(tmp_path / "src", "a.py")
    assert names(await code.snapshot(source, await code.read(source))) == {"a.py", "b.py"}


@pytest.mark.parametrize("change", ["edited", "gone"])
async def test_code_that_changed_since_its_key_was_made_is_never_passed_off_as_it(tmp_path: Path, change: str) -> None:
    script = write(tmp_path / "src" / "train.py", "x = 1")
    write(tmp_path / "src" / "other.py", "y = 1")
    code = reader(tmp_path)
    fact = await code.read(tree(tmp_path / "src"))
    if change == "edited":
        write(script, "x = 2")
    else:
        script.unlink()
    with pytest.raises(SourceFault, match="changed while it was read"):
        await code.snapshot(tree(tmp_path / "src"), fact)
    assert [path for path in (tmp_path / "state" / "code").rglob("*") if path.is_file()] == []


async def test_a_comment_written_meanwhile_is_no_reason_to_fail(tmp_path: Path) -> None:
    script = write(tmp_path / "src" / "train.py", "x = 1")
    code = reader(tmp_path)
    fact = await code.read(tree(tmp_path / "src"))
    write(script, "x = 1  # soon two")
    copy = await code.snapshot(tree(tmp_path / "src"), fact)
    assert (copy / "train.py").read_text() == "x = 1  # soon two"
    assert copy.name != fact.raw[6:]


async def test_code_that_never_holds_still_is_given_up_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = write(tmp_path / "src" / "train.py", "x = 0")
    count = 0
    real = mlpiped.code.reader._read

    def edited_just_before(piece: mlpiped.code.reader.Piece) -> bytes:
        nonlocal count
        count += 1
        write(script, f"x = {count}")
        return real(piece)

    monkeypatch.setattr(mlpiped.code.reader, "_read", edited_just_before)
    with pytest.raises(SourceFault, match="changed while it was read"):
        await reader(tmp_path).read(tree(tmp_path / "src"))
    assert count == 5


async def test_many_who_want_the_same_snapshot_get_one(tmp_path: Path) -> None:
    for n in range(30):
        write(tmp_path / "src" / f"{n}.py", f"x = {n}")
    code = reader(tmp_path)
    fact = await code.read(tree(tmp_path / "src"))
    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(code.snapshot, tree(tmp_path / "src"), fact)
    (head,) = (tmp_path / "state" / "code").iterdir()
    (copy,) = head.iterdir()
    assert len(names(copy)) == 30


# --- the difference ---------------------------------------------------------------------------------------------
async def test_the_difference_names_files_and_counts_lines(tmp_path: Path) -> None:
    source = tmp_path / "src"
    script = write(source / "train.py", "a = 1\nb = 2\nc = 3\n")
    write(source / "old.py", "1")
    code = reader(tmp_path)
    before = await code.read(tree(source))
    await code.snapshot(tree(source), before)
    assert await code.diff(before.raw, before.files, before) == ""
    write(script, "a = 1\nb = 4\nc = 3\nd = 5\ne = 6\n")
    (source / "old.py").unlink()
    write(source / "utils.py")
    after = await code.read(tree(source))
    assert await code.diff(before.raw, before.files, after) == "old.py gone, train.py (+3 -1), utils.py new"
    assert await code.diff(None, before.files, after) == "old.py gone, train.py changed, utils.py new"
    script.chmod(0o755)
    now = await code.read(tree(source))
    assert await code.diff(after.raw, after.files, now) == "train.py is now executable"


async def test_a_long_difference_is_cut(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.py")
    code = reader(tmp_path)
    before = await code.read(tree(tmp_path / "src"))
    for n in range(7):
        write(tmp_path / "src" / f"n{n}.py")
    after = await code.read(tree(tmp_path / "src"))
    assert await code.diff(before.raw, before.files, after) == "n0.py new, n1.py new, n2.py new and 4 more"
