"""What the Docker backend decides without an engine: mounts, the script, how a container ended, base images."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlpiped.backends.base import Exited, Job, Lost, Part
from mlpiped.backends.docker import container, dockerfile, judging, mounts, script
from mlpiped.backends.docker.images import ImageRoom
from mlpiped.errors import InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# --- mounts


def planned(*inputs: str, allowed: tuple[str, ...] = (), mounted: tuple[str, ...] = ()) -> dict[str, bool]:
    """Path -> whether it can be written."""
    found = mounts.plan("/state/jobs/t", ["/state/sdk"], inputs, allowed, mounted, "/state")
    assert all(each["Source"] == each["Target"] and each["Type"] == "bind" for each in found)
    assert len({each["Target"] for each in found}) == len(found)
    return {each["Target"]: not each["ReadOnly"] for each in found}


def test_only_the_jobs_folder_and_what_the_config_says_so_can_be_written() -> None:
    assert planned("/data/a", allowed=("/scratch:rw", "/ref")) == {
        "/state/jobs/t": True,
        "/state/sdk": False,
        "/data/a": False,
        "/scratch": True,
        "/ref": False,
    }


def test_an_input_within_what_may_be_written_is_read_only_all_the_same() -> None:
    found = planned("/scratch/in", "/scratch2", allowed=("/scratch:rw", "/scratch2:rw"))
    assert (found["/scratch"], found["/scratch/in"], found["/scratch2"]) == (True, False, False)


def test_an_input_within_another_needs_no_mount_of_its_own() -> None:
    assert planned("/data/in", "/data/in/a", "/data/in/b/c", "/data/inner").keys() >= {"/data/in", "/data/inner"}
    assert "/data/in/a" not in planned("/data/in", "/data/in/a")


def test_what_is_mounted_below_something_read_only_is_made_read_only_too() -> None:
    found = planned("/data/in", allowed=("/w:rw",), mounted=("/data/in/disk", "/data", "/w/disk", "/state/jobs/t"))
    assert found["/data/in/disk"] is False
    assert "/data" not in found and "/w/disk" not in found and found["/state/jobs/t"]


def test_many_inputs_become_the_folders_that_hold_them_deepest_first() -> None:
    files = [f"/data/lab/parts/{n}" for n in range(500)]
    assert planned(*files, "/data/lab/one").keys() == {
        "/state/jobs/t",
        "/state/sdk",
        "/data/lab/parts",
        "/data/lab/one",
    }
    spread = [f"/data/lab/{n}/part" for n in range(500)]
    assert "/data/lab" in planned(*spread)


@pytest.mark.parametrize("paths", [[f"/data/{n}" for n in range(500)], [f"/state/{n}/{n}" for n in range(500)]])
def test_no_folder_that_says_too_much_stands_for_inputs(paths: list[str]) -> None:
    with pytest.raises(InvalidJob, match="inputs in too many places"):
        planned(*paths)


def test_a_path_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidJob, match="no UTF-8"):
        planned(os.fsdecode(b"/data/\xff"))


def test_mount_points_are_read_with_their_escapes() -> None:
    line = "36 35 98:0 /root /mnt/a\\040b rw,noatime master:1 - ext3 /dev/root rw"
    assert mounts.mount_points(line) == ["/mnt/a b"]


# --- the container


def test_no_job_can_ask_for_a_privilege_or_a_mount() -> None:
    job = Job(token="t", arguments=((Part("text", "true"),),), image="sha256:x", cpus=1.5, memory=1 << 30, shm_size=5)
    host = container.configuration(job, "/j/t", "me", "1:2", [])["HostConfig"]
    assert host["Privileged"] is False and host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges"]
    assert host["NetworkMode"] == "none" and host["Mounts"] == [] and "Binds" not in host
    assert (host["NanoCpus"], host["Memory"], host["MemorySwap"], host["ShmSize"]) == (15 * 10**8, 1 << 30, 1 << 30, 5)
    assert host["AutoRemove"] is False and host["RestartPolicy"] == {"Name": "no"}
    assert host["LogConfig"]["Config"]["max-size"]
    assert not {"PidMode", "IpcMode", "Devices", "VolumesFrom", "UsernsMode"} & host.keys()


def test_only_a_step_with_cards_sees_any_whatever_its_image_asks_for() -> None:
    job = Job(token="t", arguments=((Part("text", "true"),),), image="sha256:x")
    without = container.configuration(job, "/j/t", "me", "1:2", [])
    assert without["Env"] == ["NVIDIA_VISIBLE_DEVICES=void"] and "DeviceRequests" not in without["HostConfig"]
    assert container.bare(without, ["/x"], {"A": "1"})["Env"] == ["NVIDIA_VISIBLE_DEVICES=void", "A=1"]
    with_cards = container.configuration(replace(job, gpus=("GPU-a",)), "/j/t", "me", "1:2", [])
    assert with_cards["Env"] == [] and with_cards["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == ["GPU-a"]


# --- the script, by this machine's sh


def ran(place: Path, argv: list[str], env: dict[str, str] | None = None, **how: Any) -> tuple[script.Ended | None, str]:
    (place / "work").mkdir(parents=True)
    (place / script.ENDED).write_bytes(b" " * script.ENDED_SIZE)
    text = script.write(os.fspath(place), argv, env or {}, how.get("timeout"), how.get("grace", 1.0))
    (place / script.START).write_bytes(text)
    path = {"PATH": "/usr/bin:/bin"}
    subprocess.run(["/bin/sh", place / script.START], env=path, check=False, timeout=30, start_new_session=True)
    assert (place / script.START).read_bytes() == b""
    return script.read((place / script.ENDED).read_bytes()), (place / "stdout").read_text()


def test_arguments_and_values_reach_the_step_as_they_are(tmp_path: Path) -> None:
    wild = "a 'b' \"c\" $HOME `id` \\ \n * @COMMAND@"
    ended, text = ran(tmp_path / "it's here", ["printf", "%s|", wild, ""], {"WILD": wild})
    assert ended is not None and ended.code == 0 and text == f"{wild}||"
    ended, text = ran(tmp_path / "2", ["sh", "-c", 'printf %s "$WILD"'], {"WILD": wild})
    assert text == wild


def test_what_goes_before_the_images_own_path_does(tmp_path: Path) -> None:
    _, text = ran(tmp_path, ["sh", "-c", 'echo "$PATH $PYTHONPATH"'], {"PATH": "/mine:", "PYTHONPATH": "/sdk:"})
    assert text == "/mine:/usr/bin:/bin /sdk:\n"


@pytest.mark.parametrize(("command", "code"), [("no-such", 127), ("/no/such", 127), ("/etc/passwd", 126), ("./x", 127)])
def test_a_command_that_cannot_be_started_is_a_fault_of_its_own(tmp_path: Path, command: str, code: int) -> None:
    ended, _ = ran(tmp_path, [command])
    assert ended is not None and ended.fault and ended.code == code


def test_a_step_that_ends_with_127_has_been_started(tmp_path: Path) -> None:
    ended, _ = ran(tmp_path, ["sh", "-c", "exit 127"])
    assert ended is not None and not ended.fault and ended.code == 127


def test_a_builtin_of_the_shell_is_no_command_and_cannot_end_the_script(tmp_path: Path) -> None:
    ended, _ = ran(tmp_path, ["exit", "3"])
    assert ended is not None and ended.fault and ended.code == 127


def test_a_step_that_ends_its_process_group_does_not_end_the_witness(tmp_path: Path) -> None:
    ended, _ = ran(tmp_path, ["sh", "-c", "trap 'exit 4' TERM; kill 0; sleep 5"])
    assert ended is not None and ended.code == 4


@pytest.mark.parametrize("name", ["a-b", "1A", "", "a b", "ż"])
def test_a_name_that_no_shell_knows_is_refused(name: str) -> None:
    with pytest.raises(InvalidJob):
        script.write("/j", ["true"], {name: "x"}, None, 1)


@pytest.mark.parametrize(
    "text", [b"", b" " * 128, b"ended", b"ended 0 1 2 3", b"ended x 1 2 3 .", b"other 0 1 2 3 .", b"ended 0 1 2 3 4"]
)
def test_half_a_word_is_none(text: bytes) -> None:
    assert script.read(text) is None


def test_the_last_word_is_read_with_the_spaces_that_held_its_place() -> None:
    said = script.read(b"ended 3 2500000000 1024 - .\n" + b" " * 90)
    assert said == script.Ended(False, 3, 2.5, 1024, 0)


# --- how it ended

EXITED = {"Status": "exited", "ExitCode": 0, "Error": "", "OOMKilled": False, "StartedAt": "2026-11-23T10:00:00.5Z"}


def word(code: int, kills: int = 0) -> script.Ended:
    return script.Ended(False, code, 1.0, 2, kills)


@pytest.mark.parametrize(
    ("state", "ended", "more", "outcome"),
    [
        ({}, word(0), {}, (0, None)),
        ({"ExitCode": 3}, word(3), {}, (3, None)),
        ({"ExitCode": 139}, word(139), {}, (None, 11)),
        ({"ExitCode": 255}, word(255), {}, (255, None)),
        ({"ExitCode": 137}, word(137), {}, (None, 9)),  # by the script's word: it killed itself
        ({"ExitCode": 137}, None, {}, "ended from outside"),
        ({"ExitCode": 0}, None, {}, "ended from outside"),  # without the script's word not even that is believed
        (None, None, {}, "somebody removed it"),
        (None, word(3), {}, (3, None)),
        ({}, word(0), {"rebooted": True}, "host rebooted"),
        ({"ExitCode": 137}, None, {"shell": False}, "ended from outside"),
        ({"ExitCode": 143}, None, {"shell": False}, "ended from outside"),
        ({"ExitCode": 0}, None, {"shell": False}, (0, None)),
        ({"ExitCode": 2}, None, {"shell": False}, (2, None)),
    ],
)
def test_I2_an_end_without_a_word_is_a_loss_and_no_failure(
    state: dict[str, Any] | None, ended: script.Ended | None, more: dict[str, bool], outcome: object
) -> None:
    found = judging.judge(judging.Evidence(None if state is None else EXITED | state, ended, **more))
    if isinstance(outcome, str):
        assert isinstance(found, Lost) and outcome in found.reason
    else:
        assert isinstance(found, Exited) and (found.code, found.signal) == outcome and found.error is None


def test_I3_memory_cancellation_and_time_are_told_apart() -> None:
    killed = EXITED | {"ExitCode": 137, "OOMKilled": True}
    found = judging.judge(judging.Evidence(killed, None, memory=64 << 20))
    assert isinstance(found, Exited) and found.out_of_memory
    assert found.error == "out of memory: it needed more than its limit of 64 MiB"
    found = judging.judge(judging.Evidence(EXITED | {"ExitCode": 1}, word(1, kills=1), memory=64 << 20))
    assert isinstance(found, Exited) and found.out_of_memory  # an engine that has missed it
    found = judging.judge(judging.Evidence(EXITED | {"OOMKilled": True}, word(0, kills=1)))
    assert isinstance(found, Exited) and found.code == 0 and not found.out_of_memory and found.error is None
    found = judging.judge(judging.Evidence(killed, None, cancelled=True))
    assert isinstance(found, Exited) and found.cancelled and not found.out_of_memory and found.signal == 9
    found = judging.judge(judging.Evidence(None, None, timed_out=True))
    assert isinstance(found, Exited) and found.timed_out and not found.cancelled and found.code != 0


def test_I3_a_container_that_could_not_be_started_says_why() -> None:
    state = {
        "Status": "created",
        "ExitCode": 128,
        "Error": "could not select  device driver",
        "FinishedAt": "0001-01-01",
    }
    found = judging.judge(judging.Evidence(EXITED | state, None))
    assert isinstance(found, Exited) and found.code == 128
    assert found.error == "the container could not be started: could not select device driver"
    found = judging.judge(judging.Evidence(EXITED | state | {"ExitCode": 127}, None, command="x"))
    assert isinstance(found, Exited) and (found.code, found.error) == (127, "command not found: `x`")


def test_the_engines_times_are_read_to_the_fraction() -> None:
    assert judging.moment("1970-01-01T00:00:01.123456789Z") == pytest.approx(1.123456789)
    assert judging.moment("1970-01-01T00:00:02Z") == 2.0
    assert (
        judging.moment("0001-01-01T00:00:00Z") is None
        and judging.moment("soon") is None
        and judging.moment(None) is None
    )


# --- Dockerfiles


@pytest.mark.parametrize(
    ("text", "bases"),
    [
        ("FROM python:3.12\nRUN true\n", ["python:3.12"]),
        ("from --platform=linux/amd64 a/b:c as one\nFROM one\nCOPY --from=one /x /x\n", ["a/b:c"]),
        ("FROM a\nFROM a AS two\nFROM scratch\nCOPY --chown=1 --from=two /x /\nCOPY --from=0 /y /\n", ["a"]),
        ("FROM a\nCOPY --from=tools:1 /bin/x /bin/x\n", ["a", "tools:1"]),
        ('ARG V=3.12\nARG B="python"\nFROM $B:${V}-slim\n', ["python:3.12-slim"]),
        ("ARG V\nFROM python:${V:-3.11}\n", ["python:3.11"]),
        ("RUN nothing\n", []),
    ],
)
def test_the_base_images_of_a_dockerfile_are_found(text: str, bases: list[str]) -> None:
    assert dockerfile.bases(text) == bases


def test_I7_a_dockerfile_is_built_on_the_digests_of_its_bases() -> None:
    text = "ARG V=1\nFROM a:$V AS x\nFROM b\nCOPY --from=x /1 /1\nCOPY --from=c /2 /2\n"
    made = dockerfile.pinned(text, {"a:1": "sha256:aa", "b": "sha256:bb", "c": "sha256:cc"})
    assert made == "ARG V=1\nFROM sha256:aa AS x\nFROM sha256:bb\nCOPY --from=x /1 /1\nCOPY --from=sha256:cc /2 /2\n"


def test_I7_what_only_looks_like_a_stage_is_none() -> None:
    text = 'FROM a\nRUN psql -c "select * \\\nFROM b" \\\n\n # no end \n FROM c\n# \\\nFROM d\r\n'
    assert dockerfile.bases(text) == ["a", "d"]
    assert dockerfile.bases("# escape=`\nFROM a\nRUN dir `\nFROM b\nRUN dir c:\\\nFROM c\n") == ["a", "c"]


def test_every_stage_has_the_label_and_nothing_else_is_changed() -> None:
    text = "# x\nARG V=1\nFROM a:$V AS x\nRUN true \\\nFROM b\nFROM scratch"
    made = dockerfile.labelled(text, "by", "me")
    label = '\nLABEL "by"="me"'
    assert made == f"# x\nARG V=1\nFROM a:$V AS x{label}\nRUN true \\\nFROM b\nFROM scratch{label}"


# --- images on their way


class Registry:
    """An engine to which a pull of two layers comes, word by word."""

    def __init__(self) -> None:
        self.there = False
        self.room = ImageRoom(self, "box", "i", "missing", Path())  # type: ignore[arg-type]
        self.said: list[str | None] = []

    async def image(self, name: str) -> dict[str, Any] | None:
        return {"Id": "sha256:1"} if self.there else None

    async def pull(self, reference: str) -> AsyncIterator[dict[str, Any]]:
        self.said.append(self.room.bringing(reference, None))
        for layer, done in (("a", 10), ("b", 0), ("a", 30), ("b", 50)):
            yield {"id": layer, "status": "Downloading", "progressDetail": {"current": done, "total": 50}}
            self.said.append(self.room.bringing(reference, None))
        self.said.append(self.room.bringing(None, f"FROM {reference}\n"))
        self.there = True


@pytest.mark.anyio
async def test_an_image_that_is_pulled_says_how_far_it_is_and_then_nothing() -> None:
    registry = Registry()
    assert (await registry.room.named("app:1")).run == "sha256:1"
    assert registry.said == [
        f"pulls image app:1{end}" for end in ("", ": 20 %", ": 10 %", ": 30 %", ": 80 %", ": 80 %")
    ]
    assert registry.room.bringing("app:1", None) is None
