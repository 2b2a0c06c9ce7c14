"""What plugin authors write with: objects that become a plain-data Spec. Standard library only.

errors     the one exception, with the place in the author's file
place      where an object was made; files that a definition reads
values     checks of what authors pass: names, texts, durations, sizes
data       Datastore, DataReference, PipelineData, PipelineParameter, and their markers in f-strings
settings   Resources, Retry, Environment
shell      data inside a shell command, handed over so that no value is ever parsed by the shell
steps      PythonScriptStep, CommandStep, DataTransferStep
mpi        MpiStep
triggers   Cron, Every, OnArrival, OnSuccess
pipeline   Pipeline
lowering   Pipeline -> plain data for `mlpiped.spec.PipelineSpec`
run        Run.get_context(), for the scripts
transfer   the script of DataTransferStep
"""
