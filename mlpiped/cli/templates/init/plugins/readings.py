"""Sensor readings arrive as CSV files; the table of means per sensor is kept up to date."""

from mlpiped import DataReference, Datastore, OnArrival, Pipeline, PipelineData, PipelineParameter, PythonScriptStep

arrived = DataReference(Datastore("lab"), "incoming/*.csv")
clean, means = PipelineData("clean"), PipelineData("means")
highest = PipelineParameter("highest", default=100.0)  # a reading above it is a fault of the sensor

clean_step = PythonScriptStep(
    "clean.py",
    name="clean",
    source_directory="readings",
    code="imports",  # an edit of the other script does not run this one again
    arguments=["--highest", highest, "--out", clean, arrived],
    outputs=[clean],
)
means_step = PythonScriptStep(
    "means.py",
    name="means",
    source_directory="readings",
    code="imports",
    arguments=[clean, "--out", means],
    outputs=[means],
)
readings = Pipeline("readings", steps=[clean_step, means_step], triggers=[OnArrival(arrived, settle="1s")])
