"""What the box does by itself, by its scripts alone: no connection, no root."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import mlpiped.backends.ssh
from mlpiped.backends.base import Job, JobOutput, Part
from mlpiped.backends.ssh.incoming import Garbled, Incoming
from mlpiped.backends.ssh.orders import Place, order, quote
from mlpiped.backends.ssh.parcels import Piece, Start, outgoing

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
        into.feed(b"f 1 link/passwd\nbytes\nx")
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


def put(root: Path, stream: bytes, *key: str) -> subprocess.CompletedProcess[bytes]:
    command = ["sh", str(SCRIPTS / "tree.sh"), "put", str(root), ".cas/x", *key]
    return subprocess.run(command, input=stream, capture_output=True, check=False)


def tree(place: Path) -> Path:
    """Large and small files, links, odd names, nothing."""
    (place / "below/deep").mkdir(parents=True)
    (place / "empty").touch()
    (place / "large").write_bytes(bytes(range(256)) * 4000)
    (place / "below/deep/large too").write_bytes(bytes(range(255, -1, -1)) * 4000)
    for number in range(30):
        (place / f"below/small {number}\n-").write_text(f"{number}" * number)
    (place / "below/run").write_text("#!/bin/sh\n")
    (place / "below/run").chmod(0o755)
    (place / "link").symlink_to("below/deep")
    return place


def looks(place: Path) -> dict[str, object]:
    return {
        str(path.relative_to(place)): os.readlink(path) if path.is_symlink()
        else (path.read_bytes(), os.access(path, os.X_OK)) if path.is_file() else None
        for path in place.rglob("*")
    }  # fmt: skip


@pytest.mark.parametrize("tar", [False, True])
def test_what_is_sent_goes_on_where_the_way_broke(tmp_path: Path, tar: bool) -> None:
    source = tree(tmp_path / "source")
    (tmp_path / "box").mkdir()
    root, pieces = root_at(tmp_path / "box"), [Piece(str(source), "name")]
    whole = len(b"".join(outgoing(pieces, tar=tar)))
    start, sent, breaks = Start(), 0, 0
    while True:
        skipped: list[int] = []
        stream = b"".join(outgoing(pieces, tar=tar, start=start, skipped=skipped.append))
        first, *said = put(root, stream[:300_000], "key").stdout.split(b"\n")
        assert first == b"from %d %d" % (start.units, start.offset)
        sent += len(stream[:300_000])
        if said[0] == b"ok":
            break
        assert not (root / ".cas/x").exists()
        breaks += 1
        assert breaks < 50
        last = put(root, b"", "key").stdout.split()
        start = Start(int(last[1]), int(last[2]))
    assert breaks > 3 and sent < whole + 5000
    assert looks(root / ".cas/x/name") == looks(source)
    assert not list((root / ".new").iterdir())
    assert put(root, b"", "key").stdout == b"there\n"


def test_a_part_that_is_not_what_is_sent_now_begins_anew(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (tmp_path / "box").mkdir()
    root, pieces = root_at(tmp_path / "box"), [Piece(str(source), "name")]
    source.write_bytes(b"a" * 1000)
    put(root, b"".join(outgoing(pieces))[:500], "key")
    source.write_bytes(b"b" * 1000)
    _, units, offset = put(root, b"", "key").stdout.split()
    assert int(offset) > 400
    stream = b"".join(outgoing(pieces, start=Start(int(units), int(offset))))
    assert b"not what was sent" in put(root, stream, "key").stdout and not (root / ".cas/x").exists()
    assert put(root, b"", "key").stdout == b"from 0 0\n"
    assert put(root, b"".join(outgoing(pieces)), "key").stdout.endswith(b"ok\n")
    assert (root / ".cas/x/name").read_bytes() == b"b" * 1000


def test_only_what_an_earlier_try_has_left_is_judged_by_a_digest(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (tmp_path / "box").mkdir()
    root, pieces = root_at(tmp_path / "box"), [Piece(str(source), "name")]
    source.write_bytes(b"a" * 1000)
    whole = b"".join(outgoing(pieces))
    assert whole.endswith(b"aend\n")
    put(root, whole[:500], "key")
    _, units, offset = put(root, b"", "key").stdout.split()
    rest = b"".join(outgoing(pieces, start=Start(int(units), int(offset))))
    stream, _, digest = rest.rpartition(b"end")
    assert len(digest.strip()) == 64
    assert b"not what was sent" in put(root, stream + b"end\n", "key").stdout and not (root / ".cas/x").exists()
    assert put(root, whole, "key").stdout == b"from 0 0\nok\n"


def test_of_an_archive_that_was_cut_nothing_stays(tmp_path: Path) -> None:
    """It counts for nothing, and the next try is not judged by a digest then."""
    source = tmp_path / "source"
    for name in "ab":
        (source / name).mkdir(parents=True)
        (source / name / "file").write_bytes(os.urandom(100_000))
    (tmp_path / "box").mkdir()
    root, pieces = root_at(tmp_path / "box"), [Piece(str(source), "name")]
    assert put(root, b"".join(outgoing(pieces, tar=True))[:180_000], "key").stdout == b"from 0 0\n"
    [part] = (root / ".new").iterdir()
    assert (part / "tree/name/a/file").exists()
    shutil.rmtree(source / "a")
    assert put(root, b"".join(outgoing(pieces, tar=True)), "key").stdout == b"from 0 0\nok\n"
    assert looks(root / ".cas/x/name") == looks(source)


def test_a_part_whose_sender_hangs_is_copied_and_not_shared(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (tmp_path / "box").mkdir()
    root, pieces = root_at(tmp_path / "box"), [Piece(str(source), "name")]
    source.write_bytes(b"a" * 1_000_000)
    stream = b"".join(outgoing(pieces))
    command = ["sh", str(SCRIPTS / "tree.sh"), "put", str(root), ".cas/x", "key"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as hangs:
        assert hangs.stdin is not None and hangs.stdout is not None
        assert hangs.stdout.readline() == b"from 0 0\n"
        hangs.stdin.write(stream[:500_000])
        hangs.stdin.flush()
        parts = f"{root}/.new/part.{hangs.pid}."
        file = Path(next(str(p) for p in (root / ".new").iterdir() if str(p).startswith(parts)), "tree/name")
        while not file.exists() or file.stat().st_size < 400_000:
            assert hangs.poll() is None
        _, units, offset = put(root, b"", "key").stdout.split()
        assert int(offset) >= 400_000
        rest = b"".join(outgoing(pieces, start=Start(int(units), int(offset))))
        assert put(root, rest, "key").stdout.endswith(b"ok\n")
        there = (root / ".cas/x/name").stat().st_mtime_ns
        hangs.stdin.write(stream[500_000:])
        hangs.stdin.close()
        hangs.wait(30)
    found = root / ".cas/x/name"
    assert found.read_bytes() == source.read_bytes() and found.stat().st_mtime_ns == there


def test_a_disk_that_is_full_keeps_no_part(tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    root = root_at(tmp_path / "box")
    stream = b"f 1000000 name\n" + b"a" * 1_000_000 + b"end\n"
    script = f"ulimit -f 100; exec sh {SCRIPTS}/tree.sh put {root} .cas/x key"
    subprocess.run(["sh", "-c", f"trap '' XFSZ; {script}"], input=stream, capture_output=True, check=False)
    assert not list((root / ".new").iterdir()) and not (root / ".cas/x").exists()


def get(root: Path, into: Incoming, most: int) -> int:
    """Bytes that came, at most so many; then the way breaks."""
    command = ["sh", str(SCRIPTS / "tree.sh"), "get", str(root), "token", "ask", "out"]
    came = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        while not into.done and came < most and (data := os.read(child.stdout.fileno(), min(5000, most - came))):
            came += len(data)
            for answer in into.feed(data):
                child.stdin.write(answer)
                child.stdin.flush()
        child.kill()
    into.close()
    return came


def test_what_comes_home_goes_on_where_the_way_broke(tmp_path: Path) -> None:
    out = tree(tmp_path / "box/token/out")
    (tmp_path / "home").mkdir()
    came, tries = 0, 0
    while True:
        into = Incoming(tmp_path / "home")
        came += get(tmp_path / "box", into, 300_000)
        tries += 1
        assert tries < 20
        if into.done:
            break
    assert tries > 5 and came < 2_048_000 + tries * 8000
    assert looks(tmp_path / "home/out") == looks(out)


def test_a_part_at_home_is_judged_by_the_digest_of_the_whole(tmp_path: Path) -> None:
    out = tree(tmp_path / "box/token/out")
    (tmp_path / "home").mkdir()
    get(tmp_path / "box", Incoming(tmp_path / "home"), 300_000)
    came = next(path for path in (tmp_path / "home").rglob("large*") if path.stat().st_size > 100_000)
    with came.open("r+b") as file:
        file.write(b"other")
    with pytest.raises(Garbled):
        get(tmp_path / "box", Incoming(tmp_path / "home"), 5_000_000)
    (tmp_path / "clean/out/stranger").mkdir(parents=True)
    with pytest.raises(Garbled, match="stranger"):
        get(tmp_path / "box", Incoming(tmp_path / "clean"), 5_000_000)
    assert out.is_dir()


def test_a_box_that_names_a_file_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Garbled, match="two files"):
        Incoming(tmp_path).feed(b"l name /etc\nf 0 name\n")


def test_what_comes_home_is_not_taken_before_its_digest_came(tmp_path: Path) -> None:
    good = hashlib.sha256(b"abc").hexdigest().encode()
    for number, rest in enumerate((b"end\n", b"sum " + good[::-1] + b"\n", b"f 0 other\nbytes\nend\n")):
        (tmp_path / f"{number}").mkdir()
        with pytest.raises(Garbled):
            Incoming(tmp_path / f"{number}").feed(b"f 3 name\nbytes\nabc" + rest)
    (tmp_path / "whole").mkdir()
    into = Incoming(tmp_path / "whole")
    for byte in b"f 3 name\nx 0 empty\nbytes\nabcsum %b\nsum %b\nend\n" % (good, hashlib.sha256().hexdigest().encode()):
        assert not into.done
        into.feed(bytes([byte]))
    assert into.done and (tmp_path / "whole/name").read_bytes() == b"abc"


@pytest.mark.parametrize(
    "openssl", [None, "exit 1", "echo 0000 *stdin", 'echo >>"$0.used"; exec /usr/bin/openssl "$@"']
)
def test_the_digest_of_a_large_file_is_right_whoever_tells_it(tmp_path: Path, openssl: str | None) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "cat", "tail", "stat", "sha256sum", "du", "od"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    if openssl is not None:
        if "exec" in openssl and not Path("/usr/bin/openssl").exists():
            pytest.skip("openssl is not installed here")
        (tools / "openssl").write_text(f"#!/bin/sh\n{openssl}\n")
        (tools / "openssl").chmod(0o755)
    out = tmp_path / "box/token/out"
    (out / "odd").mkdir(parents=True)
    (out / "large").write_bytes(os.urandom(9_000_000))
    (out / "small").write_text("small")
    (out / "odd/large\n2").write_bytes(os.urandom(9_000_000))
    (tmp_path / "home").mkdir()
    command = ["sh", str(SCRIPTS / "tree.sh"), "get", str(tmp_path / "box"), "token", "all", "out"]
    done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, check=True)
    into = Incoming(tmp_path / "home")
    into.feed(done.stdout)
    assert into.done and looks(tmp_path / "home/out") == looks(out)
    used = tools / "openssl.used"
    assert used.exists() is (openssl is not None and "exec" in openssl)
