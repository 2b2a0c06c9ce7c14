"""The GPUs of a machine: what real `nvidia-smi` output means, whose processes are ours, and leases that one wins."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from smi_rig import Smi

from mlpiped.backends import cards
from mlpiped.backends.base import Card

A = "GPU-6f1c2a8e-3b71-90d4-5c06-0e2d9f3b7a11"
B = "GPU-b22f0cc4-1188-4a0f-9a0e-7f6f5c2e4d10"
SLICE = "MIG-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"


def told(*lines: str) -> cards.Look:
    return cards.look("\n".join(lines))


class Box:
    """One host of two instances: runs the real script with `sh`, as backends do."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = str(tmp_path / "leases")
        self.smi = Smi.make(tmp_path / "bin", A, B)
        self.env = {**os.environ, "PATH": f"{self.smi.folder}:{os.environ['PATH']}"}

    def start(self, arguments: list[str]) -> subprocess.Popen[str]:
        command = ["sh", "-c", cards.SCRIPT, *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.env, cwd="/"
        )

    def run(self, arguments: list[str]) -> tuple[int, str]:
        process = self.start(arguments)
        out, err = process.communicate(timeout=60)
        assert not err, err
        return process.returncode, out

    def take(self, instance: str, token: str, *uuids: str) -> tuple[int, str]:
        return self.run(cards.take(instance, token, uuids, folder=self.folder))

    def give(self, instance: str, token: str, *uuids: str) -> None:
        assert self.run(cards.give(instance, token, uuids, folder=self.folder))[0] == 0

    def look(self, instance: str = "us") -> cards.Look:
        status, said = self.run(cards.arguments("look", instance, folder=self.folder))
        assert status == 0
        return cards.look(said)

    def foreign(self, instance: str = "us") -> dict[str, str | None]:
        return {card.uuid: card.foreign for card in self.look(instance).cards(instance)}

    def leases(self) -> dict[str, tuple[str, str]]:
        return {lease.uuid: (lease.instance, lease.token) for lease in self.look().leases}


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@contextmanager
def process(token: str | None, *, inner_env: str = "") -> Iterator[int]:
    """A child of a process that bears `token`: its pid."""
    env = {"PATH": os.environ["PATH"], **({"MLPIPED_TOKEN": token} if token else {})}
    script = f"{inner_env} sh -c 'echo $$; exec cat' & wait"
    with subprocess.Popen(["sh", "-c", f"exec 3<&0; {script.replace('exec cat', 'exec cat <&3')}"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as parent:  # fmt: skip
        assert parent.stdout is not None and parent.stdin is not None
        try:
            yield int(parent.stdout.readline())
        finally:
            parent.stdin.close()


# --- the parser -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "card"),
    [
        (f"{A}, 0, NVIDIA GeForce RTX 3090, 24576", Card(A, 0, "NVIDIA GeForce RTX 3090", 24 << 30)),
        (f"{A}, 11, NVIDIA A100-SXM4-80GB, 81920", Card(A, 11, "NVIDIA A100-SXM4-80GB", 80 << 30)),
        (f"{A}, 0, NVIDIA H100, PCIe, 81559", Card(A, 0, "NVIDIA H100, PCIe", 81559 << 20)),
        (f"{A}, 0, NVIDIA GB10, [N/A]", Card(A, 0, "NVIDIA GB10", 0)),
        (f"{A}, 0, Tesla K80, [Not Supported]", Card(A, 0, "Tesla K80", 0)),
        (f"{A}, 0, Quadro\x1b[31m, 8192 MiB", Card(A, 0, "Quadro?[31m", 8 << 30)),
        ("uuid, index, name, memory.total [MiB]", None),
        (f"{A}, 1, NVIDIA A100, [GPU is lost]", Card(A, 1, "NVIDIA A100", 0, "ill, says its driver: GPU is lost")),
        (f"{A}, 1, NVIDIA A100, ERR!", Card(A, 1, "NVIDIA A100", 0, "ill, says its driver: ERR!")),
        (f"{A}, [N/A], [GPU is lost], [N/A]", None),
        ("No devices were found", None),
        ("", None),
    ],
)
def test_a_line_of_nvidia_smi_is_a_card_or_nothing(line: str, card: Card | None) -> None:
    assert cards.parse_card(line) == card


@pytest.mark.parametrize(
    ("line", "pid", "name"),
    [
        (f"{A}, 4242, /usr/bin/python3, 1210", 4242, "python3"),
        (f"{A}, 4242, python, [N/A]", 4242, "python"),
        (f"{A}, 4242, /opt/my tools, v2/train, 1210", 4242, "train"),
        (f"{A}, 4242, [Not Found], [N/A]", 4242, "a process"),
        (f"{A}, [N/A], [Insufficient Permissions], [N/A]", 0, "a process"),
        (f"{A}, 7, ev\x1bil, 1", 7, "ev?il"),
        (f"{A}, 7", 7, "a process"),
    ],
)
def test_a_line_of_compute_apps_is_a_process_on_a_card(line: str, pid: int, name: str) -> None:
    found = cards.parse_process(f"- {line}")
    assert found is not None
    assert (found.uuid, found.pid, found.name, found.token) == (A, pid, name, None)


NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running."
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
FALLEN_OFF = "Unable to determine the device handle for GPU 0000:0B:00.0: Unknown Error"


@pytest.mark.parametrize(
    ("words", "status", "trouble"),
    [
        ("No devices were found", 6, None),
        (MISMATCH, 18, f"nvidia-smi: {MISMATCH}"),
        (NO_DRIVER, 9, f"nvidia-smi: {NO_DRIVER}"),
        (FALLEN_OFF, 15, f"nvidia-smi: {FALLEN_OFF}"),
    ],
)
def test_a_driver_that_is_ill_is_told_and_no_devices_are_none(
    box: Box, words: str, status: int, trouble: str | None
) -> None:
    box.smi.broken(words, status)
    seen = box.look()
    assert (seen.found, seen.trouble) == ((), trouble)
    box.smi.mended()
    assert [card.uuid for card in box.look().found] == [A, B]


def test_of_a_driver_that_names_some_cards_and_then_fails_the_failure_is_told() -> None:
    card, app = f"{A}, 0, NVIDIA A100, 40960", f"{A}, 4242, python, 1210"
    assert told(f"card {card}", f"card {FALLEN_OFF}", "cards 15").trouble == f"nvidia-smi: {FALLEN_OFF}"
    assert told(f"card {card}", "cards 0", f"app - {app}", f"app - {FALLEN_OFF}", "apps 15").trouble == (
        f"nvidia-smi: {FALLEN_OFF}"
    )


def test_a_card_that_fell_off_the_bus_is_left_alone_though_it_is_listed(box: Box) -> None:
    (box.smi.folder / "cards").write_text(f"{A}, 0, NVIDIA A100, 40960\n{B}, 1, NVIDIA A100, [GPU is lost]\n")
    assert box.foreign() == {A: None, B: "ill, says its driver: GPU is lost"}
    assert box.look().trouble is None


def test_a_driver_that_hangs_is_told() -> None:
    assert told("uid 0", "card ", "cards 124").trouble == "nvidia-smi has not answered in 20 s"


def test_a_host_without_nvidia_smi_has_no_cards_and_no_trouble(box: Box) -> None:
    box.env["PATH"] = "/usr/bin:/bin"
    assert box.look() == cards.Look(uid=os.getuid())


def test_a_card_that_mig_has_cut_up_is_its_slices(box: Box) -> None:
    (box.smi.folder / "list").write_text(
        f"GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})\n"
        f"  MIG 3g.20gb     Device  0: (UUID: {SLICE})\n"
        "  MIG 3g.20gb     Device  1: (UUID: MIG-GPU-6f1c2a8e/2/0)\n"  # a driver before R470: cannot be named
        f"GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})\n"
    )
    seen = box.look().cards("us")
    assert [(card.uuid, card.index, card.memory) for card in seen] == [(SLICE, 0, 0), (B, 1, 24 << 30)]
    assert seen[0].name == "NVIDIA GeForce RTX 3090 MIG 3g.20gb device 0"
    box.smi.used_by((A, 1, "Xorg"))
    assert box.foreign() == {SLICE: "in use by Xorg (pid 1), not ours", B: None}


@given(st.text(st.characters(codec="utf-8")), st.sampled_from(["card", "app", "lease", "list", "uid", "cards", ""]))
def test_what_others_may_have_written_breaks_no_look(text: str, word: str) -> None:
    seen = told("uid 0", f"card {A}, 0, X, 1", f"{word} {text}")
    for card in seen.cards("us"):
        assert card.foreign is None or card.foreign.isprintable()


# --- whose process it is ----------------------------------------------------------------------------------------
def test_a_process_of_somebody_else_makes_its_card_foreign(box: Box) -> None:
    with process(None) as pid:
        box.smi.used_by((A, pid, "/usr/bin/python3"), (A, pid, "python3"))
        assert box.foreign() == {A: f"in use by python3 (pid {pid}) and 1 more, not ours", B: None}


def test_a_process_of_the_step_that_has_the_lease_is_ours_and_its_children_too(box: Box) -> None:
    box.take("us", "mlp-1-0-1-ab", A)
    with process("mlp-1-0-1-ab") as plain, process("mlp-1-0-1-ab", inner_env="env -u MLPIPED_TOKEN") as inner:
        box.smi.used_by((A, plain, "python"), (A, inner, "python"))
        assert box.foreign() == {A: None, B: None}
        box.smi.used_by((B, plain, "python"))  # not on the card that it was given
        assert box.foreign() == {A: None, B: f"in use by python (pid {plain}), not ours"}
        box.give("us", "mlp-1-0-1-ab", A)  # it outlived its step
        box.smi.used_by((A, plain, "python"))
        assert box.foreign()[A] == f"in use by python (pid {plain}), not ours"


def test_a_process_that_has_written_over_its_environment_is_known_by_the_folder_that_it_works_in(
    box: Box, tmp_path: Path
) -> None:
    work = tmp_path / "work/mlp-scratch/jobs/mlp-1-0-1-ab/work/deeper"
    work.mkdir(parents=True)
    box.take("us", "mlp-1-0-1-ab", A)
    with (
        subprocess.Popen(["sleep", "300"], env={}, cwd=work) as ours,
        subprocess.Popen(["sleep", "300"], env={}) as not_,
    ):
        try:
            box.smi.used_by((A, ours.pid, "ray::IDLE"))
            assert box.foreign()[A] is None
            box.smi.used_by((A, not_.pid, "ray::IDLE"))
            assert box.foreign()[A] == f"in use by ray::IDLE (pid {not_.pid}), not ours"
        finally:
            ours.kill()
            not_.kill()


def test_on_a_shared_card_each_of_our_steps_is_ours(box: Box) -> None:
    box.take("us", cards.SHARED, A)
    with process("mlp-1-0-1-ab") as one, process("mlp-2-0-1-cd") as two, process(None) as stranger:
        box.smi.used_by((A, one, "python"), (A, two, "python"))
        assert box.foreign()[A] is None
        box.smi.used_by((A, one, "python"), (A, stranger, "python"))
        assert box.foreign()[A] == f"in use by python (pid {stranger}), not ours"
        assert box.look().cards("us", {stranger})[0].foreign is None  # its container is ours, says the engine


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
def test_a_process_that_we_may_not_read_is_foreign(box: Box) -> None:
    with process("mlp-1-0-1-ab") as pid:
        box.smi.used_by((A, pid, "python"))
        for folder in (box.smi.folder, *box.smi.folder.parents):
            if folder.stat().st_uid == os.getuid() and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o011)
        other = ["setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", cards.SCRIPT]
        arguments = cards.take("us", "mlp-1-0-1-ab", [A], folder=f"{box.smi.folder.parent}/theirs")
        Path(f"{box.smi.folder.parent}/theirs").mkdir(mode=0o777)
        Path(f"{box.smi.folder.parent}/theirs").chmod(0o1777)
        subprocess.run([*other, *arguments], env=box.env, check=True, cwd="/")
        arguments = cards.arguments("look", "us", folder=f"{box.smi.folder.parent}/theirs")
        said = subprocess.run([*other, *arguments], env=box.env, check=True, cwd="/", capture_output=True, text=True)
        assert cards.look(said.stdout).cards("us")[0].foreign == f"in use by python (pid {pid}), not ours"


# --- leases -----------------------------------------------------------------------------------------------------
def test_a_card_is_leased_to_one_instance_and_the_other_is_told_whose_it_is(box: Box) -> None:
    assert box.take("us", "mlp-1-0-1-ab", A) == (0, "")
    assert box.take("us", "mlp-1-0-1-ab", A) == (0, "")  # said again, it is heard once
    status, said = box.take("them", "mlp-1-0-1-cd", A)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert status == cards.HELD
    now = time.strftime("%H:%M", time.localtime(box.look().leases[0].since))
    assert cards.holder(said) == f"card {A} is leased by the mlpiped of {user} since {now}"
    assert box.foreign("them") == {A: f"leased by the mlpiped of {user} since {now}", B: None}
    assert box.foreign("us") == {A: None, B: None}
    box.give("them", "mlp-1-0-1-ab", A)  # not theirs to give
    assert box.take("them", "mlp-1-0-1-cd", A)[0] == cards.HELD
    box.give("us", "mlp-1-0-1-ab", A)
    assert box.take("them", "mlp-1-0-1-cd", A) == (0, "")


def test_several_cards_are_leased_together_or_not_at_all(box: Box) -> None:
    box.take("them", "theirs", B)
    assert box.take("us", "ours", A, B)[0] == cards.HELD
    assert box.leases() == {B: ("them", "theirs")}
    box.give("them", "theirs", B)
    assert box.take("us", "ours", A, B) == (0, "")
    assert box.leases() == {A: ("us", "ours"), B: ("us", "ours")}


def test_a_shared_card_takes_more_steps_of_its_instance_and_none_of_another(box: Box) -> None:
    assert box.take("us", cards.SHARED, A) == (0, "")
    assert box.take("us", cards.SHARED, A) == (0, "")
    assert box.take("them", cards.SHARED, A)[0] == cards.HELD


def test_of_many_processes_that_race_for_a_card_one_wins(box: Box) -> None:
    for _ in range(5):
        racers = [box.start(cards.take(f"i{n}", "token", [A], folder=box.folder)) for n in range(8)]
        ends = [racer.communicate(timeout=60)[0] for racer in racers]
        won = [n for n, racer in enumerate(racers) if racer.returncode == 0]
        assert len(won) == 1
        assert box.leases() == {A: (f"i{won[0]}", "token")}
        assert all(cards.holder(said) for n, said in enumerate(ends) if n not in won)
        box.give(f"i{won[0]}", "token", A)


def test_keep_sets_right_the_leases_of_its_instance_and_no_others(box: Box) -> None:
    box.take("us", "ended", A)
    box.take("them", "theirs", B)
    status, said = box.run(cards.keep("us", {B: "lives"}, folder=box.folder))
    assert (status, said.startswith(f"held {B} them theirs ")) == (0, True)
    assert box.leases() == {B: ("them", "theirs")}
    box.give("them", "theirs", B)
    assert box.run(cards.keep("us", {A: "lives", B: cards.SHARED}, folder=box.folder)) == (0, "")
    assert box.leases() == {A: ("us", "lives"), B: ("us", "shared")}
    assert box.run(cards.keep("us", {A: "lives"}, folder=box.folder)) == (0, "")
    assert box.leases() == {A: ("us", "lives")}


def test_a_folder_that_others_may_empty_holds_no_leases(box: Box) -> None:
    Path(box.folder).mkdir(mode=0o777)
    process = box.start(cards.take("us", "token", [A], folder=box.folder))
    assert process.communicate(timeout=60)[1] == f"no folder for the leases of cards: {box.folder}\n"
    assert process.returncode == 1


def test_names_with_line_breaks_in_the_folder_of_leases_say_nothing(box: Box) -> None:
    box.take("us", "token", A)
    (here,) = Path(box.folder).iterdir()
    (here / f"x\ncard {B}, 5, fake, 1").symlink_to("us token bob 1")
    (here / B).symlink_to(f"us\ncard {B}, 5, fake, 1 token bob 1")
    assert set(box.leases()) == {A}
