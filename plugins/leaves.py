"""One pipeline for every kind of machine: which one it runs on is for the config alone to say.

    leaves/*.csv ── prepare ── sets/ ──┬── train ── model.json ──┐
                                       └─────────────────────────┴── evaluate ── report.json

All steps go to `work`. `config/leaves.toml` makes that this machine, a container, a box by SSH or a Slurm cluster, and
the plugin stays as it is. The scripts are plain Python, and add and multiply only: what they make is the same, byte for
byte, wherever they run. A container needs no package for them, and neither does a node.
"""

from mlpiped import DataReference, Datastore, OnArrival, Pipeline, PipelineData, PipelineParameter, PythonScriptStep

lab = Datastore("lab")
measured = DataReference(lab, "leaves/*.csv")
sets = PipelineData("sets", kind="folder", datastore=lab)
model = PipelineData("model", path="model.json", datastore=lab)
report = PipelineData("report", path="report.json", datastore=lab)
epochs = PipelineParameter("epochs", default=20)

prepare = PythonScriptStep(
    "prepare.py",
    name="prepare",
    source_directory="leaves",
    code="imports",
    arguments=["--out", sets, measured],
    outputs=[sets.publish("models/{pipeline}/{run_id}/sets")],
    compute_target="work",
)
train = PythonScriptStep(
    "train.py",
    name="train",
    source_directory="leaves",
    code="imports",
    arguments=["--sets", sets, "--epochs", epochs, "--out", model],
    outputs=[model.publish("models/{pipeline}/{run_id}/model.json")],
    compute_target="work",
    timeout="1h",
)
evaluate = PythonScriptStep(
    "evaluate.py",
    name="evaluate",
    source_directory="leaves",
    code="imports",
    arguments=["--sets", sets, "--model", model, "--out", report],
    outputs=[report.publish("models/{pipeline}/{run_id}/report.json")],
    compute_target="work",
)

leaves = Pipeline("leaves", steps=[prepare, train, evaluate], triggers=[OnArrival(measured, settle="2s")])
