"""The config: what is taken from it, and what is said about a bad one."""

from __future__ import annotations

import importlib.util
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mlpiped.config import computes as config_computes
from mlpiped.config import find as config_find
from mlpiped.config import lines as config_lines
from mlpiped.config import settings as config
from mlpiped.config import values as config_values
from mlpiped.errors import ConfigError, Fault, UsageError

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "mlpiped.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(folder: Path, text: str) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as caught:
        config.load(write(folder, text))
    return caught.value.faults


def test_an_empty_file_gives_one_local_compute_with_a_slot_per_cpu(tmp_path: Path) -> None:
    settings = config.load(write(tmp_path, ""))
    assert settings.compute["local"].slots == len(os.sched_getaffinity(0))
    assert settings.daemon.plugins == (tmp_path / "plugins",)
    assert settings.daemon.on_stop == "leave"
    assert settings.control.socket == Path("/run/mlpiped/control.sock")
    assert settings.path == tmp_path / "mlpiped.toml"


def test_relative_paths_are_relative_to_the_file_and_not_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        '[daemon]\nstate_dir = "state"\nruntime_dir = "run"\nplugins = ["p", "/q"]\n[datastores.lab]\npath = "../data"'
    )
    write(tmp_path, text)
    monkeypatch.chdir(tmp_path.parent)
    settings = config.load(Path(tmp_path.name) / "mlpiped.toml")
    assert settings.daemon.state_dir == tmp_path / "state"
    assert settings.daemon.plugins == (tmp_path / "p", Path("/q"))
    assert settings.control.socket == tmp_path / "run" / "control.sock"
    assert settings.datastores["lab"].path == tmp_path.parent / "data"


def test_the_home_of_the_user_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    settings = config.load(write(tmp_path, '[daemon]\nstate_dir = "~/state"'))
    assert settings.daemon.state_dir == Path("/home/alice/state")


def test_every_section_that_is_due_is_read(tmp_path: Path) -> None:
    settings = config.load(
        write(
            tmp_path,
            """
[daemon]
log = "journal"
max_running_steps = 7
on_stop = "cancel"
python = "/usr/bin/python3"
[control]
socket = "/tmp/s.sock"
group = "lab"
operators = ["alice", "@ml"]
[datastores.lab]
path = "/data"
watch = "poll"
poll_interval = "1m 30s"
[compute.big]
kind = "local"
slots = 4
memory = "32G"
cpus = 2.5
[pools]
any = ["big"]
[retention]
runs = "180d"
artifacts = "500G"
logs = "30d"
""",
        )
    )
    assert settings.daemon.model_dump(include={"log", "max_running_steps", "on_stop", "python"}) == {
        "log": "journal",
        "max_running_steps": 7,
        "on_stop": "cancel",
        "python": Path("/usr/bin/python3"),
    }
    assert settings.control == config.Control(socket=Path("/tmp/s.sock"), group="lab", operators=("alice", "@ml"))
    assert settings.datastores["lab"].poll_interval == 90
    assert settings.compute["big"].memory == 32 * 1024**3
    assert settings.pools == {"any": ("big",)}
    assert settings.retention.runs == 180 * 86400
    assert settings.retention.artifacts == 500 * 1024**3


def test_what_is_old_goes_by_default_unless_it_is_to_be_kept_for_ever(tmp_path: Path) -> None:
    default = config.load(write(tmp_path, "")).retention
    assert (default.runs, default.logs, default.artifacts) == (180 * 86_400, 30 * 86_400, None)
    kept = config.load(write(tmp_path, '[retention]\nruns = "forever"\nlogs = "forever"\nartifacts = "forever"'))
    assert set(kept.retention.model_dump().values()) == {None}


def test_computes_of_every_kind_are_read_with_their_defaults(tmp_path: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    text = DOCKER + SSH + SLURM + '[compute.l]\nkind = "local"'
    found = {name: each.model_dump() for name, each in config.load(write(tmp_path, text)).compute.items()}
    room = {"memory": None, "cpus": None}
    assert found == {
        "box": room
        | {"kind": "docker", "url": "unix:///var/run/docker.sock", "slots": cpus, "gpus": 0, "allow_mounts": ()}
        | {"user": None, "image": None, "pull": "missing"},
        "g": room
        | {"kind": "ssh", "host": "h", "user": None, "port": 22, "key_file": None, "known_hosts": None}
        | {"ssh_config": None, "agent": False, "work_dir": "~/.mlpiped", "slots": 1, "gpus": "auto", "mounts": {}}
        | {"max_sessions": 8, "keepalive": 15.0, "unreachable_timeout": 86_400.0, "python": "python3"}
        | {"store": 100 << 30},
        "s": {"kind": "slurm", "slots": 1000, "max_jobs": None, "partition": None, "account": None, "qos": None}
        | {"time": None, "via": "local", "poll_interval": 10.0, "work_dir": None, "options": ()}
        | {"apptainer": False, "modules_init": None, "shared": True}
        | {"store": 100 << 30},
        "l": room | {"kind": "local", "slots": cpus, "gpus": "auto"},
    }


def test_every_key_of_a_box_is_read(tmp_path: Path) -> None:
    text = """
[datastores.lab]
path = "/data/lab"
[compute.gpu1]
kind = "ssh"
host = "gpu1.lab"
user = "mlpiped"
port = 2222
key_file = "keys/id"
known_hosts = "known"
ssh_config = "/etc/ssh/lab_config"
agent = true
work_dir = "/scratch/mlpiped"
slots = 4
cpus = 16
memory = "64G"
gpus = 2
mounts = { lab = "/mnt/lab" }
max_sessions = 4
keepalive = "5s"
unreachable_timeout = "2h"
python = "/opt/python/bin/python3"
store = "2T"
[compute.box]
kind = "docker"
url = "unix:///run/user/1000/docker.sock"
slots = 2
gpus = "auto"
allow_mounts = ["/data/lab", "/scratch:rw"]
user = "1000:1000"
image = "python:3.11-slim"
pull = "never"
[pools]
any = ["gpu1", "box"]
"""
    found = config.load(write(tmp_path, text)).compute
    gpu1, box = found["gpu1"], found["box"]
    assert isinstance(gpu1, config.SshCompute) and isinstance(box, config.DockerCompute)
    for one in (gpu1, box):
        unset = set(type(one).model_fields) - one.model_fields_set
        assert unset <= {"memory", "cpus"}
    assert (gpu1.key_file, gpu1.known_hosts) == (tmp_path / "keys/id", tmp_path / "known")
    assert gpu1.store == 2 << 40
    assert (gpu1.mounts, gpu1.keepalive, gpu1.unreachable_timeout) == ({"lab": "/mnt/lab"}, 5, 7200)
    assert box.allow_mounts == ("/data/lab", "/scratch:rw")
    said = config.outline(tmp_path / "mlpiped.toml")
    assert said is not None and said.images["any"] == {False, True, "python:3.11-slim"}


def test_every_key_of_a_cluster_is_read(tmp_path: Path) -> None:
    text = (
        SLURM
        + """\
slots = 50
max_jobs = 20
partition = "gpu,long"
account = "ml"
qos = "normal"
time = "2h"
via = "local"
poll_interval = "30s"
work_dir = "shared"
options = ["--constraint=a100", "--exclusive"]
apptainer = "/opt/bin/apptainer"
modules_init = "/etc/profile.d/lmod.sh"
shared = true
store = "5G"
"""
    )
    found = config.load(write(tmp_path, text)).compute["s"]
    assert isinstance(found, config.SlurmCompute) and found.model_fields_set == set(config.SlurmCompute.model_fields)
    assert (found.slots, found.max_jobs, found.partition, found.time) == (50, 20, "gpu,long", 7200)
    assert (found.poll_interval, found.work_dir) == (30, tmp_path / "shared")
    assert found.options == ("--constraint=a100", "--exclusive")


@pytest.mark.parametrize(("kind", "package"), [("ssh", "asyncssh"), ("docker", "aiodocker")])
def test_a_kind_whose_package_is_not_installed_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else here(name))
    (found,) = faults(
        tmp_path, f'[compute.gpu1]\nslots = 1\nkind = "{kind}"' + ('\nhost = "h"' if kind == "ssh" else "")
    )
    assert (found.line, found.message) == (3, f"compute `gpu1` needs {package}, which is not installed")
    assert found.hint == f"pip install 'mlpiped[{kind}]'"


def test_a_mount_that_leads_to_a_forbidden_folder_by_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    text = f'[daemon]\nstate_dir = "state"\n[compute.b]\nkind = "docker"\nallow_mounts = ["{tmp_path}/link"]'
    (found,) = faults(tmp_path, text)
    assert "would give every container the state folder" in found.message


def test_files_that_a_box_needs_and_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    text = SSH + 'key_file = "key"\nknown_hosts = "known"\nssh_config = "key/config"' + DOCKER.join(["\n", ""])
    settings = config.load(write(tmp_path, text))
    assert list(config_computes.absent_files(settings.compute)) == [
        f"the `known_hosts` of compute `g` is not there: `{tmp_path}/known`",
        f"the `ssh_config` of compute `g` is not there: `{tmp_path}/key/config`",
    ]


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    settings = config.load(write(tmp_path, ""))
    with pytest.raises(ValidationError):
        settings.daemon.log = "json"  # type: ignore[misc]


DOCKER = '[compute.box]\nkind = "docker"\n'
SLURM = '[compute.s]\nkind = "slurm"\n'
SSH = '[compute.g]\nkind = "ssh"\nhost = "h"\nslots = 1\n'
SINGLE = [
    # text, line, part of the message, part of the hint
    ('[daemon]\nstat_dir = "x"', 2, "unknown key `stat_dir` in `[daemon]`", "did you mean `state_dir`?"),
    ('\n\n[deamon]\nlog = "json"', 3, "unknown section `[deamon]`", "did you mean `daemon`?"),
    ('state_dir = "x"', 1, "`state_dir` stands in no section", "`state_dir` below `[daemon]`"),
    ("[daemon]\nslots = 4", 2, "unknown key `slots` in `[daemon]`", "`slots` belongs to `[compute.NAME]`"),
    ("[daemon]\nretention = 4", 2, "unknown key `retention`", "`[retention]` is a section of its own"),
    (
        "[daemon]\nplugins = [\n  'a',\n  3,\n]",
        4,
        "`plugins` in `[daemon]` must be text (a path), not a whole number: 3",
        None,
    ),
    ('[daemon]\nplugins = "a"', 2, "must be a list, not text", 'plugins = ["a"]'),
    ('[daemon]\nlog = "jurnal"', 2, 'must be one of `journal`, `json`, `console`, not "jurnal"', 'mean "journal"?'),
    ("[daemon]\nmax_running_steps = true", 2, "must be a whole number, not true or false: true", None),
    ("[daemon]\nmax_running_steps = 0", 2, "must be at least 1: 0", None),
    ('[daemon]\nstate_dir = ""', 2, "must not be empty", None),
    ('[daemon]\nstate_dir = "a\\u0000b"', 2, "control characters", None),
    ('[daemon]\nstate_dir = "~no_such_user/x"', 2, "names a home that does not exist", "no user `no_such_user`"),
    ('[daemon]\npython = "no-such-python"', 2, "is not found on PATH", "absolute path"),
    ('[daemon]\nruntime_dir = "/' + "x" * 120 + '"', 2, "too long for a socket", "shorter path"),
    ("control = 3", 1, "`control` must be a table, not a whole number: 3", None),
    ('[daemon]\nruntime_dir = "~no_such_user/x"', 2, "names a home that does not exist", None),
    ('[control]\noperators = ["a b"]', 2, 'is neither a user nor a group: "a b"', '"@ml" for a group'),
    ("[control.http]\nlisten = 1", 1, "`[control.http]`: the API on TCP is not built yet", "Unix socket"),
    ('[datastores.lab]\nwatch = "auto"', 1, "`[datastores.lab]` needs `path`", "path"),
    ('[datastores.lab]\npath = "d"\nurl = "s3://b"', 3, "only folders work yet", "path"),
    ('[datastores.lab]\npath = "d"\npoll_interval = 30', 3, "must be a time span in quotes: 30", '"30s"'),
    ('[datastores.lab]\npath = "d"\npoll_interval = "0s"', 3, "must be more than 0", None),
    ('[datastores."../x"]\npath = "d"', 1, 'a name that cannot be used: "../x"', "letters"),
    ("[compute]\nslots = 4", 2, "`slots` in `[compute]` must be a table", "`[compute.NAME]`"),
    ("[compute.local]\nslots = 4", 1, "`[compute.local]` needs `kind`", 'kind = "local"'),
    ('[compute.c]\nkind = "local"\nslots = "4"', 3, "must be a whole number, not text", "slots = 4"),
    ('[compute.c]\nkind = "local"\nmemory = "32Q"', 3, 'is not a size: "32Q"', "32G"),
    ('[compute.c]\nkind = "local"\ncpus = inf', 3, "must be a finite number", None),
    ('[compute.c]\nkind = "loca"', 2, 'must be one of `local`, `docker`, `ssh`, `slurm`, not "loca"', '"local"?'),
    (
        "[compute.c]\nkind = 3",
        2,
        "`kind` in `[compute.c]` must be one of `local`, `docker`, `ssh`, `slurm`, not 3",
        None,
    ),
    ('[compute.c]\nkind = "local"\nhost = "h"', 3, "unknown key `host` in `[compute.c]`", 'with `kind = "ssh"`'),
    ('[compute.c]\nkind = "local"\ngpus = "all"', 3, 'must be "auto" or a number of cards: "all"', '"auto" for all'),
    ('[compute.c]\nkind = "local"\ngpus = true', 3, 'must be "auto" or a number of cards: true', None),
    ('[compute.c]\nkind = "local"\ngpus = -1', 3, 'must be "auto" or a number of cards: -1', "0 for none"),
    (DOCKER + "gpu = 1", 3, "unknown key `gpu` in `[compute.box]`", "did you mean `gpus`?"),
    (DOCKER + "url = 3", 3, "`url` in `[compute.box]` must be text, not a whole number: 3", None),
    (DOCKER + 'url = "tcp://h:2375"', 3, "must be the engine's Unix socket", "unix:///var/run/docker.sock"),
    (DOCKER + 'url = "unix://docker.sock"', 3, "must be the engine's Unix socket", None),
    (DOCKER + 'image = "-it app"', 3, 'is not the name of an image: "-it app"', "python:3.11-slim"),
    (DOCKER + 'user = "alice"', 3, 'must be "uid:gid": "alice"', "1000:1000"),
    (DOCKER + 'pull = "always"', 3, "must be one of `missing`, `never`", None),
    (DOCKER + 'allow_mounts = "/data"', 3, "must be a list, not text", 'allow_mounts = ["/data"]'),
    (DOCKER + 'allow_mounts = [\n"/data",\n"data"]', 5, 'must be an absolute path without `..`: "data"', "/data"),
    (DOCKER + 'allow_mounts = ["/data/../etc"]', 3, "must be an absolute path without `..`", None),
    (DOCKER + 'allow_mounts = ["/data:ro,z"]', 3, "has an option that is not known", "/data:rw"),
    (DOCKER + 'allow_mounts = ["/"]', 3, "would give every container the whole machine", "name the folders"),
    (DOCKER + 'allow_mounts = ["//:rw"]', 3, "would give every container the whole machine", "name the folders"),
    (DOCKER + 'allow_mounts = ["/var/run"]', 3, "the Docker engine's socket: `/var/run`", "name the folders"),
    (DOCKER + 'allow_mounts = ["/run/docker.sock:rw"]', 3, "the Docker engine's socket: `/run/docker.sock:rw`", None),
    (DOCKER + 'url = "unix:///e/d.sock"\nallow_mounts = ["/e"]', 4, "the Docker engine's socket: `/e`", None),
    (DOCKER + 'allow_mounts = ["/var/lib"]', 3, "would give every container the state folder: `/var/lib`", None),
    (DOCKER + 'allow_mounts = ["/var/lib/mlpiped/jobs"]', 3, "lies in the state folder", "without it"),
    (DOCKER + 'allow_mounts = ["/c"]\n[control]\nsocket = "/c/x.sock"', 3, "the control socket: `/c`", None),
    ('[compute.g]\nkind = "ssh"\nhost = "h"', 1, "`[compute.g]` needs `slots`", "add `slots = 4`"),
    ('[compute.g]\nkind = "ssh"\nslots = 1', 1, "`[compute.g]` needs `host`", "add `host = "),
    ('[compute.g]\nkind = "ssh"\nslots = 1\nhost = ""', 4, "must not be empty", None),
    (
        '[compute.g]\nkind = "ssh"\nslots = 1\nhost = "bob@gpu1"',
        4,
        "holds a user",
        '`host = "gpu1"` and `user = "bob"`',
    ),
    ('[compute.g]\nkind = "ssh"\nslots = 1\nhost = "-oProxyCommand=x"', 4, "is not the name of a host", None),
    ('[compute.g]\nkind = "ssh"\nslots = 1\nhost = "a b"', 4, "is not the name of a host", None),
    (SSH + "port = 0", 5, "must be at least 1: 0", None),
    (SSH + "port = 65536", 5, "must be at most 65535: 65536", None),
    (SSH + 'port = "22"', 5, "must be a whole number", "write `port = 22`, without quotes"),
    (SSH + 'user = "a b"', 5, "is not the name of a user", None),
    (SSH + 'agent = "yes"', 5, 'must be true or false, not text: "yes"', None),
    (SSH + 'known_hosts = ""', 5, "must not be empty", None),
    (SSH + 'key_file = "~no_such_user/id"', 5, "names a home that does not exist", None),
    (SSH + 'work_dir = "mlpiped"', 5, "must be a folder on that machine", "~/…"),
    (SSH + 'work_dir = "/"', 5, "must be a folder on that machine", None),
    (SSH + 'work_dir = "~/../x"', 5, "must be a folder on that machine", None),
    (SSH + 'mounts = { lab = "/mnt/lab" }', 5, "no datastore named `lab` in `mounts` of `[compute.g]`", "known: "),
    (SSH + '[compute.g.mounts]\nlba = "/m"\n[datastores.lab]\npath = "d"', 6, "no datastore named `lba`", "`lab`?"),
    (
        SSH + 'mounts = { lab = "mnt" }\n[datastores.lab]\npath = "d"',
        5,
        "must be an absolute path on that machine",
        None,
    ),
    (SSH + "keepalive = 15", 5, "must be a time span in quotes: 15", '"15s"'),
    (SSH + "max_sessions = 0", 5, "must be at least 1: 0", None),
    (SSH + 'python = "-c x"', 5, "is not one command", "python3"),
    (
        SLURM + 'via = "logn"\n[compute.login]\nkind = "ssh"\nhost = "h"\nslots = 1',
        3,
        "no compute named `logn`",
        "`login`?",
    ),
    (SLURM + 'via = "c"\n[compute.c]\nkind = "local"', 3, 'must have `kind = "ssh"`: `c` has not', "known: `local`"),
    (
        SLURM + 'via = "l"\n[compute.l]\nkind = "ssh"\nhost = "h"\nslots = 0',
        3,
        "needs `work_dir` beside `via`",
        "this machine, the login node and the nodes",
    ),
    (SLURM + 'shared = false\nwork_dir = "/w"', 3, "`shared = false` and no `via`", "the compute of the login node"),
    (SLURM + 'apptainer = "a b"', 3, "must be true, or one command", None),
    (SLURM + 'partition = "a b"', 3, "is not a name that Slurm knows", None),
    (SLURM + 'partition = "-x"', 3, "is not a name that Slurm knows", None),
    (SLURM + 'options = ["--constraint a100"]', 3, "is not an option of sbatch", "--constraint=a100"),
    (SLURM + 'options = ["-p"]', 3, "is not an option of sbatch", "one word"),
    (SLURM + 'options = ["--array=1-3"]', 3, "sets `--array`, which mlpiped sets itself", None),
    (SLURM + "max_jobs = 0", 3, "must be at least 1: 0", None),
    (SLURM + "time = 3600", 3, "must be a time span in quotes: 3600", None),
    (SLURM + 'host = "h"', 3, "unknown key `host` in `[compute.s]`", None),
    ('[pools]\ngpu = ["local", "locla"]', 2, "no compute named `locla` in pool `gpu`", "did you mean `local`?"),
    ("[pools]\ngpu = []", 2, "pool `gpu` is empty", None),
    ('[pools]\nlocal = ["local"]', 2, "pool `local` has the name of a compute", None),
    ('[retention]\nruns = "180 years ago"', 2, "is not a time span", "180d"),
    ('[notify]\non = ["failure"]', 1, "`[notify]`: notices are not built yet", "remove"),
    ("[credentials]", 1, "credentials are not built yet", "remove"),
    ("[daemon]\nlog = console", 2, "not valid TOML", "quotes"),
    ("[daemon]\nlog = 'json'\nlog = 'json'", 3, "not valid TOML", None),
    ("[[compute]]\nkind = 'local'", 1, "`compute` must be a table, not a list", None),
    ("datastores = 3", 1, "`datastores` must be a table, not a whole number: 3", None),
    ("daemon = 3", 1, "`daemon` must be a table, not a whole number: 3", None),
]


@pytest.mark.parametrize(("text", "line", "message", "hint"), SINGLE, ids=[case[2][:50] for case in SINGLE])
def test_a_fault_is_named_with_its_line_and_what_to_do(
    tmp_path: Path, text: str, line: int, message: str, hint: str | None
) -> None:
    found = faults(tmp_path, text)
    assert len(found) == 1, found
    assert (found[0].file, found[0].line) == (str(tmp_path / "mlpiped.toml"), line)
    assert message in found[0].message
    assert hint is None or hint in (found[0].hint or "")


def test_all_faults_are_reported_at_once_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """[daemon]
log = 3
colour = true
[datastores.lab]
poll_interval = "soon"
[compute.box]
kind = "slrum"
[compute.local]
kind = "local"
slots = 0
[pools]
a = ["box", "nowhere"]
[notify]
"""
    assert [fault.line for fault in faults(tmp_path, text)] == [2, 3, 4, 5, 7, 10, 12, 13]


def test_a_pool_may_name_a_compute_that_has_faults_of_its_own(tmp_path: Path) -> None:
    found = faults(tmp_path, '[compute.box]\nkind = "slrum"\n[pools]\ngpu = ["box"]')
    assert [fault.line for fault in found] == [2]


_WORD = st.sampled_from(
    ["daemon", "control", "compute", "local", "slots", "kind", "pools", "path", "x", '"q.r"', "log"]
)
_LINE = st.one_of(
    st.builds("[{}]".format, st.lists(_WORD, min_size=1, max_size=3).map(".".join)),
    st.builds("[[{}]]".format, st.lists(_WORD, min_size=1, max_size=2).map(".".join)),
    st.builds(
        "{} = {}".format,
        st.lists(_WORD, min_size=1, max_size=2).map(".".join),
        st.sampled_from(
            ["1", "-2.5", "nan", "true", '"s"', '""', "'~'", "[1, 'a', {b = 1}]", "{k = [1]}", "1979-05-27"]
        ),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_LINE, max_size=6))
def test_any_text_gives_settings_or_faults_that_each_have_a_line(tmp_path: Path, lines: list[str]) -> None:
    try:
        config.load(write(tmp_path, "\n".join(lines)))
    except ConfigError as error:
        assert error.faults
        assert all(1 <= fault.line <= len(lines) for fault in error.faults), error.faults


def test_a_value_with_control_characters_reaches_no_terminal(tmp_path: Path) -> None:
    (found,) = faults(tmp_path, '[daemon]\nlog = "\\u001b[31m"')
    assert "\x1b" not in str(found)


def test_a_file_that_is_not_utf_8_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mlpiped.toml"
    path.write_bytes(b'[daemon]\nlog = "\xff"\n')
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert caught.value.faults == (Fault(str(path), 2, "is not UTF-8 text", "save the file as UTF-8"),)


def test_a_folder_in_place_of_the_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        config.load(tmp_path)


def test_the_shipped_config_is_valid_and_so_is_the_one_that_init_writes() -> None:
    for path in (ROOT / "config/mlpiped.toml", ROOT / "mlpiped/cli/templates/init/mlpiped.toml"):
        assert config.load(path).compute["local"].kind == "local"


def test_every_commented_key_of_the_shipped_config_is_valid_when_uncommented(tmp_path: Path) -> None:
    lines = (ROOT / "config/mlpiped.toml").read_text().splitlines()
    bare = [
        line.removeprefix("# ") if line.startswith("# [") or ("# " in line[:2] and " = " in line) else line
        for line in lines
    ]
    settings = config.load(write(tmp_path, "\n".join(bare)))
    assert settings.pools == {"gpu": ("gpu1", "box")}
    assert settings.datastores["lab"].path == Path("/data/lab")
    for part in (settings.daemon, settings.control, settings.retention, *settings.compute.values()):
        assert part.model_fields_set == set(type(part).model_fields), f"{type(part)} does not show every key"
    assert {compute.kind for compute in settings.compute.values()} == set(config_computes.KINDS)


# --- finding it ---------------------------------------------------------------------------------------------
def test_the_config_is_found_at_the_option_then_the_variable_then_etc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    for path in (a, b, c):
        path.write_text("")
    monkeypatch.setattr(config_find, "SYSTEM", c)
    assert config.find(a, {"MLPIPED_CONFIG": str(b)}) == a
    assert config.find(None, {"MLPIPED_CONFIG": str(b)}) == b
    assert config.find(None, {}) == c


@pytest.mark.parametrize(
    ("explicit", "env", "message"),
    [
        (Path("/none/x.toml"), {}, "no config file at `/none/x.toml`"),
        (None, {"MLPIPED_CONFIG": "/none/y.toml"}, "which \\$MLPIPED_CONFIG names"),
        (None, {}, "neither --config nor \\$MLPIPED_CONFIG"),
    ],
)
def test_a_config_that_is_not_there_is_said_with_where_it_was_looked_for(
    explicit: Path | None, env: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_find, "SYSTEM", Path("/none/mlpiped.toml"))
    with pytest.raises(UsageError, match=message):
        config.find(explicit, env)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[daemon]\nruntime_dir = "run"',
        '[daemon]\nruntime_dir = "/r"\n[control]\nsocket = "s.sock"',
        '[control]\nsocket = "/a/../s.sock"',
    ],
)
def test_the_quick_look_for_the_socket_agrees_with_the_full_one(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert config_find.socket_of(path) == config.load(path).control.socket


@pytest.mark.parametrize("text", ["[", "control = 3\ndaemon = 4", '[daemon]\nruntime_dir = "~no_such_user/x"'])
def test_the_quick_look_for_the_socket_survives_any_file(tmp_path: Path, text: str) -> None:
    assert config_find.socket_of(write(tmp_path, text)) == Path("/run/mlpiped/control.sock")


def test_default_settings_keep_everything_below_the_state_folder(tmp_path: Path) -> None:
    settings = config.default_settings(tmp_path, slots=3)
    assert settings.control.socket == tmp_path / "run" / "control.sock"
    assert settings.compute == {"local": config.LocalCompute(kind="local", slots=3)}


# --- values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("30s", 30),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("500ms", 0.5),
        ("1.5d", 129600),
        (" 2w ", 1209600),
        ("5min", 300),
    ],
)
def test_time_spans_are_read(text: str, value: float) -> None:
    assert config_values.seconds(text) == value


@pytest.mark.parametrize("text", ["", "30", "s", "-5s", "30x", "1h-3m", 30, True, None, "１s x", "1e3s"])
def test_what_is_no_time_span_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="time span"):
        config_values.seconds(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("500", 500), ("1k", 1024), ("32G", 32 << 30), ("32 GiB", 32 << 30), ("1.5M", 3 << 19), ("2TB", 2 << 40)],
)
def test_sizes_are_read(text: str, value: int) -> None:
    assert config_values.size(text) == value


@pytest.mark.parametrize("text", ["", "G", "-1G", "3X", 3, False, "1G 2M"])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        config_values.size(text)


# --- positions ----------------------------------------------------------------------------------------------
def test_positions_are_found_through_all_of_toml() -> None:
    text = '''# a comment with [brackets] and = signs
top = "a # b"   # c
multi = """
[not.a.table]
x = 1 \\""" ""
""""
literal = \'\'\'
y = 2\'\'\'
"quoted \\u0041.key" = 'it''
dotted . key = 1
inline = { a = 1, b = { c = [1, 2] } }
list = [
  1, # one
  [2,
   3],
  { k = "]" },
]
when = 1979-05-27T07:32:00Z
[a."b.c"]
d = 0x1F
[[rows]]
n = 1
[rows.sub]
m = 1
[[rows]]
n = 2
'''.replace("'it''", "'it'")
    tomllib.loads(text)
    lines = config_lines.scan(text)
    expected = {
        ("top",): 2,
        ("multi",): 3,
        ("literal",): 7,
        ("quoted A.key",): 9,
        ("dotted", "key"): 10,
        ("inline", "b", "c", 1): 11,
        ("list", 0): 13,
        ("list", 1, 1): 15,
        ("list", 2, "k"): 16,
        ("when",): 18,
        ("a", "b.c"): 19,
        ("a", "b.c", "d"): 20,
        ("rows", 0, "n"): 22,
        ("rows", 0, "sub", "m"): 24,
        ("rows", 1, "n"): 26,
    }
    assert {path: lines.get(path) for path in expected} == expected
    assert ("not", "a", "table") not in lines


def test_the_line_of_what_is_not_written_is_that_of_what_is_around_it() -> None:
    lines = config_lines.scan("[a.b]\nc = 1\r\n[d]\r\n")
    assert config_lines.line_of(lines, ("a", "b", "missing")) == 1
    assert config_lines.line_of(lines, ("d",)) == 3
    assert config_lines.line_of(lines, ("nowhere",)) == 0
