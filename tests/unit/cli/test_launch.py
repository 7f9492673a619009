# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import marshal
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import rootvisor.appliance
from rootvisor.appliance import ApplianceError, Request
from rootvisor.cli import launch
from rootvisor.cli.description import Disk, KernelImage, RunDescription
from rootvisor.cli.engine import EngineChoice
from rootvisor.cli.errors import UserError
from rootvisor.cli.prepare import RunPlan
from rootvisor.cli.run_folder import run_folder

SOURCE = Path(launch.__file__).parents[2]


def _plan(engine: str, **fields: Any) -> RunPlan:
    values: dict[str, Any] = {
        "kernel": KernelImage("/k", None, "k", "1"), "initrds": ("/i",), "append": "", "vps": 1,
        "memory_bytes": 512 << 20, "rootfs": None, "rootfs_path": None, "command": None, "tty": False, "disks": (),
        "devices": (), "scheduler": "hypervisor", "trace": None, "timeout_s": None, "console_log": None,
        "on_reboot": "exit",
    }  # fmt: skip
    return RunPlan(
        EngineChoice(engine, "test"), RunDescription(**{**values, **fields}), agent=False, debug=False
    )


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """An appliance that reads the description and writes the machine's files, as the machine would."""
    seen: list[Request] = []

    def run(request: Request) -> int:
        seen.append(request)
        description = marshal.loads(Path(request.argv[-1]).read_bytes())
        for name in ("trace", "report", "console_log"):
            if description[name] and description[name] != "stderr":
                Path(description[name]).write_text(name)
        return 7

    monkeypatch.setattr(rootvisor.appliance, "run", run)
    return seen


def test_appliance_gets_the_request_and_leaves_no_folder(requests: list[Request], own_cache: Path) -> None:
    assert launch.run_with_streams(_plan("appliance", timeout_s=5.0), (0, 1, 2)) == 7
    (request,) = requests
    assert request.argv[1:3] == ["-I", "-S"]
    assert request.memory_mib == 512 + 1024
    assert request.timeout is not None
    assert request.timeout > 5
    assert request.writable == []
    assert list((own_cache / "runs").iterdir()) == []


def test_files_of_the_machine_come_back_from_the_appliance(requests: list[Request], tmp_path: Path) -> None:
    target = tmp_path / "boot.trace"
    launch.run_with_streams(_plan("appliance", trace=str(target), console_log="stderr"), (0, 1, 2))
    assert target.read_text() == "trace"
    assert requests[0].writable != []


def test_folder_of_a_writable_disk_is_shared(requests: list[Request], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "img").touch()
    disks = (Disk(str(tmp_path / "a" / "img")), Disk(str(tmp_path / "b" / "img"), readonly=True))
    launch.run_with_streams(_plan("appliance", disks=disks), (0, 1, 2))
    assert requests[0].writable == [str(tmp_path / "a")]


def test_block_device_is_out_of_the_appliances_reach() -> None:
    with pytest.raises(UserError, match="use an image file"):
        launch.run_with_streams(_plan("appliance", disks=(Disk("/dev/null"),)), (0, 1, 2))


def test_error_of_the_appliance_is_one_line(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    def run(_request: Request) -> int:
        raise ApplianceError("it died; try again")

    monkeypatch.setattr(rootvisor.appliance, "run", run)
    with pytest.raises(UserError, match="it died; try again"):
        launch.run_with_streams(_plan("appliance"), (0, 1, 2))
    assert list((own_cache / "runs").iterdir()) == []


def test_local_machine_reads_the_description_from_an_inherited_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "import sys, marshal; print(marshal.loads(open(sys.argv[1], 'rb').read())['memory_bytes']); sys.exit(9)"
    monkeypatch.setattr(launch, "inner_argv", lambda path, _debug: [sys.executable, "-c", script, path])
    output = tmp_path / "output"
    before = len(os.listdir("/proc/self/fd"))
    with output.open("wb") as stdout:
        assert launch.run_with_streams(_plan("kvm"), (0, stdout.fileno(), 2)) == 9
    assert output.read_text() == f"{512 << 20}\n"
    assert len(os.listdir("/proc/self/fd")) == before


def test_local_machine_that_is_killed_has_a_shells_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "inner_argv", lambda *_: ["/bin/sh", "-c", "kill -9 $$"])
    assert launch.run_with_streams(_plan("kvm"), (0, 1, 2)) == 137


def test_run_folder_vanishes_when_its_process_is_killed(own_cache: Path) -> None:
    program = (
        "from rootvisor.cli.run_folder import run_folder\n"
        "import os\n"
        "with run_folder() as folder:\n"
        "    (folder / 'file').touch(); print(folder, flush=True); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    folder = Path(done.stdout.strip())
    assert folder.parent == own_cache / "runs"
    deadline = time.monotonic() + 20
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not folder.exists()


def test_run_folder_is_private() -> None:
    with run_folder() as folder:
        assert folder.stat().st_mode & 0o077 == 0


def test_inner_reports_an_unexpected_error_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "description"
    path.write_bytes(marshal.dumps(5))
    done = subprocess.run(
        launch.inner_argv(str(path), False), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("rootvisor: internal error: ")
    assert done.stderr.count("\n") == 1
