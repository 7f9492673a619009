# SPDX-License-Identifier: Apache-2.0
"""``rootvisor run --as guest``: unmodified kernels as an ordinary partition, and bare-metal ones; by the command."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.kvm.command import run_root, shell

BAD_LINES = re.compile(r"WARNING:|BUG:|Oops|Call Trace|soft lockup|rcu.*stall|unchecked MSR", re.IGNORECASE)
EVIDENCE = """
echo "nproc $(nproc)"
ls /dev/mshv 2>/dev/null
cat /sys/devices/system/clocksource/clocksource0/available_clocksource | sed 's/^/clocks /'
cat /sys/devices/system/clockevents/clockevent0/current_device | sed 's/^/events /'
sleep 0.2
sed 's/^/interrupts /' /proc/interrupts
dmesg | sed 's/^/dmesg /'
exit 7
"""


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/guests/multiboot.S as ELF-32."""
    source = Path(__file__).resolve().parents[1] / "guests" / "multiboot.S"
    kernel = tmp_path_factory.mktemp("multiboot") / "test.flat"
    subprocess.run(
        ["gcc", "-m32", "-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x400000,--build-id=none", "-o", str(kernel),
         str(source)],
        check=True,
    )  # fmt: skip
    return kernel


@pytest.mark.parametrize(("kernel", "vps"), [("mshv", 1), ("stock", 1)])
def test_linux_boots_as_an_enlightened_guest(kernel: str, vps: int, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = shell(kernel, vps, EVIDENCE, "--as", "guest", "--report", str(report))
    text = result.stdout.decode(errors="replace")
    assert result.returncode == 7, result.stderr.decode(errors="replace")[-2000:] + text[-2000:]
    dmesg = "\n".join(line[6:] for line in text.splitlines() if line.startswith("dmesg "))
    assert "Hypervisor detected: Microsoft Hyper-V" in dmesg
    assert "running as root partition" not in dmesg
    assert "/dev/mshv" not in text
    assert f"nproc {vps}" in text
    assert "Using hypercall for remote TLB flush" in dmesg
    assert "Using IPI hypercalls" in dmesg
    assert re.search("^clocks .*hyperv_clocksource_tsc_page", text, re.MULTILINE)
    assert re.search("^events Hyper-V clockevent", text, re.MULTILINE)
    timers = re.search(r"^interrupts +HVS:((?: +\d+)+)", text, re.MULTILINE)
    assert timers is not None
    assert all(int(count) > 0 for count in timers[1].split()), "every processor's timer is a synthetic one"
    assert [line for line in dmesg.splitlines() if BAD_LINES.search(line)] == []
    facts = json.loads(report.read_text())
    assert facts["ended"] == "poweroff"
    if vps > 1:
        assert (
            facts["hypercalls"].get("HVCALL_SEND_IPI", 0) + facts["hypercalls"].get("HVCALL_SEND_IPI_EX", 0)
            > 0
        )


def test_a_guest_that_crashes_is_reported(tmp_path: Path) -> None:
    result = shell("mshv", 1, "echo c >/proc/sysrq-trigger", "--as", "guest")
    error = result.stderr.decode(errors="replace")
    assert result.returncode == 123, error
    assert "the guest crashed; its report:" in error
    assert "sysrq" in error
    assert "crash parameters P0=" in error


@pytest.mark.parametrize("vps", [1, 3])
def test_multiboot_kernel_runs_unmodified_and_gives_the_status(flat: Path, vps: int) -> None:
    words = [
        "--as",
        "guest",
        "--kernel",
        str(flat),
        "--vps",
        str(vps),
        "--memory",
        "128M",
        "--append",
        "one two",
    ]
    result = run_root(words)
    assert result.stdout.replace(b"\r", b"") == b"test.flat one two\nMicrosoft Hv\n", result.stderr
    assert result.returncode == 2 * vps + 1
