"""What Slurm says, read strictly; and what it means together with what a job's folder says."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mlpiped.backends.base import Exited, Job, Lost, NeverRan, NodesAway
from mlpiped.backends.slurm import SlurmBackend, arrays, commands, verdict
from mlpiped.backends.slurm.commands import Listed
from mlpiped.backends.slurm.files import SharedFiles
from mlpiped.backends.slurm.queue import Queue
from mlpiped.backends.slurm.submission import Look
from mlpiped.config.computes import SlurmCompute
from mlpiped.errors import BackendUnavailable
from mlpiped.placement.decide import Need, Place

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlpiped.backends.slurm.runner import Answer, Stdin

OURS = "77|RUNNING|mlp-t-1|None"
PATIENCE = 90.0


def test_J5_a_line_is_ours_whole_or_not_at_all() -> None:
    assert commands.listed(OURS + "\n") == {77: Listed(77, "t-1", "RUNNING", "None")}
    for wrong in (
        f" {OURS}", f"{OURS}|", "77|RUNNING|other|None", "77|RUNNING|mlp-../x|None", "77|RUNNING|mlp-|None",
        "77|running|mlp-t-1|None", "|RUNNING|mlp-t-1|None", "٧٧|RUNNING|mlp-t-1|None", "77|RUNNING|mlp-T|None",
        "77|RUNNING|mlp-t-1", "7" * 11 + "|RUNNING|mlp-t-1|None",
    ):  # fmt: skip
        assert commands.listed(wrong) == {}, wrong


def test_J5_two_lines_that_contradict_each_other_are_no_answer() -> None:
    assert commands.listed(f"{OURS}\n77|FAILED|mlp-t-1|None\n78|PENDING|mlp-t-2|Priority") == {
        78: Listed(78, "t-2", "PENDING", "Priority")
    }
    assert 77 in commands.listed(f"{OURS}\n{OURS}")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet=st.sampled_from("0179|mlp-t_ \n\r\x0b\x1c\u2028ABRUNIG.é"), max_size=60), max_size=5))
def test_J5_names_of_others_neither_break_the_reading_nor_change_what_is_ours(names: list[str]) -> None:
    text = "\n".join([OURS, *(f"{100 + i}|PENDING|x{name}|Priority" for i, name in enumerate(names))])
    found = commands.listed(text)
    ours = found.get(77)
    assert ours == Listed(77, "t-1", "RUNNING", "None") or any("77|" in name for name in names)
    assert all(one.name for job, one in found.items())


@pytest.mark.parametrize("job", ["12_3", "12_[1-3]", "12+0", "12_*"])
def test_J6_elements_of_others_arrays_and_parts_of_het_jobs_are_not_ours(job: str) -> None:
    assert commands.listed(f"{job}|RUNNING|mlp-t-1|None") == {}
    assert commands.submitted(f"{job}\n") is None


def test_J6_an_element_is_known_by_its_array_s_name_and_its_index() -> None:
    name = "mlpa-0123456789abcdef"
    said = (
        f"12_3|RUNNING|{name}|None\n12_4|PENDING|{name}|Priority\n13_4|PENDING|mlpa-0|None\n14|CANCELLED|{name}|None\n"
    )
    assert commands.listed(said + f"12_[5-9]|PENDING|{name}|None") == {
        "12_3": Listed("12_3", "0123456789abcdef/3", "RUNNING", "None"),
        "12_4": Listed("12_4", "0123456789abcdef/4", "PENDING", "Priority"),
        "14": Listed("14", "0123456789abcdef", "CANCELLED", "None"),
    }


def test_J6_elements_that_were_cancelled_together_are_one_record_of_accounting() -> None:
    said = "12_[0-2,7%3]|CANCELLED by 0\n12_5|COMPLETED\n13_[0-9]|PENDING\n14_[-,x]|CANCELLED\n12_[1-2...|CANCELLED\n"
    cancelled = {f"12_{index}": "CANCELLED" for index in (0, 1, 2, 7)}
    assert commands.accounted(said) == {**cancelled, "12_5": "COMPLETED"}


def test_J6_an_element_that_waits_is_never_named_to_a_scancel_with_a_filter() -> None:
    """It would end the whole array, as long as that is one record."""
    assert commands.scancel_elements(["12_3", "12_4"]) == ["scancel", "12_3", "12_4"]


def test_J2_the_script_of_an_array_finds_each_element_s_own_token(tmp_path: Path) -> None:
    single = b'#!/bin/sh\ntoken=t-0\necho "$token" here\n'
    text = arrays.script(single, ["t-0", "t-1", "t-2"])
    for index, said in (("0", b"t-0 here\n"), ("1", b"t-1 here\n"), ("2", b"t-2 here\n"), ("3", b""), ("", b"")):
        done = subprocess.run(["sh"], input=text, env={"SLURM_ARRAY_TASK_ID": index}, capture_output=True)
        assert (done.returncode == 0, done.stdout) == (said != b"", said), done


@pytest.mark.anyio
async def test_which_element_is_whose_is_known_to_the_next_daemon_and_forgotten_with_the_folders(
    tmp_path: Path,
) -> None:
    def files() -> SharedFiles:
        return SharedFiles("cluster", tmp_path, SlurmCompute(kind="slurm"), "python3")

    array = "fedcba9876543210"
    await files().enlist(array, ["t-0", "t-1"])
    lists, mine, other = arrays.Lists(files()), f"mlpa-{array}", "mlpa-0123456789abcdef"
    said = f"5_0|PENDING|{mine}|None\n5_1|CANCELLED|{mine}|None\n5_2|PENDING|{mine}|None\n6|PENDING|mlp-t-1|None\n"
    listing = commands.listed(f"{said}7_0|PENDING|{other}|None\n")
    assert await lists.tokens(listing.values()) == {"5_0": "t-0", "5_1": "t-1", 6: "t-1"}
    alive = await lists.by_token(listing)
    assert {token: [one.job for one in some] for token, some in alive.items()} == {"t-0": ["5_0"], "t-1": [6]}
    place = tmp_path / "slurm" / "arrays" / array
    os.utime(place, (0, 0))
    (tmp_path / "jobs" / "t-1").mkdir(parents=True)
    await files().start()
    assert place.exists()
    (tmp_path / "jobs" / "t-1").rmdir()
    await files().start()
    assert not place.exists()


@pytest.mark.parametrize(("said", "job"), [("12\n", 12), ("12;lab\n", 12), ("", None), ("12 13", None), ("a12", None)])
def test_the_id_of_a_submission(said: str, job: int | None) -> None:
    assert commands.submitted(said) == job


def test_what_has_ended_says_whether_it_was_given_a_node() -> None:
    text = "7|CANCELLED|mlp-a|None|n1\n8|CANCELLED|mlp-b|Priority|n/a\n9|RUNNING|mlp-c|None|n1\n10|FAILED|mlp-d|None|"
    reasons = {job: one.reason for job, one in commands.listed(text).items()}
    assert reasons == {7: commands.ON_NODE, 8: "Priority", 9: "None"}


def test_accounting_is_asked_for_ends_alone() -> None:
    said = "7|CANCELLED by 0\n8|RUNNING\n9|COMPLETED\n9|NODE_FAIL\n10.batch|COMPLETED\nx\n"
    assert commands.accounted(said) == {7: "CANCELLED", 9: "NODE_FAIL"}


def test_a_config_without_what_every_slurm_has_is_no_answer() -> None:
    assert commands.config("Slurmctld(primary) at vm is DOWN\n") is None
    found = commands.config("MinJobAge               = 300 sec\nAccountingStorageType   = accounting_storage/none\n")
    assert found is not None and commands.seconds(found["MinJobAge"]) == 300


def test_nodes_that_do_not_answer_are_not_up() -> None:
    said = (
        "2|idle|gpu:a100:4\n1|mixed|(null)\n3|idle*|gpu:2(S:0-1)\n1|drained|gpu:1,shard:8\n1|down|(null)\n1|mixed-|x\n"
    )
    assert commands.nodes(said) == commands.Nodes(up=4, down=5, gpus=15)


def test_nodes_that_are_away_are_named_with_the_reason_that_somebody_gave() -> None:
    said = (
        "n[1-2,7]|drained|bad disk | see ticket\nn3|idle|none\nn4|down*|Not responding\nn5|mixed*|none\n"
        "n6|draining|\x1b[31mred\nnonsense\nn8|allocated|kept\n"
    )
    assert commands.away(said) == (
        NodesAway("n[1-2,7]", "drained", "bad disk | see ticket"),
        NodesAway("n4", "down*", "Not responding"),
        NodesAway("n5", "mixed*", ""),
        NodesAway("n6", "draining", "?[31mred"),
    )


def test_what_a_full_queue_says_is_not_what_an_impossible_job_is_told() -> None:
    policy = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, …)"
    full = f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{policy}"
    assert commands.is_full(full) and not commands.is_never(full)
    assert commands.full_words(full) == "QOSMaxSubmitJobPerUserLimit"
    never = f"sbatch: error: QOSMaxCpuPerJobLimit\n{policy}"
    assert commands.is_never(never) and not commands.is_full(never)
    down = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    assert not commands.is_never(down) and not commands.is_full(down)
    assert (
        commands.complaint(down) == "Batch job submission failed: Unable to contact slurm controller (connect failure)"
    )


def test_an_sbatch_that_asks_a_full_controller_again_and_again_has_an_end() -> None:
    assert commands.patience({"MessageTimeout": "10 sec"}) == 25
    assert commands.patience(None) == 60
    said = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"
    assert commands.is_full(said) and not commands.is_never(said)


def test_several_processes_on_several_nodes_become_options() -> None:
    job = Job(token="t-1", arguments=(), nodes=2, tasks=4, cpus=1.5)
    argv = commands.sbatch(job, "/jobs/t-1", SlurmCompute(kind="slurm"), "mlpiped:x")
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=2"} <= set(argv)


def test_resources_become_options() -> None:
    compute = SlurmCompute(kind="slurm", partition="long", account="ml", qos="high", time="2h", options=("--nice=5",))
    job = Job(token="t-1", arguments=(), cpus=1.5, memory=1 << 30, gpus=("a", "b"))
    argv = commands.sbatch(job, "/jobs/t-1", compute, "mlpiped:x")
    for option in (
        "--cpus-per-task=2", "--mem=1056M", "--gres=gpu:2", "--time=120", "--partition=long", "--account=ml",
        "--qos=high", "--nice=5", "--job-name=mlp-t-1", "--hold", "--no-requeue",
    ):  # fmt: skip
        assert option in argv, (option, argv)
    limited = commands.sbatch(Job("t-1", (), timeout=90, grace=10), "/jobs/t-1", compute, "x")
    assert "--time=3" in limited


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("options", ["--array=1-9"], "sets `--array`, which mlpiped sets itself"),
        ("options", ["--constraint a100"], "is not an option of sbatch"),
        ("options", ["-p", "x"], "is not an option of sbatch"),
        ("partition", "a b", "is not a name that Slurm knows"),
        ("partition", "--wrap", "is not a name that Slurm knows"),
    ],
)
def test_J6_a_config_cannot_make_arrays_or_other_commands(key: str, value: object, words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        SlurmCompute.model_validate({"kind": "slurm", key: value})
    assert SlurmCompute(kind="slurm", options=("--constraint=a100|h100",)).options


# --- verdicts
def look(**facts: Any) -> Look:
    """Of a job that has been claimed; `witness` is what exit.json tells."""
    return Look(
        **{
            "witness": None,
            "claimed": True,
            "fenced": False,
            "cancelled": False,
            "held": False,
            "complaint": "",
            **facts,
        }
    )


def judge(look: Look, state: str | None, waited: float = PATIENCE, reason: str = "") -> verdict.Verdict:
    return verdict.judge(look, 77, state, reason, waited, PATIENCE)


TERMINATED = Exited(code=None, signal=15, cancelled=True)
KILLED = Exited(code=None, signal=9)


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param({}, id="claimed"),
        pytest.param({"claimed": False, "fenced": True}, id="fenced"),
        pytest.param({"witness": Exited(code=None, signal=15, cancelled=True)}, id="told to stop"),
        pytest.param({"witness": Exited(code=None, signal=9)}, id="killed"),
    ],
)
def test_J7_what_we_took_out_of_the_queue_ourselves_was_cancelled_by_nobody_else(facts: dict[str, Any]) -> None:
    before = judge(look(**facts), "PENDING")
    assert isinstance(before, Lost | NeverRan)
    assert judge(look(**facts, dropped=True), "CANCELLED") == before  # the next daemon says so too


@pytest.mark.parametrize("state", ["", "PENDING", "RUNNING", "COMPLETED", "NODE_FAIL", "PREEMPTED", None])
def test_a_witness_of_an_end_of_its_own_needs_no_word_of_slurm(state: str | None) -> None:
    for said in (Exited(0), Exited(3), Exited(None, signal=11), Exited(None, signal=9, timed_out=True)):
        assert judge(look(witness=said), state, 0) == said


@pytest.mark.parametrize("state", ["NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", "LAUNCH_FAILED", "PENDING"])
def test_J3_what_machines_do_is_a_loss(state: str) -> None:
    assert isinstance(judge(look(witness=TERMINATED), state), Lost)
    assert isinstance(judge(look(), state), Lost)


@pytest.mark.parametrize(("state", "reason"), [("CANCELLED", commands.ON_NODE), ("COMPLETED", ""), ("COMPLETED", "x")])
def test_J3_what_slurm_ends_before_its_node_has_started_it_has_never_run(state: str, reason: str) -> None:
    assert judge(look(claimed=False), state, 0, reason) == "fence"
    assert isinstance(judge(look(claimed=False, fenced=True), state, 0, reason), NeverRan)
    ours = judge(look(claimed=False, fenced=True, cancelled=True), state, 0, reason)
    assert isinstance(ours, Exited) and ours.cancelled


@pytest.mark.parametrize("said", [TERMINATED, KILLED, None])
def test_J8_limits_and_administrators_are_told_apart(said: Exited | None) -> None:
    def end(state: str, **facts: Any) -> Exited:
        found = judge(look(witness=said, **facts), state)
        assert isinstance(found, Exited)
        return found

    if said is not KILLED:
        assert end("TIMEOUT").timed_out and not end("TIMEOUT").cancelled
        assert end("CANCELLED", cancelled=True).cancelled
    assert end("OUT_OF_MEMORY").out_of_memory and end("OUT_OF_MEMORY").error == verdict.NO_MEMORY
    assert end("CANCELLED").error == verdict.BY_OTHERS and not end("CANCELLED").cancelled


@pytest.mark.parametrize("state", ["", "RUNNING", "COMPLETING", "SUSPENDED", "SOME_NEW_STATE"])
def test_a_state_that_is_no_end_is_waited_on(state: str) -> None:
    assert judge(look(witness=TERMINATED), state) == "wait"
    assert judge(look(), state) == "wait"
    assert judge(look(claimed=False), state) == "wait"


def test_J4_silence_is_a_loss_after_the_patience_and_not_while_the_lock_is_held() -> None:
    for state in (None, "FAILED", "NODE_FAIL"):
        assert judge(look(), state, PATIENCE - 1) == "wait"
        assert isinstance(judge(look(), state), Lost)
        assert judge(look(held=True), state) == "wait"
        assert isinstance(judge(look(held=True), state, PATIENCE * verdict.STUCK), Lost)


def test_J7_what_was_never_free_to_start_is_told_from_what_was_held_later() -> None:
    said = "33_21               N/A                 \n34                  2026-11-24T00:05:16 \n35   Unknown\n? N/A\n"
    assert commands.never_freed(said) == {"33_21", 35}


def test_J7_a_job_that_nobody_knows_is_fenced_before_it_is_given_up() -> None:
    assert judge(look(claimed=False), None, PATIENCE - 1) == "wait"
    assert judge(look(claimed=False), None) == "fence"
    assert isinstance(judge(look(claimed=False, fenced=True), None), NeverRan)


def test_a_job_that_ends_without_having_started_is_fenced_at_once() -> None:
    for state in commands.ENDED:
        assert judge(look(claimed=False), state, 0) == "fence"
    fenced = look(claimed=False, fenced=True, complaint="no Python")
    assert isinstance(judge(fenced, "NODE_FAIL", 0), NeverRan)
    assert judge(fenced, "FAILED", 0) == Exited(
        code=None, error="Slurm could not start it: job 77 ended as FAILED: no Python"
    )
    wordless = judge(look(claimed=False, fenced=True), "FAILED", 0)  # a SIGKILL, a credential that was revoked
    assert wordless == NeverRan("Slurm could not start it: job 77 ended as FAILED")
    assert judge(look(claimed=False, fenced=True, cancelled=True), "PENDING", 0) == Exited(code=None, cancelled=True)
    assert judge(look(claimed=False), "PENDING", 0, "BadConstraints") == "fence"


# --- the queue ------------------------------------------------------------------------------------------------------
class Answering:
    """A controller that says what it is told to, or breaks."""

    def __init__(self) -> None:
        self.listing: str | None = None

    async def run(self, argv: Sequence[str], stdin: Stdin = b"", within: float | None = None) -> Answer:
        if "config" in argv:
            return 0, "AccountingStorageType = accounting_storage/none\nMinJobAge = 300 sec\n", ""
        if self.listing is None:
            raise ValueError("an answer of which nobody has thought")
        return 0, self.listing, ""


async def _nothing(_: list[Listed]) -> None:
    pass


@pytest.mark.anyio
async def test_a_fault_of_ours_in_the_look_at_the_queue_keeps_nobody_waiting_and_the_next_look_is_taken() -> None:
    runner = Answering()
    queue = Queue("cluster", runner, 0.01, _nothing)
    queue.start()
    try:
        with anyio.fail_after(30):
            with pytest.raises(BackendUnavailable, match="of which nobody has thought"):
                await queue.fresh()
            runner.listing = OURS
            assert await queue.fresh() == {77: Listed(77, "t-1", "RUNNING", "None")}
    finally:
        await queue.close()


def test_J1_however_long_the_controller_is_down_it_is_asked_again_within_a_minute() -> None:
    queue = Queue("cluster", Answering(), 10.0, _nothing)
    with queue.watch("t-1", 77, "t-1", 0.0):
        for queue._failures in (1, 2, 3, 60, 5000):
            assert queue.delay() <= 60.0
        queue._failures = 1
        assert queue.delay() == 20.0


def test_while_nobody_waits_the_queue_is_looked_at_ever_more_rarely_but_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1e6
    monkeypatch.setattr("mlpiped.backends.slurm.queue.time.monotonic", lambda: now)
    queue = Queue("cluster", Answering(), 10.0, _nothing)
    queue.expect()
    pauses = []
    for _ in range(60):
        pauses.append(queue.delay())
        now += pauses[-1]
    assert pauses[0] == 10.0 and pauses == sorted(pauses) and pauses[-1] == 600.0
    with queue.watch("t-1", 77, "t-1", 0.0):
        assert queue.delay() == 10.0


@pytest.mark.anyio
async def test_jobs_are_counted_by_slurm_s_word_while_somebody_waits_for_them() -> None:
    runner = Answering()
    runner.listing = f"{OURS}\n78|PENDING|mlp-t-2|Priority\n79|RUNNING|mlp-t-9|None"
    queue = Queue("cluster", runner, 0.01, _nothing)
    first, second = ("t-1", 77, "t-1", 0.0), ("t-2", 78, "t-2", 0.0)
    with queue.watch(*first), queue.watch(*second), queue.watch(*second):
        assert queue.states() == {"UNKNOWN": 2}
        queue.start()
        try:
            with anyio.fail_after(30):
                await queue.fresh()
                while "UNKNOWN" in queue.states():
                    await anyio.sleep(0)
        finally:
            await queue.close()
        assert queue.states() == {"RUNNING": 1, "PENDING": 1}
    assert queue.states() == {}


@pytest.mark.anyio
async def test_a_job_waits_for_slurm_s_reason_until_it_runs_and_before_it_was_listed_that_is_not_known() -> None:
    runner = Answering()
    queue = Queue("cluster", runner, 0.01, _nothing)
    with queue.watch("t-1", 77, "t-1", 0.0) as watch:
        assert queue.waiting("t-1") == "Slurm has not been asked about it yet"
        queue.start()
        try:
            with anyio.fail_after(30):
                for line, told in (
                    ("77|PENDING|mlp-t-1|None", "Slurm has given no reason yet"),
                    ("77|PENDING|mlp-t-1|Resources", "Resources"),
                    ("77|RUNNING|mlp-t-1|None", None),
                ):
                    runner.listing = line
                    with suppress(BackendUnavailable):
                        await queue.fresh()
                    while queue.waiting("t-1") != told:
                        await watch.changed(0.01)
        finally:
            await queue.close()
        assert queue.waiting("t-2") is None


def test_before_the_nodes_were_asked_a_step_for_a_card_waits_and_is_not_told_that_there_never_is_one(
    tmp_path: Path,
) -> None:
    backend = SlurmBackend("cluster", tmp_path, SlurmCompute(kind="slurm"), instance="0" * 32)
    place = Place("cluster", 1)
    place.offers(backend.capacity())
    refusal = place.refusal(Need(1, 0, gpus=1))
    assert refusal is not None and (refusal.kind, refusal.text()) == (
        "away",
        "cluster: its nodes have not been asked yet",
    )
    assert place.refusal(Need(1, 0, images=True)) is not None and place.refusal(Need(1, 0)) is None
