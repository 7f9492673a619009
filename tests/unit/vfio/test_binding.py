# SPDX-License-Identifier: Apache-2.0
"""The keeper that brings devices back, on a folder that looks like sysfs: files, where sysfs has attributes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rootvisor.vfio import binding
from rootvisor.vfio.binding import Binding
from rootvisor.vfio.errors import VfioError
from rootvisor.vfio.host_device import find
from tests.unit.vfio.sysfs import FakeHost

NIC = "0000:01:00.0"
SOURCE = Path(__file__).resolve().parents[3] / "src"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device without a driver, which is VFIO's as soon as somebody has its drivers probed."""
    host = FakeHost(tmp_path)
    path = host.add(NIC)
    driver = tmp_path / "sys/bus/pci/drivers/vfio-pci"
    driver.mkdir(parents=True)
    (driver / "unbind").touch()
    monkeypatch.setattr(binding, "_PROBE", str(path / "probe"))
    (path / "probe").touch()
    original = binding._write

    def write(name: str, text: str) -> None:
        original(name, text)
        if name == binding._PROBE:
            (path / "driver").symlink_to(driver)

    monkeypatch.setattr(binding, "_write", write)
    return path


def test_a_device_is_bound_and_comes_back(folder: Path) -> None:
    bound = Binding([find(NIC, str(folder.parent))])
    assert (folder / "driver_override").read_text().startswith("vfio-pci")
    assert os.readlink(folder / "driver").endswith("vfio-pci")
    bound.close()
    assert (folder / "driver_override").read_text() == "\n"
    assert (folder / "driver/unbind").read_text() == f"{NIC}\n"


def test_a_device_that_is_vfios_already_is_left_alone(folder: Path) -> None:
    (folder / "driver").symlink_to(folder.parents[1] / "drivers/vfio-pci")
    Binding([find(NIC, str(folder.parent))]).close()
    assert (folder / "driver_override").read_text() == "(null)\n"


def test_a_driver_that_does_not_take_it_is_told_and_the_device_goes_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "_SETTLE_S", 0.05)
    monkeypatch.setattr(binding, "_PROBE", str(folder / "driver_override"))
    (folder / "driver_override").chmod(0o644)
    monkeypatch.setattr(binding, "_write", lambda name, text: None)
    with pytest.raises(VfioError, match="vfio-pci does not take"):
        Binding([find(NIC, str(folder.parent))])
    assert (folder / "driver_override").read_text() == "\n"


def test_a_killed_process_leaves_the_keeper_to_bring_it_back(folder: Path) -> None:
    (folder / "driver").symlink_to(folder.parents[1] / "drivers/vfio-pci")
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from rootvisor.vfio.binding import Binding\n"
        "from rootvisor.vfio.host_device import find\n"
        "device = find(sys.argv[2], sys.argv[3])\n"
        "device.driver = ''\n"
        "keeper = Binding([])\n"
        "keeper._start_keeper([device])\n"
        "print(keeper._keeper, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(SOURCE), NIC, str(folder.parent)],
        stdout=subprocess.PIPE,
        timeout=30,
    )
    assert done.returncode == -9
    keeper = os.pidfd_open(int(done.stdout)) if Path(f"/proc/{int(done.stdout)}").exists() else -1
    if keeper >= 0:  # it is nobody's child any more; its end makes the descriptor readable
        import select

        assert select.select([keeper], [], [], 30)[0]
        os.close(keeper)
    assert (folder / "driver/unbind").read_text() == f"{NIC}\n"
