"""The pages say what is true: examples load, verbs and keys exist, diagrams are those of the tables."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import mlpiped
from mlpiped.cli import admin, ctl
from mlpiped.cli.init import init
from mlpiped.config import settings as config
from mlpiped.config.computes import images_of
from mlpiped.loader.load import Known, load_file
from mlpiped.triggers import cron

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = [ROOT / "README.md", ROOT / "docs" / "guide.md"]
ids = [str(page.relative_to(ROOT)) for page in PAGES]


def fenced(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


# --- states ---------------------------------------------------------------------------------------------------------
def test_states_page_is_what_the_tables_of_the_model_give() -> None:
    module = importlib.util.spec_from_file_location("generate_states", ROOT / "docs" / "generate_states.py")
    assert module is not None and module.loader is not None
    generate = importlib.util.module_from_spec(module)
    module.loader.exec_module(generate)
    assert generate.PAGE.read_text() == generate.page(), "run `python docs/generate_states.py`"


# --- examples -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_toml_example_is_a_config_without_faults(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(fenced(page, "toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        config.load(path)


def files_of(page: Path) -> dict[str, str]:
    """Each example begins with the path of its file."""
    found = {}
    for text in fenced(page, "python", "text"):
        first, _, rest = text.partition("\n")
        assert re.fullmatch(r"# plugins/[\w./-]+", first), f"{page.name}: an example without its path: {first}"
        assert first[2:] not in found, f"{page.name}: two examples are {first[2:]}"
        found[first[2:]] = rest
    return found


@pytest.mark.anyio
@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.name)
async def test_every_plugin_example_loads_into_what_init_makes(page: Path, tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    init(lab)
    settings = config.load(lab / "mlpiped.toml")
    files = files_of(page)
    assert files
    for path, text in files.items():
        (lab / path).parent.mkdir(parents=True, exist_ok=True)
        (lab / path).write_text(text)
    computes = {**{name: each.kind for name, each in settings.compute.items()}, "box": "docker"}
    known = Known(frozenset(settings.datastores), frozenset(computes), images_of(computes, {}, {}))
    for path in [path for path in files if path.count("/") == 1]:
        result = await load_file(str(lab / path), known=known, check_cron=cron.check)
        assert not result.faults, f"{page.name}: {path}: {result.faults}"
        assert result.pipelines, f"{page.name}: {path} has no pipeline"


def test_readme_s_plugin_is_about_ten_lines() -> None:
    (text,) = files_of(ROOT / "README.md").values()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 12


# --- verbs ----------------------------------------------------------------------------------------------------------
def verbs(parser: argparse.ArgumentParser) -> set[str]:
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return set(action.choices)


VERBS = {"mlpiped": verbs(admin.parser()), "mlpipectl": verbs(ctl.parser())}
CALLED = re.compile(r"(?:^|[\s;&|])(mlpiped|mlpipectl) +((?:--?\S+ +)*)([a-z]+)\b", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_verb_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    codes = fenced(page, "sh", "console") + re.findall(r"`((?:mlpiped|mlpipectl) [^`\n]+)`", FENCE.sub("", text))
    named = [found for code in codes for found in CALLED.findall(re.sub(r"\s#.*|(?:systemctl|journalctl).*", "", code))]
    unknown = [f"{program} {verb}" for program, _, verb in named if verb not in VERBS[program]]
    assert unknown == []


def test_verbs_are_found_where_they_are_named() -> None:
    assert [f[2] for f in CALLED.findall("mlpipectl --json status; mlpiped frob")] == ["status", "frob"]


# --- what is said not to be there ---------------------------------------------------------------------------------
def absent() -> str:
    """The list of README.md of what is not built."""
    text = (ROOT / "README.md").read_text()
    return text[text.index("Not built yet:") : text.index("## Security")]


def test_nothing_that_readme_says_is_missing_has_been_built_meanwhile() -> None:
    words = set(re.findall(r"`(\w+)(?:=[^`]*)?`", absent()))
    assert not words & set(mlpiped.__all__)
    assert "notify" in config.NOT_YET and "credentials" in config.NOT_YET
    assert not (Path(mlpiped.__file__).parent / "azureml").exists()
    assert not words & VERBS["mlpipectl"] and not words & VERBS["mlpiped"]


# --- keys -----------------------------------------------------------------------------------------------------------
SECTIONS: dict[str, tuple[type[BaseModel], str]] = {
    "[daemon]": (config.Daemon, "[daemon]\n{}\n"),
    "[control]": (config.Control, "[control]\n{}\n"),
    "[datastores.NAME]": (config.Datastore, '[datastores.x]\npath = "/x"\n{}\n'),
    '[compute.NAME] kind = "local"': (config.LocalCompute, '[compute.x]\nkind = "local"\n{}\n'),
    '[compute.NAME] kind = "docker"': (config.DockerCompute, '[compute.x]\nkind = "docker"\n{}\n'),
    '[compute.NAME] kind = "ssh"': (
        config.SshCompute,
        '[daemon]\nstate_dir = "/s"\n[compute.x]\nkind = "ssh"\nhost = "h"\nslots = 1\n{}\n',
    ),
    '[compute.NAME] kind = "slurm"': (config.SlurmCompute, '[compute.x]\nkind = "slurm"\n{}\n'),
    "[retention]": (config.Retention, "[retention]\n{}\n"),
}


def tables() -> dict[str, list[tuple[str, str]]]:
    """Section -> (key, default) as docs/operations.md has them."""
    text = (ROOT / "docs" / "operations.md").read_text()
    parts = re.split(r"^### `(\[[^`]+\])`(?: with `(kind = [^`]+)`)?$", text, flags=re.MULTILINE)[1:]
    rows = re.compile(r"^\| `(\w+)` \| (.+?) \| .+ \|$", re.MULTILINE)
    named = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {f"{name} {kind or ''}".rstrip(): rows.findall(body.split("\n## ")[0]) for name, kind, body in named}


def test_config_reference_has_every_section_and_key_and_no_other() -> None:
    found = {section: {key for key, _ in rows} for section, rows in tables().items()}
    pools = found.pop("[pools]")
    assert not pools
    assert found == {section: set(model.model_fields) for section, (model, _) in SECTIONS.items()}
    assert set(config.Settings.model_fields) == {
        "path",
        "pools",
        "daemon",
        "control",
        "datastores",
        "compute",
        "retention",
    }


def loaded(path: Path, text: str) -> dict[str, Any]:
    path.write_text(text)
    found: dict[str, Any] = config.load(path).model_dump()
    return found


def test_config_reference_has_the_defaults_of_the_code(tmp_path: Path) -> None:
    checked = 0
    for section, rows in tables().items():
        for key, default in rows:
            if not re.fullmatch(r"`[^`]+`", default):
                continue
            form = SECTIONS[section][1]
            line = f"{key} = {default.strip('`')}"
            tomllib.loads(line)
            path = tmp_path / "mlpiped.toml"
            assert loaded(path, form.format(line)) == loaded(path, form.format("")), f"{section} {key}"
            checked += 1
    assert checked >= 18


def test_every_file_that_a_page_links_to_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    assert shutil.which("make") is None or "bench:" in (ROOT / "Makefile").read_text()
