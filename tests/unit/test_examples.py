"""The examples in plugins/ and config/: each loads with the config that it is for, and its scripts do what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from moons_rig import moons

from mlpiped.config import settings as config
from mlpiped.loader.load import Known, LoadResult, load_file
from mlpiped.triggers import cron

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "plugins" / "boxes"


async def loaded(plugin: str, config_file: str) -> LoadResult:
    outline = config.outline(ROOT / "config" / config_file)
    assert outline is not None
    known = Known({"lab"}, outline.computes, outline.images)
    return await load_file(ROOT / "plugins" / plugin, known=known, check_cron=cron.check)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("plugin", "config_file"),
    [
        ("digits.py", "mlpiped.toml"),
        ("digits.py", "boxes.toml"),
        ("boxes.py", "boxes.toml"),
        ("leaves.py", "leaves.toml"),
    ],
)
async def test_an_example_loads_with_its_config(plugin: str, config_file: str) -> None:
    config.load(ROOT / "config" / config_file)
    result = await loaded(plugin, config_file)
    assert (result.faults, len(result.pipelines)) == ((), 1)


WORK = "[compute.work]\n"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "image"), [("local", None), ("docker", "python:3.11-slim"), ("ssh", None), ("slurm", None)]
)
async def test_leaves_is_for_each_of_its_config_s_machines(kind: str, image: str | None, tmp_path: Path) -> None:
    head, *blocks = (ROOT / "config/leaves.toml").read_text().replace(f"# {WORK}", WORK).split(WORK)
    (block,) = [block for block in blocks if f'kind = "{kind}"' in block]
    (tmp_path / "leaves.toml").write_text(
        head + WORK + block.replace("\n# ", "\n").partition("\n\n")[0].removeprefix("# ")
    )
    settings = config.load(tmp_path / "leaves.toml")
    assert (list(settings.compute), settings.compute["work"].kind) == (["work"], kind)
    outline = config.outline(tmp_path / "leaves.toml")
    assert outline is not None
    known = Known({"lab"}, outline.computes, outline.images)
    result = await load_file(ROOT / "plugins/leaves.py", known=known, check_cron=cron.check)
    assert result.faults == ()
    assert {step.environment.image for step in result.pipelines[0].steps} == {image}


@pytest.mark.anyio
async def test_boxes_uses_a_gpu_box_and_a_container() -> None:
    train, evaluate = (await loaded("boxes.py", "boxes.toml")).pipelines[0].steps
    assert (train.compute, train.resources.gpus, train.environment.image) == (("gpu",), 1, None)
    assert (evaluate.compute, evaluate.environment.image) == (("box",), "python:3.12-slim")
    assert [fault.hint for fault in (await loaded("boxes.py", "mlpiped.toml")).faults] != []


def script(name: str, *words: object, metrics: Path) -> None:
    env = {**os.environ, "MLPIPED_METRICS": str(metrics), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, SCRIPTS / name, *map(str, words)], env=env, check=True, timeout=60)


def test_what_boxes_trains_tells_two_moons_apart(tmp_path: Path) -> None:
    for number, name in enumerate(("train-1.csv", "train-2.csv", "test.csv")):
        moons(tmp_path / name, 200, number)
    model, report, metrics = (tmp_path / name for name in ("model.json", "report.json", "metrics.jsonl"))
    batches = sorted(tmp_path.glob("train-*.csv"))
    script("train.py", "--width", 8, "--out", model, *batches, metrics=metrics)
    script("evaluate.py", "--model", model, "--test", tmp_path / "test.csv", "--out", report, metrics=metrics)
    assert json.loads(report.read_text())["accuracy"] > 0.9
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [line["value"] for line in lines if line.get("name") == "loss"]
    assert len(losses) == 30 and losses[-1] < losses[0]
    assert lines[-1] == {"kind": "metric", "name": "accuracy", "value": json.loads(report.read_text())["accuracy"]}
