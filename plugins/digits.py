"""Handwritten digits: batches of samples arrive as CSV files, and a model that has seen all of them follows.

    incoming/*.csv ── prepare ── clean ── train ── model ──┐
    holdout.csv ───── holdout ── test ─────────────────────┴─ evaluate ── report

A new batch touches prepare, train and evaluate; `holdout` is reused. An edit of one script reruns that script's
step, and what comes after it only if it makes something else than before.
"""

from mlpiped import (
    Cron,
    DataReference,
    Datastore,
    Environment,
    OnArrival,
    Pipeline,
    PipelineData,
    PipelineParameter,
    PythonScriptStep,
    Retry,
)

lab = Datastore("lab")
samples = DataReference(lab, "digits/incoming/*.csv")
unseen = DataReference(lab, "digits/holdout.csv")

clean = PipelineData("clean", kind="folder")
test = PipelineData("test", kind="folder")
model = PipelineData("model", path="model.joblib")
report = PipelineData("report", path="report.json")
strength = PipelineParameter("C", default=0.1)

one_thread = Environment(env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})

prepare = PythonScriptStep(
    "prepare.py",
    name="prepare",
    source_directory="digits",
    code="imports",
    arguments=["--out", clean, samples],
    outputs=[clean],
    environment=one_thread,
)
holdout = PythonScriptStep(
    "holdout.py",
    name="holdout",
    source_directory="digits",
    code="imports",
    arguments=["--out", test, unseen],
    outputs=[test],
    environment=one_thread,
)
train = PythonScriptStep(
    "train.py",
    name="train",
    source_directory="digits",
    code="imports",
    arguments=[clean, "--C", strength, "--out", model],
    outputs=[model],
    environment=one_thread,
    retry=Retry(attempts=2, delay="5s"),
    timeout="10m",
)
evaluate = PythonScriptStep(
    "evaluate.py",
    name="evaluate",
    source_directory="digits",
    code="imports",
    arguments=["--model", model, "--test", test, "--out", report],
    outputs=[report],
    environment=one_thread,
)

digits = Pipeline(
    "digits",
    steps=[prepare, holdout, train, evaluate],
    triggers=[OnArrival(samples, settle="1s"), Cron("0 6 * * mon", timezone="Europe/Warsaw")],
    description="recognise handwritten digits, retrained whenever a batch of samples arrives",
)
