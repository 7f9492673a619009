# SPDX-License-Identifier: Apache-2.0
"""``rootvisor run --as guest``: unmodified kernels as an ordinary partition, and bare-metal ones; by the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rootvisor.hypervisor.hidden import HIDEABLE
from rootvisor.tlfs import cpuid
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


#: Kernel and processors; the boots with several take minutes on a loaded machine: all but one are in `make soak`.
BOOTS = [("mshv", 1), ("stock", 1), ("mshv", 2)]
if os.environ.get("ROOTVISOR_SOAK"):
    BOOTS += [("mshv", 4), ("stock", 2), ("stock", 4)]
#: Seconds of mixed load with everything on (ROOTVISOR_GUEST_LOAD), and with each part of the interface off.
LOAD_S = float(os.environ.get("ROOTVISOR_GUEST_LOAD", "0"))
LOAD_HIDDEN_S = float(os.environ.get("ROOTVISOR_GUEST_LOAD_HIDDEN", "0"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kernel", "vps"), BOOTS)
def test_linux_boots_as_an_enlightened_guest(kernel: str, vps: int, load: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    script = f"{load} 2 || exit 9\n{EVIDENCE}" if vps > 1 else EVIDENCE
    options = ("--as", "guest", "--report", str(report), "--append", "quiet")
    words = ["--kernel", kernel, "--vps", str(vps), *options, "--", "sh", "-c", script]
    result = run_root(words, timeout_s=600)
    text = result.stdout.decode(errors="replace")
    assert result.returncode == 7, result.stderr.decode(errors="replace")[-2000:] + text[-2000:]
    dmesg = "\n".join(line[6:] for line in text.splitlines() if line.startswith("dmesg "))
    facts = json.loads(report.read_text())
    assert_enlightened(text, dmesg, vps, facts)
    assert facts["ended"] == "poweroff"


def assert_enlightened(text: str, dmesg: str, vps: int, facts: dict[str, Any]) -> None:
    """The guest uses what it was offered, and its kernel has nothing to complain of."""
    assert "Hypervisor detected: Microsoft Hyper-V" in dmesg
    assert "running as root partition" not in dmesg
    assert "/dev/mshv" not in text
    assert f"nproc {vps}" in text
    assert "Using hypercall for remote TLB flush" in dmesg
    assert "Using IPI hypercalls" in dmesg
    hints = re.search(r"hints (0x[0-9a-f]+)", dmesg)
    assert hints is not None
    if (
        int(hints[1], 16) & cpuid.RECOMMEND_APIC_MSRS
    ):  # this KVM serves EOI: most are left out by the assist page
        assert "Using enlightened APIC" in dmesg
    assert re.search("^clocks .*hyperv_clocksource_tsc_page", text, re.MULTILINE)
    assert re.search("^events Hyper-V clockevent", text, re.MULTILINE)
    timers = re.search(r"^interrupts +HVS:((?: +\d+)+)", text, re.MULTILINE)
    assert timers is not None
    assert len(timers[1].split()) == vps
    assert all(int(count) > 0 for count in timers[1].split()), "every processor's timer is a synthetic one"
    assert [line for line in dmesg.splitlines() if BAD_LINES.search(line)] == []
    if vps > 1:
        calls = facts["hypercalls"]
        assert calls.get("HVCALL_SEND_IPI", 0) + calls.get("HVCALL_SEND_IPI_EX", 0) > 0
        assert (
            sum(count for name, count in calls.items() if name.startswith("HVCALL_FLUSH_VIRTUAL_ADDRESS")) > 0
        )


@pytest.mark.skipif(not LOAD_S, reason="make soak: seconds of load in ROOTVISOR_GUEST_LOAD")
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("hidden", ["", *sorted(HIDEABLE)])
def test_linux_carries_a_mixed_load_on_four_processors(
    hidden: str, load: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forks, mappings, futexes, timers and the clock, with everything offered and with each part hidden in turn."""
    seconds = LOAD_HIDDEN_S if hidden else LOAD_S
    # Without the TSC page Linux comes out for every look at the clock: 270,000 times before it has found its PCI bus.
    patience_s = 7200 if hidden == "tsc-page" else 900
    log = tmp_path / "log"
    words = ["--as", "guest", "--vps", "4", "--console", str(log), "--append", "loglevel=4"]
    words += ["--hide", hidden] if hidden else []
    result = run_root([*words, "--", str(load), str(int(seconds))], timeout_s=seconds + patience_s)
    with capsys.disabled():
        print(f"\n{hidden or 'everything'}: {result.stdout.decode(errors='replace').strip()}")
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
    assert [line for line in log.read_text(errors="replace").splitlines() if BAD_LINES.search(line)] == []


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/guests/mixed_load.c."""
    source = Path(__file__).resolve().parents[1] / "guests" / "mixed_load.c"
    program = tmp_path_factory.mktemp("load") / "mixed_load"
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-static", "-pthread", "-o", str(program), str(source)], check=True
    )
    return program


def test_what_is_hidden_is_not_used() -> None:
    """The TSC page is left out: without it every look at the clock is an exit, and a boot takes minutes."""
    result = shell(
        "mshv", 1, EVIDENCE, "--as", "guest", "--hide", "timers", "--hide", "flush", "--hide", "apic",
        "--hide", "frequencies",
    )  # fmt: skip
    text = result.stdout.decode(errors="replace")
    assert result.returncode == 7, result.stderr.decode(errors="replace")[-2000:]
    assert not re.search("^events Hyper-V clockevent", text, re.MULTILINE)
    assert "Using hypercall for remote TLB flush" not in text
    assert "Using enlightened APIC" not in text
    assert [line for line in text.splitlines() if line.startswith("dmesg ") and BAD_LINES.search(line)] == []


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
