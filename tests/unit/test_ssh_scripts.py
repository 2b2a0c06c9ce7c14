"""What the box does by itself, by its scripts alone: no connection, no root."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import mlpiped.backends.ssh
from mlpiped.backends.base import Job, JobOutput, Part
from mlpiped.backends.ssh.orders import Place, order, quote
from mlpiped.backends.ssh.parcels import Garbled, Incoming, Piece, outgoing

SCRIPTS = Path(mlpiped.backends.ssh.__file__).parent
SHELLS = [name for name in ("dash", "bash") if Path("/bin", name).exists()]


def root_at(place: Path) -> Path:
    for name in (".cas", ".new", ".events"):
        (place / name).mkdir()
    return place


def start(root: Path, job: Job, shell: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "MLPIPED_ORDER": os.fsdecode(order(job, Place(str(root), {}))), "MLPIPED_LEADER": "setsid"}
    command = [f"/bin/{shell}", str(SCRIPTS / "step.sh"), "run", str(root), job.token, "1", "/nowhere", "0"]
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("staged", [False, True])
def test_of_many_supervisors_with_one_token_one_starts_the_step(tmp_path: Path, shell: str, staged: bool) -> None:
    root, effects = root_at(tmp_path), tmp_path / "effects"
    for round_ in range(4):
        script = f"echo $MLPIPED_TOKEN >> {effects}"
        outputs = (JobOutput("x", "x", "file"),)
        job = Job(token=f"t{round_}", arguments=((Part("text", script),),), shell=True, outputs=outputs)
        if staged:
            (root / job.token / "in/0").mkdir(parents=True)
        for process in [start(root, job, shell) for _ in range(6)]:
            assert process.wait(60) in (0, 75)
        assert effects.read_text().split().count(job.token) == 1
        assert json.loads((root / job.token / "exit.json").read_text())["code"] == 0
        assert (root / job.token / "out/x").is_dir() and (root / job.token / "work").is_dir()
        assert not list((root / ".new").iterdir())


@pytest.mark.parametrize("shell", SHELLS)
def test_a_quoted_text_is_one_line_and_one_word_of_the_same_bytes(shell: str) -> None:
    for text in ("", "a b", "it's", "new\nline", '$HOME `id` \\ "', "-n", "*", "\x81\x88\u017c"):
        line = f"N='\n'; printf '%s' {quote(text)}"
        done = subprocess.run([f"/bin/{shell}", "-c", line], capture_output=True, check=True)
        assert done.stdout == text.encode()
        assert "\n" not in quote(text)


def test_what_arrives_stays_inside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    for line in (b"d ../out\n", b"d /etc/x\n", b"d a/../../b\n", b"l a/../../b x\n", b"nonsense\n", b"d :2e2e2f78\n"):
        with pytest.raises(Garbled):
            Incoming(tmp_path / "into").feed(line)
    into = Incoming(tmp_path / "into")
    into.feed(b"l link /etc\n")
    with pytest.raises(Garbled):
        into.feed(b"f 1 00 link/passwd\nbytes\nx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into"]


def test_a_stream_that_is_cut_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "below/a").write_text("content")
    stream = b"".join(outgoing([Piece(str(source), "name")]))
    root = root_at(tmp_path / "box") if (tmp_path / "box").mkdir() is None else tmp_path
    for size in (*range(0, len(stream), 7), len(stream) - 1):
        command = ["sh", str(SCRIPTS / "tree.sh"), "put", str(root), ".cas/x"]
        done = subprocess.run(command, input=stream[:size], capture_output=True, check=False)
        assert b"ok" not in done.stdout and not (root / ".cas/x").exists() and not list((root / ".new").iterdir())
    done = subprocess.run(command, input=stream, capture_output=True, check=False)
    assert done.stdout == b"ok\n" and (root / ".cas/x/name/below/a").read_text() == "content"
