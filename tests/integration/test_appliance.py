# SPDX-License-Identifier: Apache-2.0
"""The appliance as its users see it: a command that runs other commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rootvisor import kernels
from rootvisor.appliance import check
from rootvisor.appliance.host_tsc import TscMeasurement
from rootvisor.appliance.tools import QEMU, processors
from tests.integration.leftovers import TOKEN, files_of_ours, processes_with, wait_until

SOURCE = Path(__file__).resolve().parents[2] / "src"
TIMEOUT_S = 300

pytestmark = [
    pytest.mark.boot,
    pytest.mark.skipif(
        bool(check()), reason=f"the appliance cannot run here: {[str(one) for one in check()]}"
    ),
]


@pytest.fixture(scope="module")
def kernel() -> kernels.Kernel:
    return kernels.ensure("stock")


class Outer:
    """Starts outer commands that carry a token, by which what they leave behind is found."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, options: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "rootvisor.appliance", *options, "--", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=SOURCE.parent,
            env={**os.environ, "PYTHONPATH": str(SOURCE), TOKEN: self.token},
        )
        self.started.append(process)
        return process

    def close(self) -> None:
        """Ends what a test that failed has left running."""
        for process in self.started:
            process.kill()
            process.wait()

    def leftovers(self) -> list[str]:
        """Command lines of the processes that carry the token."""
        return processes_with(self.token)


@pytest.fixture
def outer(kernel: kernels.Kernel, tmp_path: Path) -> Iterator[Outer]:
    made = Outer(str(tmp_path))
    yield made
    made.close()


def test_run_streams_status_and_folders_are_the_callers(outer: Outer, tmp_path: Path) -> None:
    """100 MB come back unharmed, standard error stays apart, the status is the command's."""
    shared = tmp_path / "shared folder"
    shared.mkdir()
    script = (
        'read -r line; echo "$line" | tr a-z A-Z >&2; cat; '
        'cd "$1" && { [ -c /dev/kvm ] && nproc && pwd && cat /sys/kernel/mm/transparent_hugepage/shmem_enabled; } '
        ">inside; mount -o remount,rw / ; ! touch /usr/test-of-rootvisor || [ ! -e /rootvisor/lower ] || exit 1; exit 7"
    )
    process = outer.start("sh", "-c", script, "sh", str(shared), options=["--writable", str(shared)])
    data = os.urandom(100_000_000)
    output, errors = process.communicate(b"hello\n" + data, timeout=TIMEOUT_S)
    assert errors.startswith(b"HELLO\n")
    assert process.returncode == 7
    assert output == data
    inside = (shared / "inside").read_text().splitlines()
    assert inside == [str(processors(QEMU)), str(shared), "always within_size [advise] never deny force"]
    assert not os.path.exists("/usr/test-of-rootvisor")
    assert outer.leftovers() == []


def test_run_interrupt_reaches_the_command(outer: Outer) -> None:
    process = outer.start(
        "sh", "-c", "trap 'echo interrupted; exit 9' INT; echo up; while :; do sleep 0.1; done"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=TIMEOUT_S)[0] == b"interrupted\n"
    assert process.returncode == 9
    assert outer.leftovers() == []


def test_run_killed_leaves_nothing(outer: Outer) -> None:
    before = files_of_ours()
    process = outer.start("sh", "-c", "echo up; cat")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert any("qemu" in line for line in outer.leftovers())
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    assert wait_until(lambda: not outer.leftovers(), 5), outer.leftovers()
    assert files_of_ours() <= before


def test_run_interrupt_while_starting_ends_at_once(outer: Outer) -> None:
    process = outer.start("true")
    assert wait_until(lambda: any("qemu" in line for line in outer.leftovers()), 20)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert outer.leftovers() == []


def test_run_dead_kernel_is_tried_again_then_explained(outer: Outer) -> None:
    process = outer.start("true", options=["--append", "rdinit=/nothing init=/nothing root=/nothing"])
    _, errors = process.communicate(timeout=TIMEOUT_S)
    lines = errors.decode().splitlines()
    assert process.returncode == 125
    assert [line for line in lines if "; try " in line] == lines[:2]
    assert len(lines) == 3
    assert "Kernel panic" in lines[2]
    assert outer.leftovers() == []


def test_run_stalled_machine_counts_as_dead(outer: Outer) -> None:
    process = outer.start("true", options=["--ready-timeout", "0.5", "--qemu-arg=-S"])
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 125
    assert errors.decode().count("no sign of life for 0.5 s") == 3
    assert outer.leftovers() == []


def test_run_kernel_that_dies_later_shows_its_console(outer: Outer) -> None:
    """A panic while the program runs: one line that says so, and what the kernel had to say, to the end."""
    process = outer.start("sh", "-c", "echo up; read -r word; echo c >/proc/sysrq-trigger; sleep 100")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    _, errors = process.communicate(b"now\n", timeout=TIMEOUT_S)
    lines = errors.decode().splitlines()
    assert process.returncode == 125
    assert "while its program ran: Kernel panic - not syncing: sysrq triggered crash" in lines[-1]
    assert any("sysrq_handle_crash" in line for line in lines)
    assert lines[-2].startswith("Kernel Offset")
    assert outer.leftovers() == []


@pytest.mark.parametrize("khz_factor", [1.002, 0.995])
def test_machines_keep_time_whose_host_calibrated_its_tsc_badly(outer: Outer, khz_factor: float) -> None:
    """Loaded before Linux corrects itself, KVM would have each machine catch up with a clock that is too fast."""
    khz = TscMeasurement().khz()
    if khz is None:
        pytest.skip("there is no TSC here")
    tests = ["tests/kvm/test_clock.py", "tests/kvm/test_processors.py"]
    process = outer.start(
        *("env", "ROOTVISOR_KVM_REQUIRED=1", "PYTHONDONTWRITEBYTECODE=1"),
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests),
        options=["--append", f"tsc_early_khz={khz * khz_factor:.0f}"],
    )
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output.decode()


def test_run_truncated_kernel_is_one_line(outer: Outer, kernel: kernels.Kernel, tmp_path: Path) -> None:
    image = kernel.vmlinux or kernel.image
    broken = tmp_path / "broken"
    broken.write_bytes(image.read_bytes()[:3_000_000])
    process = outer.start("true", options=["--kernel", str(broken), "--modules", str(kernel.modules)])
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 125
    assert len(errors.decode().splitlines()) == 1
    assert outer.leftovers() == []


def test_run_timeout_ends_everything(outer: Outer) -> None:
    process = outer.start("sleep", "1000", options=["--timeout", "1"])
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 124
    assert outer.leftovers() == []


def test_clock_ticks_for_interrupts_that_the_emulator_loses(outer: Outer) -> None:
    """The interval timer interrupts about 18 times a second, whatever the kernel's own timers do (see holder.py)."""
    script = "for _ in 1 2; do awk '$1 == \"0:\" { print $2 }' /proc/interrupts; sleep 2; done"
    output, _ = outer.start("sh", "-c", script).communicate(timeout=TIMEOUT_S)
    first, second = map(int, output.split())
    assert 20 <= second - first <= 60
