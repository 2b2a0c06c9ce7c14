"""`mlpiped` at the terminal: its verbs, its sentences, its exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlpiped.cli import admin, front
from mlpiped.config import settings as config
from mlpiped.errors import LedgerBusy, MlpipedError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_config_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpiped.config.find.SYSTEM", Path("/none/mlpiped.toml"))
    for name in ("MLPIPED_CONFIG", "MLPIPED_DEBUG", "MLPIPED_SOCKET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What `mlpiped init` makes."""
    folder = tmp_path / "home"
    assert admin.main(["init", str(folder)]) == 0
    return folder


Captured = pytest.CaptureFixture[str]


# --- words --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["serv"], "no verb named `serv`", "did you mean `serve`?"),
        (["xyz"], "no verb named `xyz`", "`mlpiped --help`"),
        (["serve", "--confg", "x"], "no option named `--confg`", "did you mean `--config`?"),
        (["serve", "--conf", "x"], "no option named `--conf`", "did you mean `--config`?"),
        (["serve", "extra"], "unexpected argument: `extra`", "`mlpiped serve --help`"),
        (["init"], "required: DIR", "`mlpiped init --help`"),
        (["completion", "fsh"], "no shell named `fsh`", "fish"),
    ],
)
def test_wrong_words_are_named_with_what_is_near_and_end_with_2(
    words: list[str], error: str, hint: str, capsys: Captured
) -> None:
    assert admin.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("error: ") and error in first
    assert second.startswith("hint: ") and hint in second


@pytest.mark.parametrize("verb", ["serve", "check", "init", "demo", "completion"])
def test_every_verb_has_help_on_stdout(verb: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        admin.main([verb, "--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert f"mlpiped {verb}" in out


def test_no_words_at_all_print_the_help_to_stderr_and_end_with_2(capsys: Captured) -> None:
    assert admin.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "serve" in err


def test_the_version_is_printed(capsys: Captured) -> None:
    assert admin.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mlpiped 0")


def test_completion_prints_a_script(capsys: Captured) -> None:
    assert admin.main(["completion", "bash"]) == 0
    assert "complete -F _mlpiped mlpiped" in capsys.readouterr().out


# --- what goes wrong ----------------------------------------------------------------------------------------
def fail_with(error: BaseException) -> int:
    def call() -> int:
        raise error

    return front.guarded(call)


def test_an_error_of_ours_is_a_sentence_a_hint_and_its_own_exit_status(capsys: Captured) -> None:
    assert fail_with(LedgerBusy("another daemon owns `/s`: pid 7", hint="stop it")) == 75
    assert capsys.readouterr().err == "error: another daemon owns `/s`: pid 7\nhint: stop it\n"


def test_an_unexpected_fault_is_one_sentence_and_no_traceback(capsys: Captured) -> None:
    assert fail_with(ZeroDivisionError("division\nby zero")) == 70
    err = capsys.readouterr().err
    assert err.startswith("error: unexpected fault: ZeroDivisionError: division by zero\nhint: ")
    assert "MLPIPED_DEBUG=1" in err and "Traceback" not in err


def test_an_error_of_ours_is_found_in_the_group_of_a_task_group(capsys: Captured) -> None:
    group = BaseExceptionGroup("g", [ValueError("x"), ExceptionGroup("h", [LedgerBusy("held by pid 7")])])
    assert fail_with(group) == 75
    assert capsys.readouterr().err == "error: held by pid 7\n"
    assert fail_with(BaseExceptionGroup("g", [KeyboardInterrupt()])) == 130


def test_a_message_cannot_make_the_terminal_do_anything(capsys: Captured) -> None:
    fail_with(MlpipedError("bad name: `\x1b[2J`"))
    assert capsys.readouterr().err == "error: bad name: `\\x1b[2J`\n"


def test_the_traceback_is_there_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPED_DEBUG", "1")
    for error in (ZeroDivisionError(), MlpipedError()):
        with pytest.raises(type(error)):
            fail_with(error)


def test_ctrl_c_is_quiet(capsys: Captured) -> None:
    assert fail_with(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m mlpiped.cli.admin completion bash | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


# --- serve --------------------------------------------------------------------------------------------------
def test_serve_without_a_config_says_where_it_looked(capsys: Captured) -> None:
    assert admin.main(["serve"]) == 2
    assert "neither --config nor $MLPIPED_CONFIG" in capsys.readouterr().err


def test_serve_with_a_faulty_config_names_every_fault_and_starts_nothing(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "mlpiped.toml"
    path.write_text('[daemon]\nlog = 3\nstat_dir = "x"\n')
    assert admin.main(["serve", "--config", str(path)]) == 1
    err = capsys.readouterr().err
    assert f"{path}:2: `log`" in err and f"{path}:3: unknown key `stat_dir`" in err
    assert "hint: did you mean `state_dir`?" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlpiped.toml"]


# --- init ---------------------------------------------------------------------------------------------------
def test_init_makes_a_config_that_loads_and_prints_the_next_commands(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "a folder"
    assert admin.main(["init", str(folder)]) == 0
    settings = config.load(folder / "mlpiped.toml")
    assert settings.datastores["lab"].path == folder / "data"
    assert settings.daemon.plugins == (folder / "plugins",)
    out = capsys.readouterr().out
    for words in ("mlpiped serve --config '", "mlpipectl status", "cp '"):
        assert words in out
    assert str(settings.control.socket) in out


def test_init_replaces_nothing(home: Path, capsys: Captured) -> None:
    (home / "mlpiped.toml").write_text("mine")
    assert admin.main(["init", str(home)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (home / "mlpiped.toml").read_text() == "mine"


def test_init_refuses_a_folder_too_deep_for_a_socket(tmp_path: Path, capsys: Captured) -> None:
    assert admin.main(["init", str(tmp_path / ("d" * 100))]) == 2
    assert "too long for a socket" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_init_below_a_file_is_a_sentence(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").touch()
    assert admin.main(["init", str(tmp_path / "file" / "x")]) == 2
    assert "not a directory" in capsys.readouterr().err


def test_the_scripts_of_the_example_run_by_themselves(home: Path, tmp_path: Path) -> None:
    scripts, data = home / "plugins/readings", sorted((home / "data").glob("*/*.csv"))
    clean, means = tmp_path / "clean", tmp_path / "means"
    for words in (
        [scripts / "clean.py", "--highest", "100", "--out", clean, *data],
        [scripts / "means.py", clean, "--out", means],
    ):
        subprocess.run([sys.executable, *words], check=True, capture_output=True, timeout=60)
    assert json.loads(means.read_text()) == {"attic": 20.3, "cellar": 12.067}


# --- check --------------------------------------------------------------------------------------------------
def check(home: Path, *words: object) -> int:
    return admin.main(["check", "--config", str(home / "mlpiped.toml"), *map(str, words)])


def test_check_of_what_init_makes_finds_no_fault_and_says_what_it_read(home: Path, capsys: Captured) -> None:
    capsys.readouterr()
    assert check(home) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{home}/mlpiped.toml" in out and f"{home}/plugins/readings.py" in out
    assert "`readings` (2 steps, 1 trigger)" in out


def test_check_names_the_faults_of_config_and_plugins_together(home: Path, capsys: Captured) -> None:
    path = home / "mlpiped.toml"
    path.write_text(path.read_text() + '\n[pools]\ngpu = ["locla"]\n')
    (home / "plugins/broken.py").write_text("x = 1\n\nraise ValueError('no data today')\n")
    assert check(home) == 1
    out = capsys.readouterr().out
    line = len(path.read_text().splitlines())
    assert f"{path}:{line}: no compute named `locla` in pool `gpu`" in out
    assert f"{home}/plugins/broken.py:3: " in out and "no data today" in out
    assert "hint: did you mean `local`?" in out
    assert out.splitlines()[-1].startswith("2 faults")


def test_check_knows_the_datastores_of_the_config(home: Path, capsys: Captured) -> None:
    plugin = home / "plugins/readings.py"
    plugin.write_text(plugin.read_text().replace('Datastore("lab")', 'Datastore("lob")'))
    assert check(home) == 1
    out = capsys.readouterr().out
    assert f"{plugin}:" in out and "`lob`" in out and "`lab`" in out


def test_check_finds_two_pipelines_of_one_name_in_different_files(home: Path, capsys: Captured) -> None:
    text = (home / "plugins/readings.py").read_text()
    (home / "plugins/second.py").write_text(text)
    assert check(home) == 1
    out = capsys.readouterr().out
    assert "second.py" in out and "`readings`" in out


def test_check_of_one_file_reads_no_other(home: Path, capsys: Captured) -> None:
    (home / "plugins/broken.py").write_text("raise ValueError\n")
    assert check(home, home / "plugins/readings.py") == 0
    assert "broken.py" not in capsys.readouterr().out


def test_check_of_a_file_needs_no_config(home: Path, capsys: Captured) -> None:
    assert admin.main(["check", str(home / "plugins/readings.py")]) == 0
    assert "readings.py" in capsys.readouterr().out


def test_check_without_config_and_file_says_where_it_looked(capsys: Captured) -> None:
    assert admin.main(["check"]) == 2
    assert "no config file" in capsys.readouterr().err


def test_check_of_a_file_that_is_not_there_is_a_fault_and_no_traceback(home: Path, capsys: Captured) -> None:
    assert check(home, home / "plugins/none.py") == 1
    out = capsys.readouterr().out
    assert "none.py: " in out and "Traceback" not in out


def test_check_tells_of_folders_that_are_not_there_without_calling_it_a_fault(home: Path, capsys: Captured) -> None:
    path = home / "mlpiped.toml"
    path.write_text(path.read_text() + '\n[datastores.gone]\npath = "nowhere"\n')
    assert check(home) == 0
    assert "nowhere" in capsys.readouterr().err


def test_check_as_json_is_one_document(home: Path, capsys: Captured) -> None:
    (home / "plugins/broken.py").write_text("raise ValueError('x')\n")
    capsys.readouterr()
    assert check(home, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert [fault["line"] for fault in document["faults"]] == [1]
    assert {os.path.basename(one["file"]) for one in document["checked"]} == {
        "mlpiped.toml",
        "readings.py",
        "broken.py",
    }


def test_help_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from mlpiped.cli import admin; admin.parser().format_help();"
        "print([m for m in ('pydantic', 'asyncio', 'aiohttp', 'anyio', 'structlog') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("control", "warning"),
    [
        ('operators = ["nobody"]', "`operators` cannot reach the socket without `group`"),
        (
            'operators = ["nobody"]\ngroup = "daemon"',
            "operator `nobody` cannot reach the socket: not in the group `daemon`",
        ),
        ('operators = ["nobody"]\ngroup = "nogroup"', None),
        ('operators = ["@daemon"]\ngroup = "daemon"', None),
    ],
)
def test_check_warns_of_operators_whom_the_socket_keeps_out(
    home: Path, control: str, warning: str | None, capsys: Captured
) -> None:
    with (home / "mlpiped.toml").open("a") as file:
        file.write(f"\n[control]\n{control}\n")
    assert admin.main(["check", "--config", str(home / "mlpiped.toml")]) == 0
    err = capsys.readouterr().err
    assert warning in err if warning else "reach the socket" not in err


@pytest.mark.parametrize("folder", ["/proc/none", "/etc/passwd"])
def test_demo_says_which_folder_it_cannot_write_to(
    folder: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpiped.cli.demo.NEEDS", {})
    assert admin.main(["demo", "--out", folder]) == 2
    assert f"error: cannot write to `{folder}`: " in capsys.readouterr().err
