"""The service below a real systemd: restarted, killed, hung, upgraded and rebooted while steps run.

What happened is judged by a file that the steps themselves append to, outside of the state folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import lines, until
from lab import packages, rootfs
from nspawn import CannotBoot, Machine
from service_rig import UNIT, WATCHDOG, Load, Service

from mlpiped.backends.ssh.agent import script

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]

EXPOSURE = 4.0
RESTARTS = 20
NEXT = "0.1.0.post1"
NEEDS = """
import mmap, multiprocessing, os, pathlib, socket, tempfile
with tempfile.NamedTemporaryFile() as file:
    file.write(b"x")
    assert file.name.startswith("/tmp/")
multiprocessing.Lock()  # /dev/shm
with multiprocessing.get_context("spawn").Pool(2) as pool:
    assert pool.map(abs, [-1, 2]) == [1, 2]
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)  # what a JIT does
os.sched_setaffinity(0, {next(iter(os.sched_getaffinity(0)))})
os.nice(5)
socket.create_server(("127.0.0.1", 0)).close()
assert pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
assert os.access(os.path.expanduser("~"), os.W_OK)
open("/srv/lab/published", "w").close()
print("all there")
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """One machine for all tests: each brings a pipeline of its own, and leaves the service running."""
    if (reason := rootfs.why_not()) is not None:
        packages.not_here(reason)
    root, wheels = rootfs.root(), rootfs.wheels()
    with tempfile.TemporaryDirectory(prefix="mlpd-wheel-") as folder:
        os.chmod(folder, 0o755)
        now, following = rootfs.wheel(Path(folder)), rootfs.wheel(Path(folder), NEXT)
        machine = Machine(root, {"/wheels": wheels, "/project": Path(folder)})
        try:
            try:
                machine.boot()
            except CannotBoot as fault:
                packages.not_here(str(fault))
            service = Service(machine, (now.name, following.name))
            service.install()
            yield service
        finally:
            machine.close()


def test_a_plugin_and_data_dropped_in_are_worked_on(service: Service) -> None:
    (service.lab / "in").mkdir(exist_ok=True)
    service.plugin(
        "landing",
        """
samples = DataReference(lab, "in/*.csv")
count = CommandStep(["wc", "-l", samples], name="count")
pipeline = Pipeline("landing", steps=[count], triggers=[OnArrival(samples, settle="0.2s")])
""",
    )
    (service.lab / "in" / "a.csv").write_text("1\n2\n3\n")
    runs = until(lambda: service.json("runs", "--pipeline", "landing")["runs"], "a run of `landing`")
    assert service.end(runs[0]["id"])["outcome"] == "succeeded"
    assert service.ctl("logs", f"{runs[0]['id']}/count").startswith("3 ")
    assert service.machine.show(UNIT, "StatusText") != ""


def test_exposure_stays_low(service: Service) -> None:
    said = service.machine.run("systemd-analyze", "security", "--no-pager", UNIT, check=False).stdout
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", said)
    assert found, said
    print(found[0])
    assert float(found[1]) <= EXPOSURE, said


def test_a_box_whose_logind_ends_steps_with_the_connection_says_so(service: Service) -> None:
    """Nothing that is started there would outlive its connection. As who logs in to it finds it; root's stay."""
    boot = service.machine.root / "tmp/boot.sh"
    boot.write_bytes(script("boot.sh"))
    drop_in = service.machine.root / "etc/systemd/logind.conf.d/lab.conf"
    drop_in.parent.mkdir()

    def told(settings: str, *, root: bool = False) -> bool:
        drop_in.write_text(f"[Login]\n{settings}\n")
        service.machine.run("systemctl", "restart", "systemd-logind")
        who = [] if root else ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        said = service.machine.run(*who, "env", "XDG_SESSION_ID=1", "sh", "/tmp/boot.sh", check=False).stdout
        return "x its logind ends steps with the connection" in said

    try:
        assert told("KillUserProcesses=yes")
        assert not told("KillUserProcesses=yes", root=True)
        assert not told("KillUserProcesses=no")
    finally:
        drop_in.unlink()
        service.machine.run("systemctl", "restart", "systemd-logind")


def test_the_hardening_breaks_nothing_that_steps_need(service: Service) -> None:
    (service.machine.root / "etc/mlpiped/plugins/needs").mkdir()
    (service.machine.root / "etc/mlpiped/plugins/needs/needs.py").write_text(
        "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in NEEDS.splitlines())
    )
    service.plugin(
        "needs",
        'pipeline = Pipeline("needs", steps=[PythonScriptStep("needs.py", source_directory="needs", name="needs")])\n',
    )
    run = service.end(service.json("run", "needs")["id"])
    assert run["outcome"] == "succeeded", run["steps"][0]["why"]


def test_steps_get_nothing_that_is_meant_for_the_daemon(service: Service) -> None:
    service.plugin("env", 'pipeline = Pipeline("env", steps=[CommandStep(["env"], name="env", effect=True)])\n')
    run = service.end(service.json("run", "env")["id"])
    names = {line.partition("=")[0] for line in service.ctl("logs", f"{run['id']}/env").splitlines()}
    assert "MLPIPED_TOKEN" in names
    alien = {"NOTIFY_SOCKET", "INVOCATION_ID", "JOURNAL_STREAM", "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "MAINPID"}
    assert not names & alien
    assert not [name for name in names if name.startswith(("WATCHDOG_", "LISTEN_", "CREDENTIALS_"))]


def test_what_the_service_owns_is_its_own_and_outlives_a_stop(service: Service) -> None:
    machine = service.machine
    owned = ("stat", "--format=%a %U %G", "/var/lib/mlpiped", "/run/mlpiped", "/run/mlpiped/control.sock")
    folders = ["700 mlpiped mlpiped", "750 mlpiped mlpiped"]
    assert machine.run(*owned).stdout.splitlines() == [*folders, "660 mlpiped mlpiped"]
    home, shell = machine.run("getent", "passwd", "mlpiped").stdout.strip().split(":")[-2:]
    assert home == "/var/lib/mlpiped" and shell.endswith("nologin")
    machine.run("systemctl", "stop", UNIT)
    assert machine.run(*owned[:4]).stdout.splitlines() == folders  # steps that run on have theirs below it
    service.start()


def test_when_memory_runs_out_steps_go_before_the_daemon(service: Service) -> None:
    assert service.machine.show(UNIT, "OOMScoreAdjust") == "-500"
    lower = service.machine.run("sh", "-c", "echo -500 > /proc/self/oom_score_adj", check=False).returncode == 0
    spared = -500 if lower else 0  # some hosts let no machine of theirs put itself above others
    load = Load(service, "scores", 1, width=1)
    load.started(0)
    found: dict[str, set[int]] = {}
    proc = service.machine.root / "proc"
    for pid in (entry.name for entry in proc.iterdir() if entry.name.isdigit()):
        try:
            if UNIT in (proc / pid / "cgroup").read_text():
                words = (proc / pid / "cmdline").read_text().split("\0")
                ours = any(word.endswith("supervisor.py") for word in words)
                what = "daemon" if pid == str(service.pid) else "supervisor" if ours else "step"
                found.setdefault(what, set()).add(int((proc / pid / "oom_score_adj").read_text()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    assert found == {"daemon": {spared}, "supervisor": {spared}, "step": {500}}
    load.open()
    load.each_once()


def test_mlpipectl_waits_while_the_service_restarts_instead_of_failing(service: Service) -> None:
    answers = service.lab / "answers"
    ask = "while [ ! -e /tmp/enough ]; do mlpipectl status >/dev/null || exit 1; echo ok >> /srv/lab/answers; done"
    client = subprocess.Popen(service.machine.enter("sh", "-c", ask), stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(8):
            count = len(lines(answers))
            service.restart()
            until(lambda: client.poll() is not None or len(lines(answers)) > count + 2, "answers")  # noqa: B023
        (service.machine.root / "tmp/enough").touch()
        wrong = client.communicate(timeout=30)[1]
    finally:
        client.kill()
    assert client.returncode == 0, wrong
    service.machine.run("systemctl", "stop", UNIT)
    assert service.machine.run("mlpipectl", "status", check=False).returncode == 3  # at once, when it is down for good
    service.start()


def test_twenty_restarts_under_load_lose_no_step_and_repeat_none(service: Service) -> None:
    load = Load(service, "restarts", RESTARTS)
    for turn in range(RESTARTS):
        load.started(turn)
        pid = service.pid
        if turn % 2:  # half of the time steps end while there is no daemon, half of the time right after it is back
            load.open()
        service.restart()
        assert service.pid not in (0, pid)
        if not turn % 2:
            load.open()
    load.each_once()
    load.logs_are_whole()


def test_kill_9_of_the_main_process_loses_no_step_and_repeats_none(service: Service) -> None:
    load = Load(service, "kills", 3)
    for turn in range(3):
        load.started(turn)
        pid = service.pid
        service.kill("SIGKILL")
        load.open()
        service.comes_back(pid)
    load.each_once()
    load.logs_are_whole()


def test_a_hung_daemon_is_restarted_by_the_watchdog_and_no_other_is(service: Service) -> None:
    load = Load(service, "hang", 2)
    load.started(0)
    pid = service.pid
    service.kill("SIGSTOP")
    load.open()
    service.comes_back(pid)
    load.started(1)
    load.open()
    load.each_once()
    load.logs_are_whole()
    pid, fed = service.pid, service.fed()
    until(lambda: service.fed() > fed + WATCHDOG, "a daemon that is well is fed for longer than the watchdog waits")
    assert service.pid == pid
    barks = [entry["MESSAGE"] for entry in service.journal() if "Watchdog timeout" in str(entry["MESSAGE"])]
    assert len(barks) == 1, barks


def test_an_upgrade_is_taken_up_by_a_restart_and_running_steps_live_through_it(service: Service) -> None:
    load = Load(service, "upgrade", 4)
    load.started(0)
    before = service.json("status")["daemon"]["version"]
    service.upgrade(service.wheels[1])
    load.open()
    load.started(1)  # by the daemon that still runs, whose files have been replaced
    assert service.json("status")["daemon"]["version"] == before
    service.restart()
    assert service.json("status")["daemon"]["version"] == NEXT != before
    load.open()
    load.started(2)
    load.open(2)
    load.each_once()
    load.logs_are_whole()


def test_reload_takes_up_plugins_and_keeps_the_process(service: Service) -> None:
    pid = service.pid
    service.machine.run("systemctl", "reload", UNIT)
    until(lambda: service.machine.show(UNIT, "ActiveState") == "active", "the reload is over")
    assert service.pid == pid
    assert service.json("status")["daemon"]["pid"] == pid


def test_the_journal_has_priorities_and_fields(service: Service) -> None:
    service.restart()
    pid = service.pid
    (serving,) = (
        entry
        for entry in service.journal("MLPIPED_EVENT=serving", f"_PID={pid}")
        if json.loads(entry["MESSAGE"])["event"] == "serving"
    )
    assert serving["PRIORITY"] == "6"
    assert serving["_SYSTEMD_UNIT"] == UNIT
    assert serving["SYSLOG_IDENTIFIER"] == "mlpiped"
    assert serving["MLPIPED_SOCKET"] == "/run/mlpiped/control.sock"
    assert int(serving["MLPIPED_PIPELINES"]) >= 0
    assert not [entry for entry in service.journal() if "Traceback" in str(entry["MESSAGE"])]


def test_somebody_without_root_runs_a_daemon_of_his_own(service: Service) -> None:
    machine = service.machine
    machine.run("useradd", "--create-home", "alice")
    machine.run("loginctl", "enable-linger", "alice")
    uid = machine.run("id", "-u", "alice").stdout.strip()
    until(lambda: machine.show(f"user@{uid}.service", "ActiveState") == "active", "alice's systemd")
    person = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--init-groups", "env", "HOME=/home/alice")
    config = "/home/alice/.config/mlpiped"
    settings = (f"XDG_RUNTIME_DIR=/run/user/{uid}", f"MLPIPED_CONFIG={config}/mlpiped.toml")

    def alice(*argv: object) -> str:
        return machine.run(*person, *settings, *argv).stdout

    alice("mlpiped", "init", config)
    wait = 'CommandStep("until [ -e ~/gate ]; do sleep 0.05; done", name="wait")'
    plugin = f'from mlpiped import CommandStep, Pipeline\npipeline = Pipeline("gated", steps=[{wait}])\n'
    alice("sh", "-c", f"printf %s '{plugin}' > {config}/plugins/gated.py")
    alice("systemctl", "--user", "enable", "--now", UNIT)
    alice("mlpipectl", "run", "gated")
    until(lambda: alice("mlpipectl", "show", "gated:latest", "--json").count('"running"') == 2, "its step runs")
    alice("systemctl", "--user", "restart", UNIT)
    alice("touch", "/home/alice/gate")
    run = json.loads(alice("mlpipectl", "wait", "gated:latest", "--json"))
    assert run["outcome"] == "succeeded"
    assert run["steps"][0]["attempts"] == 1
    alice("systemctl", "--user", "disable", "--now", UNIT)


def test_after_a_reboot_steps_that_ran_run_again_as_new_attempts_and_the_others_do_not(service: Service) -> None:
    load = Load(service, "reboot", 3)
    load.started(0)
    load.open()
    load.started(1)
    service.machine.reboot()
    until(lambda: service.machine.show(UNIT, "ActiveState") == "active", "the service after the reboot", 30)
    load.open(2)
    run = load.succeeds()
    effects = load.effects()
    ends = [step for what, _, step in effects if what == "end"]
    assert sorted(ends) == sorted({step["name"] for step in run["steps"]})
    tokens = [token for what, token, _ in effects if what == "start"]
    assert len(tokens) == len(set(tokens))
    attempts = {step["name"]: step["attempts"] for step in run["steps"]}
    assert attempts == {name: 2 if name.endswith("-1") else 1 for name in attempts}
    load.logs_are_whole()


def test_uninstalling_the_service_leaves_the_state_and_it_goes_on_when_installed_again(service: Service) -> None:
    runs = service.json("runs", "-n", 1000)["runs"]
    service.machine.run("systemctl", "disable", "--now", UNIT)
    service.make("uninstall-service")
    service.machine.run("systemctl", "daemon-reload")
    assert service.machine.run("systemctl", "cat", UNIT, check=False).returncode != 0
    assert service.machine.run("mlpipectl", "status", check=False).returncode == 3
    assert (service.machine.root / "var/lib/mlpiped/ledger.sqlite3").exists()
    service.make("install-service")
    service.machine.run("systemctl", "daemon-reload")
    service.start()
    assert service.json("runs", "-n", 1000)["runs"] == runs
