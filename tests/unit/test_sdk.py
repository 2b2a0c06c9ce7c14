"""What authors write, and the plain data that comes of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlpiped
from mlpiped import (
    CommandStep,
    Cron,
    DataReference,
    Datastore,
    DataTransferStep,
    DefinitionError,
    Environment,
    Every,
    MpiStep,
    OnArrival,
    OnSuccess,
    Pipeline,
    PipelineData,
    PipelineParameter,
    PythonScriptStep,
    Resources,
    Retry,
)
from mlpiped.keys import StaticParts
from mlpiped.sdk import place, transfer, values
from mlpiped.spec import PipelineSpec, StepSpec
from mlpiped.spec_check import faults_of

HERE = (__file__, 1)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    for name in ("prepare.py", "train.py"):
        (tmp_path / name).write_text("")
    return tmp_path


def spec_of(pipeline: Pipeline) -> PipelineSpec:
    spec = PipelineSpec.model_validate(json.loads(json.dumps(pipeline.to_plain(), allow_nan=False)))
    assert faults_of(spec) == []
    return spec


def step_of(step: CommandStep | PythonScriptStep | DataTransferStep) -> StepSpec:
    return next(one for one in spec_of(Pipeline("p", [step])).steps if one.name == step.name)


def arguments(step: StepSpec) -> list[Any]:
    return [argument.model_dump(exclude={"kind"}) for argument in step.arguments]


# --- import ------------------------------------------------------------------------------------------------
def test_the_import_is_the_standard_library_and_the_sdk_alone() -> None:
    script = "import sys\nfrom mlpiped import *\nprint('\\n'.join(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    foreign = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"mlpiped", "__main__"}
    # An editable install brings a finder of its own; what a console script's site brings is not ours either.
    assert {
        name for name in foreign if not name.startswith(("__editable__", "_distutils_hack", "sitecustomize"))
    } == set()
    ours = {name for name in modules if name.startswith("mlpiped.")}
    assert ours <= {"mlpiped.sdk"} | {name for name in ours if name.startswith("mlpiped.sdk.")}


def test_the_import_alone_loads_nothing_and_a_script_that_logs_loads_one_module() -> None:
    def modules(statement: str) -> set[str]:
        script = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
        printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        return {name for name in printed.split() if name.startswith("mlpiped")}

    assert modules("import mlpiped") == {"mlpiped"}
    assert modules("from mlpiped import Run; Run.get_context()") == {"mlpiped", "mlpiped.sdk", "mlpiped.sdk.run"}


def test_every_name_is_there_and_no_other() -> None:
    for name in mlpiped.__all__:
        assert getattr(mlpiped, name).__name__ == name
    assert not hasattr(mlpiped, "Pipelin")


# --- the contract's example --------------------------------------------------------------------------------
def test_the_example_of_the_contract(code: Path) -> None:
    samples = DataReference(Datastore("lab"), "digits/incoming/*.csv")
    clean, model = PipelineData("clean"), PipelineData("model")
    rate = PipelineParameter("rate", default=0.1)
    prepare = PythonScriptStep(
        "prepare.py", source_directory=code, arguments=["--in", samples, "--out", clean], outputs=[clean]
    )
    train = PythonScriptStep(
        "train.py",
        source_directory=code,
        arguments=[clean, "--rate", rate, "--out", model],
        outputs=[model],
        compute_target="gpu",
        resources=Resources(gpus=1, memory="16G"),
        retry=Retry(attempts=3),
        timeout="2h",
    )
    triggers = [OnArrival(samples, settle="10s"), Cron("0 6 * * mon", timezone="Europe/Warsaw")]
    spec = spec_of(Pipeline("digits", steps=[prepare, train], triggers=triggers))

    assert [step.name for step in spec.steps] == ["prepare", "train"]
    assert spec.experiment == "digits"
    assert [(one.name, one.type, one.default) for one in spec.parameters] == [("rate", "float", 0.1)]
    assert [trigger.kind for trigger in spec.triggers] == ["arrival", "cron"]
    first, second = spec.steps
    assert arguments(first) == [
        {"text": "python"},
        {"text": "prepare.py"},
        {"text": "--in"},
        {"port": "incoming"},
        {"text": "--out"},
        {"port": "clean"},
    ]
    assert first.where.file == __file__
    assert second.where.line > first.where.line
    assert second.kind == "python"
    assert second.source and second.source.directory == str(code)
    assert second.inputs[0].source.model_dump() == {"kind": "upstream", "step": "prepare", "output": "clean"}
    assert (second.resources.gpus, second.resources.memory) == (1, 16 << 30)
    assert (second.retry.attempts, second.timeout, second.compute) == (3, 7200, ("gpu",))


# --- data in arguments -------------------------------------------------------------------------------------
def test_data_and_parameters_inside_texts_become_parts() -> None:
    rate, made = PipelineParameter("rate", default=1), PipelineData("made")
    given = DataReference("lab", "x")
    step = step_of(CommandStep(["run", f"--rate={rate}", f"{given}:{made}/log", f"{rate}", 3, 0.5], outputs=[made]))
    assert arguments(step) == [
        {"text": "run"},
        {"parts": [{"kind": "text", "text": "--rate="}, {"kind": "parameter", "name": "rate"}]},
        {
            "parts": [
                {"kind": "input", "port": "x"},
                {"kind": "text", "text": ":"},
                {"kind": "output", "port": "made"},
                {"kind": "text", "text": "/log"},
            ]
        },
        {"name": "rate"},
        {"text": "3"},
        {"text": "0.5"},
    ]


@given(st.lists(st.one_of(st.text(st.characters(exclude_characters="\0")), st.integers(0, 2)), max_size=6))
def test_what_a_text_is_made_of_comes_back_whatever_lies_between(pieces: list[str | int]) -> None:
    parameters = [PipelineParameter(f"p{n}", default=n) for n in range(3)]
    text = "".join(str(parameters[piece]) if isinstance(piece, int) else piece for piece in pieces)
    step = step_of(CommandStep(["x", text]))
    (argument,) = step.arguments[1:]
    parts = argument.parts if argument.kind == "concat" else (argument,)
    back = "".join(part.name if part.kind == "parameter" else part.text for part in parts)  # type: ignore[union-attr]
    assert back == "".join(f"p{piece}" if isinstance(piece, int) else piece for piece in pieces)


def test_a_marker_or_nul_that_nobody_made_is_an_error() -> None:
    for text in ("\0", "\0x\0", "a\0b"):
        with pytest.raises(DefinitionError, match="holds a NUL"):
            Pipeline("p", [CommandStep(["x", text])]).to_plain()


@pytest.mark.parametrize(
    "use",
    [
        lambda rate: DataReference("lab", f"x/{rate}"),
        lambda rate: PipelineData(f"{rate}"),
        lambda rate: Environment(env={"RATE": f"{rate}"}),
        lambda rate: Cron(f"{rate} * * * *"),
        lambda rate: Pipeline("p", [], description=f"{rate}"),
    ],
)
def test_a_value_of_the_future_is_refused_where_it_cannot_be_known(use: Any) -> None:
    with pytest.raises(DefinitionError, match="cannot hold a data object"):
        use(PipelineParameter("rate", default=1))


def test_a_value_of_the_future_cannot_be_formatted_or_decided_on() -> None:
    rate = PipelineParameter("rate", default=1.0)
    with pytest.raises(DefinitionError, match="cannot format PipelineParameter"):
        f"{rate:.2f}"
    with pytest.raises(DefinitionError, match="has no value yet"):
        bool(rate)


def test_one_thing_is_one_port_and_equal_names_are_told_apart() -> None:
    a, b = DataReference("lab", "one/x"), DataReference("lab", "two/x")
    again = DataReference("lab", "one/x")
    step = step_of(CommandStep(["run", a, b, again, a], inputs=[b, DataReference("lab", "rest", name="extra")]))
    assert [(port.name, port.in_arguments) for port in step.inputs] == [("x", True), ("x_2", True), ("extra", False)]
    assert arguments(step)[1:] == [{"port": "x"}, {"port": "x_2"}, {"port": "x"}, {"port": "x"}]


def test_an_output_named_only_in_outputs_is_no_argument() -> None:
    made = PipelineData("made", kind="folder")
    step = step_of(CommandStep(["run"], outputs=[made]))
    assert (step.outputs[0].name, step.outputs[0].output_kind, step.inputs) == ("made", "folder", ())


def test_publishing_and_paths_of_outputs() -> None:
    plain = PipelineData("model", path="model.pt")
    placed = PipelineData("report", Datastore("lab"), "reports/report.html")
    published = PipelineData("log", "lab").publish("logs/{pipeline}/{run_id}")
    step = step_of(CommandStep(["run"], outputs=[plain, placed, published]))
    assert [(one.file_name, one.datastore, one.publish) for one in step.outputs] == [
        ("model.pt", None, None),
        ("report.html", "lab", "reports/report.html"),
        ("log", "lab", "logs/{pipeline}/{run_id}"),
    ]
    with pytest.raises(DefinitionError, match="names folders, but no datastore"):
        PipelineData("model", path="a/model.pt")
    with pytest.raises(DefinitionError, match="no datastore to publish"):
        PipelineData("model").publish("x")


# --- the shell ---------------------------------------------------------------------------------------------
SHELL = [
    ("cat {x} > out", 'cat "${1}" > out'),
    ("cat '{x}'", "cat ''\"${1}\"''"),
    ('cat "a {x} b"', 'cat "a ${1} b"'),
    ("echo \"$(cat '{x}')\"", "echo \"$(cat ''\"${1}\"'')\""),
    ('echo "$(cat {x})" {x}', 'echo "$(cat "${1}")" "${1}"'),
    ("echo it\\'s {x}", 'echo it\\\'s "${1}"'),
    ("echo a # don't\necho {x}", 'echo a # don\'t\necho "${1}"'),
    ("(cd /; echo {x})", '(cd /; echo "${1}")'),
    ("echo a#'b' {x}", "echo a#'b' \"${1}\""),
]


@pytest.mark.parametrize(("written", "made"), SHELL)
def test_a_value_in_a_shell_command_is_handed_over_and_never_parsed(written: str, made: str) -> None:
    x = PipelineParameter("x", default="")
    step = step_of(CommandStep(written.format(x=x), name="s"))
    assert not step.shell
    assert arguments(step) == [{"text": "/bin/sh"}, {"text": "-c"}, {"text": made}, {"text": "sh"}, {"name": "x"}]


@pytest.mark.parametrize("written", [one[0] for one in SHELL if "> out" not in one[0] and "cat" not in one[0]])
def test_the_shell_prints_the_value_as_it_is(written: str) -> None:
    nasty = 'a  b\'; echo "$(id)" `id` $HOME \\ *'
    step = step_of(CommandStep(written.format(x=PipelineParameter("x", default="")), name="s"))
    argv = [one.text if one.kind == "text" else nasty for one in step.arguments]  # type: ignore[union-attr]
    assert nasty in subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("cat <<EOF\n{x}\nEOF", "here-document"),
        ("echo a # {x}", "comment"),
        ("echo \\{x}", "backslash"),
        ("echo `cat {x}`", "backquotes"),
    ],
)
def test_a_value_where_the_shell_cannot_take_it_is_an_error(written: str, problem: str) -> None:
    step = CommandStep(written.format(x=PipelineParameter("x", default="")), name="s")
    with pytest.raises(DefinitionError, match=problem):
        Pipeline("p", [step]).to_plain()


def test_a_shell_command_without_data_stays_one_text_and_a_glob_in_one_is_an_error() -> None:
    step = step_of(CommandStep("sort /etc/passwd | head"))
    assert (step.name, step.shell, arguments(step)) == ("sort", True, [{"text": "sort /etc/passwd | head"}])
    with pytest.raises(DefinitionError, match="may be many paths"):
        Pipeline("p", [CommandStep(f"cat {DataReference('lab', '*.csv')}")]).to_plain()


# --- the graph ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("launcher", "nodes", "start", "cluster"),
    [
        ("srun", 2, ["srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1", "--export=ALL",
                     "python", "train.py"], True),
        ("srun", 1, ["srun", "--nodes=1", "--ntasks=4", "--ntasks-per-node=4", "--kill-on-bad-exit=1", "--export=ALL",
                     "python", "train.py"], True),
        ("torchrun", 1, ["torchrun", "--standalone", "--nproc-per-node=4", "train.py"], False),
        ("mpirun", 1, ["mpirun", "-n", "4", "python", "train.py"], False),
    ],
)  # fmt: skip
def test_an_mpi_step_is_a_command_that_begins_with_what_starts_its_processes(
    code: Path, launcher: Any, nodes: int, start: list[str], cluster: bool
) -> None:
    made = PipelineData("made")
    step = step_of(
        MpiStep("train.py", source_directory=str(code), arguments=["--out", made], outputs=[made], node_count=nodes,
                process_count_per_node=4, launcher=launcher, resources=Resources(cpus=2))
    )  # fmt: skip
    texts = [one["text"] for one in arguments(step)[:-1]]
    assert texts == [*start, "--out"] and arguments(step)[-1] == {"port": "made"}
    needed = step.resources
    assert (needed.nodes, needed.tasks, needed.cluster, needed.cpus) == (nodes, 4, cluster, 2)
    assert step.kind == "python" and step.source is not None and step.source.script == "train.py"


def test_torchrun_over_nodes_is_started_once_on_each_by_srun(code: Path) -> None:
    step = step_of(
        MpiStep("train.py", source_directory=str(code), node_count=2, process_count_per_node=4, launcher="torchrun")
    )
    words = [one["text"] for one in arguments(step)]
    assert words[:2] == ["/bin/sh", "-c"] and words[3:] == ["torchrun", "2", "4", "train.py"]
    assert "exec srun" in words[2] and "--rdzv-endpoint" in words[2] and step.resources.cluster


def test_the_number_of_processes_is_a_part_of_a_step_s_identity(code: Path) -> None:
    def key(nodes: int, processes: int) -> str:
        step = MpiStep("train.py", source_directory=str(code), node_count=nodes, process_count_per_node=processes)
        return StaticParts(step_of(step)).key("code", {}, {})

    assert len({key(1, 4), key(2, 2), key(2, 4), key(1, 4)}) == 3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"node_count": 0}, "node_count must be at least 1: 0"),
        ({"process_count_per_node": 1.5}, "process_count_per_node must be a whole number, not 1.5"),
        ({"node_count": 10**6}, "node_count must be at most 10000: 1000000"),
        ({"launcher": "ssh"}, "launcher is 'ssh'"),
        ({"launcher": "mpirun", "node_count": 2}, "mpirun starts processes on one machine, and node_count is 2"),
    ],
)
def test_a_fault_of_an_mpi_step_is_told_with_its_line(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=re.escape(words)) as caught:
        MpiStep("train.py", **wrong)
    assert caught.value.where == (__file__, caught.traceback[0].lineno + 1)


def test_a_step_that_needs_a_cluster_and_may_only_go_elsewhere_is_a_fault_of_its_line(code: Path) -> None:
    def faults(clusters: set[str], **more: Any) -> list[str]:
        step = MpiStep("train.py", source_directory=str(code), **more)
        spec = PipelineSpec.model_validate(Pipeline("p", [step]).to_plain())
        return [f"{one.line == step.where[1]} {one.message}; {one.hint}" for one in faults_of(spec, clusters=clusters)]

    assert faults({"hpc"}, compute_target=["local", "hpc"], node_count=2) == faults({"hpc"}) == []
    assert faults(set(), compute_target="local", launcher="torchrun") == []
    (contained,) = faults({"hpc"}, environment=Environment(image="app:1"))
    assert contained.startswith("True step `train` is started by srun, which its container does not have; ")
    assert faults({"hpc"}, compute_target="local", node_count=2) == [
        "True step `train` needs 2 nodes, and `local` is no cluster; `hpc` can start it"
    ]
    assert faults(set()) == [
        'True step `train` is started by srun, and the config has no cluster; add a compute with `kind = "slurm"`'
    ]


def test_steps_that_are_reached_belong_to_the_pipeline_in_running_order() -> None:
    a, b = PipelineData("a"), PipelineData("b")
    start = CommandStep(["start"])
    first = CommandStep(["first", a], outputs=[a], after=start)
    second = CommandStep(["second", a, b], outputs=[b])
    last = CommandStep(["last", b])
    spec = spec_of(Pipeline("p", [last]))
    assert [step.name for step in spec.steps] == ["start", "first", "second", "last"]
    assert spec.steps[1].after == ("start",)
    assert {first, second}


def test_of_several_makers_the_listed_one_counts() -> None:
    data = PipelineData("x")
    one, two = CommandStep(["one"], outputs=[data]), CommandStep(["two"], outputs=[data])
    use = CommandStep(["use", data])
    assert [step.name for step in spec_of(Pipeline("p", [use, two])).steps] == ["two", "use"]
    with pytest.raises(DefinitionError, match=r"is made by two steps: `one` \(test_sdk.py:\d+\) and `two`"):
        Pipeline("p", [one, two]).to_plain()
    with pytest.raises(DefinitionError, match="which several steps make"):
        Pipeline("p", [use]).to_plain()
    with pytest.raises(DefinitionError, match="takes `nobodys`, which no step makes"):
        Pipeline("p", [CommandStep(["use", PipelineData("nobodys")])]).to_plain()


def test_names_come_from_script_and_command_and_must_differ(code: Path) -> None:
    assert PythonScriptStep("sub/my train.v2.py").name == "my_train.v2"
    assert CommandStep(["/usr/bin/rsync", "-a"]).name == "rsync"
    assert CommandStep(f"{PipelineParameter('tool', default='x')} --help").name == "command"
    twice = [PythonScriptStep("train.py", source_directory=code) for _ in range(2)]
    with pytest.raises(DefinitionError) as caught:
        Pipeline("p", twice).to_plain()
    first, second = (step.where[1] for step in twice)
    assert caught.value.message == f"two steps are named `train`: test_sdk.py:{first} and test_sdk.py:{second}"


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    steps = [PythonScriptStep("a.py", source_directory=tmp_path), PythonScriptStep("b.py", source_directory="gone")]
    with pytest.raises(DefinitionError) as caught:
        Pipeline("p", steps).to_plain()
    messages = [caught.value.message, *(one.message for one in caught.value.more)]
    gone = Path(__file__).parent / "gone"
    assert messages == [f"no such script: `{tmp_path / 'a.py'}`", f"no such folder: `{gone}`"]
    assert caught.value.where == (__file__, steps[0].where[1])


def test_cycles_pass_the_sdk_and_are_named_by_the_check() -> None:
    a, b = PipelineData("a"), PipelineData("b")
    CommandStep(["one", b], outputs=[a])
    two = CommandStep(["two", a], outputs=[b])
    spec = PipelineSpec.model_validate(Pipeline("p", [two]).to_plain())
    assert [fault.message for fault in faults_of(spec)] == ["steps wait for each other: two -> one -> two"]


# --- parameters --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({"default": True}, ("bool", True, False)),
        ({"default": 1}, ("int", 1, False)),
        ({"default": 1, "type": float}, ("float", 1.0, False)),
        ({"default": ""}, ("str", "", False)),
        ({"default": None, "type": str}, ("str", None, False)),
        ({"type": "int"}, ("int", None, True)),
    ],
)
def test_a_parameter_is_typed_by_its_default(arguments: dict[str, Any], plain: tuple[Any, ...]) -> None:
    made = PipelineParameter("x", **arguments).plain()
    assert (made["type"], made["default"], made["required"]) == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither a default nor a type|has type"),
        ({"default": None}, "neither a default nor a type"),
        ({"default": []}, "has type 'list'"),
        ({"default": True, "type": int}, "is no int: True"),
        ({"default": 1.5, "type": int}, "is no int: 1.5"),
        ({"default": float("nan")}, "not a finite number"),
        ({"default": "a", "choices": ["b"]}, "none of its choices"),
        ({"default": 1, "choices": [1, "b"]}, "a choice of parameter `x` is no int: 'b'"),
    ],
)
def test_a_parameter_of_no_clear_type_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        PipelineParameter("x", **arguments)


def test_parameters_are_declared_by_use_once() -> None:
    env, told, path = (PipelineParameter(name, default="") for name in ("env", "told", "path"))
    step = CommandStep(["x", told], params=[env])
    trigger = OnArrival(DataReference("lab", "in"), batch="file", parameter=path)
    spec = spec_of(Pipeline("p", [step], triggers=trigger, parameters=[PipelineParameter("more", default=1)]))
    assert [parameter.name for parameter in spec.parameters] == ["more", "told", "env", "path"]
    assert spec.steps[0].parameters == ("env",)
    other = CommandStep(["y", PipelineParameter("told", default="other")])
    with pytest.raises(DefinitionError, match="parameter `told` has two definitions"):
        Pipeline("p", [step, other]).to_plain()


# --- values ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("form", "seconds"),
    [
        ("10s", 10),
        ("2h", 7200),
        ("1d12h", 129600),
        ("1h 30m", 5400),
        ("500ms", 0.5),
        ("90", 90),
        (1.5, 1.5),
        ("1w", 604800),
    ],
)
def test_durations(form: str | float, seconds: float) -> None:
    assert values.seconds(form, "x", HERE) == seconds


@pytest.mark.parametrize("form", ["", "h", -1, "2x", "1h-30m", "1..5s", None, True, float("inf"), "nan", [], "2 hours"])
def test_what_is_no_duration(form: object) -> None:
    with pytest.raises(DefinitionError):
        values.seconds(form, "x", HERE)


@pytest.mark.parametrize(
    ("form", "size"),
    [("16G", 16 << 30), ("512M", 512 << 20), ("1GiB", 1 << 30), ("1.5k", 1536), (7, 7), ("2TB", 2 << 40)],
)
def test_sizes(form: str | int, size: int) -> None:
    assert values.size(form, "x", HERE) == size


@pytest.mark.parametrize("form", ["", "G", "1X", "-1G", 0, 1.5, True, "inf", "nan", "1e999G"])
def test_what_is_no_size(form: object) -> None:
    with pytest.raises(DefinitionError):
        values.size(form, "x", HERE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CommandStep([]), "the command is empty"),
        (lambda: CommandStep("  "), "the command is empty"),
        (lambda: CommandStep(["x", None]), "arguments cannot hold None"),  # type: ignore[list-item]
        (lambda: CommandStep(["x", True]), "arguments cannot hold True"),
        (lambda: CommandStep(["x"], outputs=["y"]), "outputs cannot hold 'y'"),  # type: ignore[list-item]
        (lambda: CommandStep(["x"], outputs="y"), "outputs must be a list"),  # type: ignore[arg-type]
        (lambda: CommandStep(["x"], name="../x"), "not a name: '../x'"),
        (lambda: CommandStep(["x"], timeout="soon"), "timeout is not a duration"),
        (lambda: CommandStep(["x"], retry=0), "attempts must be at least 1"),
        (lambda: CommandStep(["x"], retry="3"), r"retry must be `Retry\(…\)`, not str: '3'"),  # type: ignore[arg-type]
        (lambda: CommandStep(["x"], resources={"gpus": 1}), r"resources must be `Resources\(…\)`, not dict"),  # type: ignore[arg-type]
        (lambda: CommandStep(["x"], environment=["a"]), r"environment must be `Environment\(…\)`, not list"),  # type: ignore[arg-type]
        (lambda: PythonScriptStep("../x.py"), "the script lies outside"),
        (lambda: PythonScriptStep("/x.py"), "the script lies outside"),
        (lambda: PythonScriptStep("x.py", arguments="--help"), "arguments must be a list"),
        (lambda: PythonScriptStep("x.py", code="all"), "code is 'all'"),  # type: ignore[arg-type]
        (lambda: PipelineData("x", kind="dir"), "kind of `x` is 'dir'"),  # type: ignore[arg-type]
        (lambda: Pipeline("p", [], overlap="wait"), "overlap is 'wait'"),  # type: ignore[arg-type]
        (lambda: Pipeline("p", [1]), "steps cannot hold 1"),  # type: ignore[list-item]
        (lambda: Pipeline("p", []).to_plain(), "pipeline `p` has no steps"),
        (lambda: Environment(env={"A B": "x"}), "not the name of an environment variable"),
        (lambda: Environment(env={"MLPIPED_TOKEN": "x"}), "set by mlpiped itself"),
        (lambda: Environment(python="3"), "not a version of Python"),
        (lambda: Environment(modules="cuda/12"), "modules is not a list"),
        (lambda: Environment(modules=["cuda 12"]), "not the name of a module: 'cuda 12'"),
        (lambda: Environment(modules=["-f"]), "not the name of a module"),
        (lambda: Environment(modules=[12]), "not the name of a module"),  # type: ignore[list-item]
        (lambda: Environment(modules=["a"], image="b"), "a container's image"),
        (lambda: Environment(image=""), "image is empty"),
        (lambda: Environment(image="a b"), "not the name of an image: 'a b'"),
        (lambda: Environment(image="--privileged"), "not the name of an image"),
        (lambda: Environment(image=3), "image must be a string"),  # type: ignore[arg-type]
        (lambda: Environment(dockerfile="gone"), "the Dockerfile does not exist"),
        (lambda: Environment(image="a", dockerfile="b"), "of one kind: `image=` and `dockerfile=`"),
        (lambda: Environment(image="a", requirements="b"), "of one kind: `image=` and `requirements=`"),
        (lambda: Environment(dockerfile="a", requirements="b"), "of one kind: `dockerfile=` and `requirements=`"),
        (lambda: Environment(image="a", python="3.11"), "`python=` beside `image=`"),
        (lambda: Resources(gpus=-1), "gpus must be at least 0"),
        (lambda: Resources(gpu_memory="8G"), "gpu_memory is of a card, and gpus is 0"),
        (lambda: Resources(gpus=1, gpu_memory="8Q"), "gpu_memory is not a size"),
        (lambda: Resources(shm_size=0), "shm_size must be at least 1"),
        (lambda: Resources(network="yes"), "network must be True or False"),  # type: ignore[arg-type]
        (lambda: Environment(requirements="gone.txt"), "the requirements file does not exist"),
        (lambda: Every("0.5s"), "the interval must be at least 1"),
        (lambda: Every("1h", start="2026-01-01T00:00:00"), "start has no UTC offset"),
        (lambda: Cron("@daily", start="soon"), "start is not a time"),
        (lambda: Cron("@daily", start="2026-01-01", timezone="Mars"), "no time zone named `Mars`"),
        (lambda: Cron("@daily", catch_up="some"), "catch_up is 'some'"),  # type: ignore[arg-type]
        (lambda: OnArrival("x"), "OnArrival waits for 'x'"),  # type: ignore[arg-type]
        (lambda: OnArrival(DataReference("lab", "x"), parameter="p"), "takes the path of one file"),
        (lambda: OnSuccess(""), "the name of a pipeline is empty"),
    ],
)
def test_a_wrong_value_is_an_error_at_the_authors_line(make: Any, message: str) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        make()
    assert caught.value.where == (__file__, make.__code__.co_firstlineno)


def test_times_without_an_offset_are_local_to_the_cron_expression() -> None:
    plain = Cron("0 6 * * *", timezone="Europe/Warsaw", start="2026-07-01", end="2026-12-01T00:00:00Z").plain()
    assert (plain["start"], plain["end"]) == ("2026-07-01T00:00:00+02:00", "2026-12-01T00:00:00+00:00")


# --- environments ------------------------------------------------------------------------------------------
def test_requirements_are_one_text_with_their_includes(tmp_path: Path) -> None:
    (tmp_path / "base.txt").write_text("numpy==2.0\n")
    (tmp_path / "all.txt").write_text("-r base.txt\npandas  # of the lab\n")
    made = Environment(requirements=str(tmp_path / "all.txt"), python="3.11", env={"A": "1"})
    text = "numpy==2.0\npandas  # of the lab"
    none = {"image": None, "dockerfile": None, "modules": []}
    assert made.plain() == {"requirements": text, "python": "3.11", "env": {"A": "1"}} | none
    for line in ("-e .", "-c x.txt", "./local", "-r all.txt"):
        (tmp_path / "base.txt").write_text(f"\n{line}\n")
        with pytest.raises(DefinitionError) as caught:
            Environment(requirements=str(tmp_path / "all.txt"))
        assert caught.value.where[0] in (str(tmp_path / "base.txt"), str(tmp_path / "all.txt"))


def test_an_image_and_the_text_of_a_dockerfile_reach_the_spec(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:3.11\nRUN pip install numpy\n")
    made = Environment(dockerfile=str(tmp_path / "Dockerfile"), env={"A": "1"})
    found = step_of(CommandStep(["true"], environment=made)).environment
    assert (found.dockerfile, found.image, found.env) == ("FROM python:3.11\nRUN pip install numpy\n", None, {"A": "1"})
    resources = Resources(gpus=2, gpu_memory="8G", shm_size="1G", network=True)
    step = step_of(CommandStep(["true"], environment=Environment(image="app@sha256:1"), resources=resources))
    assert step.environment.image == "app@sha256:1"
    r = step.resources
    assert (r.gpus, r.gpu_memory, r.shm_size, r.network) == (2, 8 << 30, 1 << 30, True)
    (tmp_path / "Dockerfile").write_text("\n")
    with pytest.raises(DefinitionError, match="the Dockerfile is empty") as caught:
        Environment(dockerfile=str(tmp_path / "Dockerfile"))
    assert caught.value.where == (str(tmp_path / "Dockerfile"), 1)


def test_a_dockerfile_is_a_file_of_the_plugin_that_is_looked_at_again(tmp_path: Path) -> None:
    before = set(place.reads)
    (tmp_path / "Dockerfile").write_text("FROM a")
    Environment(dockerfile=str(tmp_path / "Dockerfile"))
    assert place.reads - before == {str(tmp_path / "Dockerfile")}


# --- transfer ----------------------------------------------------------------------------------------------
def test_a_transfer_is_a_script_of_ours_that_publishes_its_output() -> None:
    step = step_of(DataTransferStep(DataReference("lab", "in/*.csv"), DataReference("archive", "2026/in")))
    assert (step.kind, step.name) == ("transfer", "transfer")
    assert arguments(step) == [
        {"text": "python"},
        {"text": "transfer.py"},
        {"text": "--folder"},
        {"port": "in"},
        {"port": "in"},
    ]
    (output,) = step.outputs
    assert (output.output_kind, output.file_name, output.datastore, output.publish) == (
        "folder",
        "in",
        "archive",
        "2026/in",
    )
    assert step.source and (Path(step.source.directory) / "transfer.py").is_file()

    made = PipelineData("copy")
    chained = DataTransferStep(DataReference("lab", "x.csv"), made)
    assert chained.get_output() is made
    assert [one.name for one in spec_of(Pipeline("p", [CommandStep(["cat", made])])).steps] == ["transfer", "cat"]


def test_the_transfer_copies_files_and_folders(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.csv").write_text("a")
    (source / "deep" / "a.csv").write_text("b")
    assert transfer.main(["--file", str(source / "a.csv"), str(tmp_path / "new" / "b.csv")]) == 0
    assert (tmp_path / "new" / "b.csv").read_text() == "a"
    assert transfer.main(["--folder", str(source), str(tmp_path / "all")]) == 0
    assert (tmp_path / "all" / "deep" / "a.csv").read_text() == "b"
    both = [str(source / "a.csv"), str(source / "deep" / "a.csv")]
    assert transfer.main(["--folder", *both, str(tmp_path / "some")]) == 0
    assert (tmp_path / "some" / "deep" / "a.csv").read_text() == "b"
    assert transfer.main(["--folder", both[0], str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "a.csv").read_text() == "a"

    assert transfer.main(["--file", str(source), str(tmp_path / "x")]) == 1
    assert transfer.main(["--file", str(tmp_path / "gone"), str(tmp_path / "x")]) == 1
    (source / "out").symlink_to("/etc/passwd")
    assert transfer.main(["--folder", str(source), str(tmp_path / "y")]) == 1
    assert "leads out of" in capfd.readouterr().err


# --- in the script -----------------------------------------------------------------------------------------
SCRIPT = """
from mlpiped import Run
run = Run.get_context()
assert run is Run.get_context()
class Scalar:
    def item(self): return 0.5
run.log("accuracy", 0.97, step=3)
run.log("loss", float("nan"))
run.log("scalar", Scalar())
run.log_table("confusion", {"a": [1, 2], "b": [Scalar(), None]})
run.log_image("roc", __file__)
for done in range(1, 1001): run.progress(done, 1000)
run.set_tag("kind", 3)
print(run.parameters)
"""


def run_script(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True)


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    metrics, parameters = tmp_path / "metrics.jsonl", tmp_path / "params.json"
    parameters.write_text('{"rate": 0.1}')
    done = run_script(tmp_path, MLPIPED_METRICS=str(metrics), MLPIPED_PARAMS=str(parameters))
    assert done.stdout == "{'rate': 0.1}\n"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(line.pop("time") > 1e9 for line in lines)
    progress = [line for line in lines if line["kind"] == "progress"]
    assert progress[-1] == {"kind": "progress", "done": 1000, "total": 1000}
    assert len(progress) < 100
    assert [line for line in lines if line["kind"] != "progress"] == [
        {"kind": "metric", "name": "accuracy", "value": 0.97, "step": 3},
        {"kind": "metric", "name": "loss", "value": "NaN"},
        {"kind": "metric", "name": "scalar", "value": 0.5},
        {"kind": "table", "name": "confusion", "value": {"a": [1, 2], "b": [0.5, None]}},
        {"kind": "image", "name": "roc", "path": str(tmp_path / "script.py")},
        {"kind": "tag", "name": "kind", "value": "3"},
    ]


def test_without_the_daemon_the_same_script_prints(tmp_path: Path) -> None:
    done = run_script(tmp_path)
    assert "accuracy = 0.97 (step 3)\n" in done.stdout
    assert "progress: 1000 of 1000\n" in done.stdout
    assert done.stderr == ""


def test_metrics_that_cannot_be_written_do_not_stop_the_script(tmp_path: Path) -> None:
    done = run_script(tmp_path, MLPIPED_METRICS="/gone/metrics.jsonl")
    assert done.stderr.count("metrics cannot be written") == 1


def test_a_step_may_wait_for_one_that_is_made_later() -> None:
    first, second = CommandStep(["first"]), CommandStep(["second"])
    first.run_after(second)
    assert [step.name for step in spec_of(Pipeline("p", [first])).steps] == ["second", "first"]
