"""mlpiped in a machine of its own, as an administrator installs and runs it, and work for it to do."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from typing import TYPE_CHECKING, Any

from harness import SDK, lines, until
from lab.rootfs import PROJECT

if TYPE_CHECKING:
    from pathlib import Path

    from nspawn import Machine

UNIT = "mlpiped.service"
WATCHDOG = 6  # seconds
# A host that has rebooted has another boot id. nspawn gives its machines one too, by a mount in /proc/sys that the
# unit's own mounts there hide: so it is put where the service sees it.
BOOT_ID = """\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'cat /proc/sys/kernel/random/boot_id > /run/boot-id'
"""
DROP_IN = f"""\
[Unit]
Requires=boot-id.service
After=boot-id.service
[Service]
BindReadOnlyPaths=/run/boot-id:/proc/sys/kernel/random/boot_id
WatchdogSec={WATCHDOG}
ReadWritePaths=/srv/lab
LoadCredential=key:/etc/hostname
"""
LAB = '\n[datastores.lab]\npath = "/srv/lab"\n'
STEP = """\
say() {{ printf '%s %s %s\\n' "$1" "$MLPIPED_TOKEN" {me} >> {effects}; }}
say start; n=0
while :; do n=$((n + 1)); echo "line $n"; [ -e {gates}/{i} ] && break; sleep 0.05; done
echo "last $n"; echo {me} > "$0"; say end
"""


class Service:
    def __init__(self, machine: Machine, wheels: tuple[str, str]) -> None:
        self.machine = machine
        self.wheels = wheels
        """File names in /project: the version that is installed first, and the next one."""

    @property
    def lab(self) -> Path:
        """The datastore; effects of steps are there too, outside of the state folder."""
        return self.machine.root / "srv/lab"

    # --- what an administrator does ---------------------------------------------------------------------------------
    def install(self) -> None:
        self.machine.run("python3", "-m", "venv", "/opt/mlpiped")
        self.upgrade(self.wheels[0])
        for name in ("mlpiped", "mlpipectl"):
            self.machine.run("ln", "-sfn", f"/opt/mlpiped/bin/{name}", f"/usr/local/bin/{name}")
        self.make("install-service")
        self.machine.run("systemd-sysusers")
        self.machine.run("systemd-tmpfiles", "--create")
        self.machine.run("install", "-d", "-o", "mlpiped", "-g", "mlpiped", "/srv/lab")
        config = self.machine.root / "etc/mlpiped/mlpiped.toml"
        config.write_text(config.read_text().replace("# slots = 4", "slots = 8", 1) + LAB)
        drop_in = self.machine.root / "etc/systemd/system/mlpiped.service.d/lab.conf"
        drop_in.parent.mkdir()
        drop_in.write_text(DROP_IN)
        (drop_in.parents[1] / "boot-id.service").write_text(BOOT_ID)
        self.machine.run("systemctl", "daemon-reload")
        self.start()

    def start(self) -> None:
        """Enable and start; AssertionError with its last words when it does not say READY."""
        if self.machine.run("systemctl", "enable", "--now", UNIT, check=False).returncode:
            words = self.machine.run("journalctl", "-n", "30", "-o", "cat", "--no-pager", "--unit", UNIT).stdout
            raise AssertionError(f"the service does not start:\n{words}")

    def upgrade(self, wheel: str) -> None:
        pip = ("/opt/mlpiped/bin/pip", "install", "--quiet", "--no-index", "--find-links", "/wheels")
        self.machine.run(*pip, "--upgrade", f"/project/{wheel}", timeout=180)

    def make(self, target: str) -> None:
        subprocess.run(
            ["make", "--no-print-directory", target, f"DESTDIR={self.machine.root}"],
            cwd=PROJECT,
            check=True,
            capture_output=True,
            timeout=60,
        )

    def restart(self) -> None:
        """Returns when it has said READY."""
        self.machine.run("systemctl", "restart", UNIT)

    @property
    def pid(self) -> int:
        """As it is known inside; 0 while there is none."""
        return int(self.machine.show(UNIT, "MainPID"))

    def fed(self) -> float:
        """When it last told the watchdog that it is well, in seconds since the boot."""
        return int(self.machine.show(UNIT, "WatchdogTimestampMonotonic")) / 1e6

    def kill(self, number: str) -> None:
        self.machine.run("systemctl", "kill", "--kill-whom=main", f"--signal={number}", UNIT)

    def comes_back(self, pid: int, timeout: float = 30) -> None:
        """Until another main process than `pid` serves."""

        def look() -> bool:
            return self.pid not in (0, pid) and self.machine.show(UNIT, "ActiveState") == "active"

        until(look, "the service is active again", timeout, pause=0.1)

    def journal(self, *fields: str) -> list[dict[str, Any]]:
        """What the service and systemd have said about it since the machine was made; oldest first. Or: what has all
        of these fields."""
        what = fields or ("--unit", UNIT)
        said = self.machine.run("journalctl", "-o", "json", "--no-pager", *what).stdout
        return [json.loads(line) for line in said.splitlines()]

    # --- what people do ---------------------------------------------------------------------------------------------
    def ctl(self, *args: object, check: bool = True) -> str:
        return self.machine.run("mlpipectl", *args, check=check).stdout

    def json(self, *args: object) -> Any:
        return json.loads(self.ctl(*args, "--json"))

    def plugin(self, name: str, body: str) -> None:
        folder = self.machine.root / "etc/mlpiped/plugins"
        (folder / f".{name}").write_text(SDK + body)
        (folder / f".{name}").rename(folder / f"{name}.py")

        def look() -> bool:
            answer = self.json("pipelines")
            assert not answer["broken"], answer["broken"]
            return name in {p["name"] for p in answer["pipelines"]}

        until(look, f"plugin `{name}` taken up")

    def end(self, run: object) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.ctl("wait", run, "--timeout", "60s", "--json", check=False))
        assert document["state"] == "finished", document
        return document


class Load:
    """A pipeline of `width` chains of `rounds` steps. Each step says `start`, prints lines until its gate is open, says
    `end`; what it says goes to a file that is not mlpiped's, with its token."""

    def __init__(self, service: Service, name: str, rounds: int, width: int = 4, more: str = "") -> None:
        self.service, self.name, self.rounds, self.width = service, name, rounds, width
        self.opened = 0
        (service.lab / f"{name}-gates").mkdir()
        (service.lab / f"{name}-gates").chmod(0o755)
        effects, gates = f"/srv/lab/{name}-effects", f"/srv/lab/{name}-gates"
        script = STEP.format(me="{me}", effects=effects, gates=gates, i="{i}")
        service.plugin(
            name,
            f"""
script = {script!r}
steps = []
for lane in range({width}):
    above = None
    for i in range({rounds}):
        out, me = PipelineData(f"o{{lane}}_{{i}}"), f"s{{lane}}-{{i}}"
        text = script.replace("{{me}}", me).replace("{{i}}", str(i))
        inputs = [above] if above is not None else []
        steps.append(CommandStep(["sh", "-c", text, out], name=me, outputs=[out], inputs=inputs{more}))
        above = out
pipeline = Pipeline("{name}", steps=steps)
""",
        )
        self.run = int(service.json("run", name)["id"])

    def effects(self) -> list[tuple[str, ...]]:
        """(what, token, step), in the order of events."""
        return [tuple(line.split()) for line in lines(self.service.lab / f"{self.name}-effects")]

    def started(self, turn: int) -> None:
        """Until every chain runs its step of this round."""
        wanted = {f"s{lane}-{turn}" for lane in range(self.width)}
        until(
            lambda: wanted <= {step for what, _, step in self.effects() if what == "start"},
            f"round {turn} of `{self.name}` has started",
            40,
        )

    def open(self, count: int = 1) -> None:
        for _ in range(count):
            (self.service.lab / f"{self.name}-gates" / str(self.opened)).touch()
            self.opened += 1

    def succeeds(self) -> dict[str, Any]:
        run = self.service.end(self.run)
        wrong = {s["name"]: (s["outcome"], s["why"]) for s in run["steps"] if s["outcome"] != "succeeded"}
        assert run["outcome"] == "succeeded", wrong
        return run

    def each_once(self) -> None:
        """Every step started once and ended once, and by one attempt."""
        run = self.succeeds()
        count = self.rounds * self.width
        found = Counter((what, step) for what, _, step in self.effects())
        assert len(found) == 2 * count, found
        assert set(found.values()) == {1}, {k: n for k, n in found.items() if n != 1}
        assert {step["attempts"] for step in run["steps"]} == {1}

    def logs_are_whole(self) -> None:
        for step in (step for _, _, step in self.effects()[::2]):
            said = self.service.ctl("logs", f"{self.run}/{step}").splitlines()
            count = len(said) - 1
            assert said == [*(f"line {n}" for n in range(1, count + 1)), f"last {count}"], (step, said[:3], said[-3:])
