"""Two machines for two steps: a model is trained on a GPU box, and judged in a container on this one.

    moons/train-*.csv ── train (pool `gpu`) ── model ──┐
    moons/test.csv ────────────────────────────────────┴─ evaluate (image python:3.12-slim) ── report

`config/boxes.toml` has the computes that are named here. The training is plain Python, so that it runs wherever there
is one; a real one names its packages in `Environment(requirements=…)` and uses the card that it is given.
"""

from functools import partial

from mlpiped import (
    DataReference,
    Datastore,
    Environment,
    OnArrival,
    Pipeline,
    PipelineData,
    PipelineParameter,
    PythonScriptStep,
    Resources,
    Retry,
)

lab = Datastore("lab")
samples = DataReference(lab, "moons/train-*.csv")
unseen = DataReference(lab, "moons/test.csv")
model = PipelineData("model", path="model.json")
report = PipelineData("report", path="report.json")
width = PipelineParameter("width", default=8)

Script = partial(PythonScriptStep, source_directory="boxes", code="imports")

train = Script(
    "train.py",
    name="train",
    arguments=["--width", width, "--out", model, samples],
    outputs=[model],
    compute_target="gpu",  # a pool: whichever of its boxes has a card free
    resources=Resources(gpus=1, memory="4G"),
    retry=Retry(attempts=2),
    timeout="2h",
)
evaluate = Script(
    "evaluate.py",
    name="evaluate",
    arguments=["--model", model, "--test", unseen, "--out", report],
    outputs=[report],
    compute_target="box",
    environment=Environment(image="python:3.12-slim"),
    resources=Resources(memory="1G"),  # and no network, which a container has to ask for
)

boxes = Pipeline("boxes", steps=[train, evaluate], triggers=[OnArrival(samples, settle="5s")])
