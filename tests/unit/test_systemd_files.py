"""The units keep the promises that systemd has a part in."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "systemd"
UNITS = [FOLDER / "mlpiped.service", FOLDER / "user" / "mlpiped.service"]


def settings_of(unit: Path) -> dict[str, str]:
    lines = [line for line in unit.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("unit", UNITS, ids=["system", "user"])
def test_stopping_the_daemon_leaves_its_steps_and_what_they_use(unit: Path) -> None:
    found = settings_of(unit)
    assert found["KillMode"] == "process"
    assert found["Type"] == "notify"
    assert "PrivateTmp" not in found
    assert "PrivateDevices" not in found
    assert "MemoryMax" not in found


@pytest.mark.parametrize("unit", UNITS, ids=["system", "user"])
def test_what_a_restart_cannot_cure_is_not_restarted(unit: Path) -> None:
    assert {"1", "2", "75", "78"} <= set(settings_of(unit)["RestartPreventExitStatus"].split())


@pytest.mark.parametrize("unit", UNITS, ids=["system", "user"])
def test_the_control_socket_outlives_a_restart_and_nothing_limits_how_many_there_may_be(unit: Path) -> None:
    assert settings_of(unit)["FileDescriptorStoreMax"] == "1"
    assert settings_of(unit)["StartLimitIntervalSec"] == "0"


def test_every_setting_that_protects_and_is_not_there_has_its_reason() -> None:
    text = UNITS[0].read_text()
    absent = "PrivateTmp PrivateDevices DevicePolicy MemoryDenyWriteExecute PrivateNetwork IPAddressDeny PrivateUsers "
    absent += "DynamicUser Delegate ProtectProc ProcSubset MemoryMax TasksMax"
    for name in absent.split():
        assert name not in settings_of(UNITS[0])
        assert any(name in line and ":" in line for line in text.splitlines() if line.startswith("#")), name


def test_temporary_files_can_be_made_below_the_hardening() -> None:
    found = settings_of(UNITS[0])
    assert found["ProtectSystem"] == "strict"
    assert {"/tmp", "/var/tmp"} <= set(found["ReadWritePaths"].split())


@pytest.mark.parametrize("unit", UNITS, ids=["system", "user"])
def test_systemd_knows_every_line(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / "mlpiped.service"
    copy.write_text(unit.read_text().replace("/usr/local/bin/mlpiped", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60)
    assert str(copy.name) + ":" not in done.stderr, done.stderr
