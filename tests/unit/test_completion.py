"""Completion scripts are made from the parser and work in the shells themselves."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from mlpiped.cli import admin, completion
from mlpiped.errors import UnknownName


def sample() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tool")
    top.add_argument("--socket", metavar="SOCKET", help="where it's listening")
    verbs = top.add_subparsers(dest="verb")
    run = verbs.add_parser("run", help="start a thing: 100%% 'sure'")
    run.add_argument("-o", "--outcome", choices=["failed", "succeeded"], help="only these")
    run.add_argument("--follow", action="store_true", help="and watch it")
    run.add_argument("--secret", help=argparse.SUPPRESS)
    compute = verbs.add_parser("compute", help="slots")
    inner = compute.add_subparsers(dest="what")
    inner.add_parser("drain", help="use no more").add_argument("--now", action="store_true")
    inner.add_parser("undrain", help="use again")
    verbs.add_parser("submit", help="a file").add_argument("file", metavar="FILE.py", type=Path)
    verbs.add_parser("completion", help="this").add_argument("shell", choices=["bash", "zsh"])
    return top


CASES = [
    # words before the cursor, the word at it, what is offered among others, what is not
    ([], "", {"run", "compute", "submit"}, {"drain", "--follow"}),
    ([], "co", {"compute", "completion"}, {"run"}),
    (["run"], "--", {"--outcome", "--follow", "--help"}, {"--secret", "--socket", "run"}),
    (["run", "--outcome"], "", {"failed", "succeeded"}, {"--follow", "run"}),
    (["run", "-o"], "f", {"failed"}, {"succeeded"}),
    (["compute"], "", {"drain", "undrain"}, {"run"}),
    (["compute", "drain"], "--", {"--now"}, {"--follow"}),
    (["--socket", "x", "run"], "--f", {"--follow"}, {"--outcome"}),
    (["submit"], "pipe", {"pipe.py"}, {"run"}),
    (["--socket"], "pi", {"pipe.py"}, {"run"}),
    (["completion"], "", {"bash", "zsh"}, {"run"}),
]


def bash(script: Path, before: list[str], word: str, folder: Path) -> set[str]:
    line = ["tool", *before, word]
    code = (
        f"source {script}; COMP_WORDS=({' '.join(repr(w) for w in line)}); COMP_CWORD={len(line) - 1}; _tool;"
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def fish(script: Path, before: list[str], word: str, folder: Path) -> set[str]:
    code = f"source {script}; complete -C '{' '.join(['tool', *before, word])}'"
    done = subprocess.run(["fish", "-c", code], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    assert done.stderr == ""
    return {line.split("\t")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize(("before", "word", "offered", "not_offered"), CASES)
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_the_shell_offers_what_fits_at_that_place(
    shell: str, before: list[str], word: str, offered: set[str], not_offered: set[str], tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "pipe.py").touch()
    script = tmp_path / "completion"
    script.write_text(completion.script(sample(), "tool", shell))
    given = {"bash": bash, "fish": fish}[shell](script, before, word, tmp_path)
    assert offered <= given
    assert not given & not_offered


def test_zsh_accepts_its_script_and_completes_a_verb(tmp_path: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "_tool").write_text(completion.script(sample(), "tool", "zsh"))
    code = r"""
zmodload zsh/zpty
zpty -b z "zsh -f -i"
send() { zpty -w z "$1"; }
send "PS1=; fpath=($1 \$fpath); autoload -Uz compinit; compinit -u -D; zstyle ':completion:*' list-colors ''"
send "print rea""dy"
zpty -r z seen '*ready*'
zpty -n -w z $'tool compute dr\t'
zpty -n -w z $'\C-a: \C-e\n'
send "print do""ne"
zpty -r z seen '*done*'
print -r -- $seen
"""
    done = subprocess.run(["zsh", "-f", "-c", code, "zsh", str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert "tool compute drain" in done.stdout, (done.stdout, done.stderr)


def test_an_unknown_shell_is_refused_with_the_known_ones_near() -> None:
    with pytest.raises(UnknownName, match="no shell named `fsh`") as caught:
        completion.script(sample(), "tool", "fsh")
    assert caught.value.hint is not None and "fish" in caught.value.hint


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_of_mlpiped_itself_has_every_verb(shell: str) -> None:
    text = completion.script(admin.parser(), "mlpiped", shell)
    assert all(verb in text for verb in ("serve", "check", "init", "demo", "completion"))
    assert text.endswith("\n")
