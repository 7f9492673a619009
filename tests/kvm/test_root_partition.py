# SPDX-License-Identifier: Apache-2.0
"""Unmodified kernels boot as the root partition, work there, and end as they are told; by the command that users type.

Needs a usable /dev/kvm: on other machines the whole folder runs inside one appliance (tests/integration).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.kvm.command import DEADLINE_S, RUN, await_processor, bare_kernel, run_root, shell

BAD_LINES = re.compile(
    r"WARNING:|BUG:|Oops|Call Trace|soft lockup|rcu.*stall|unchecked MSR|Disabling IBT", re.IGNORECASE
)


EVIDENCE = """
echo "nproc $(nproc)"
echo "kernel $(uname -r)"
ls -l /dev/mshv 2>/dev/null | sed 's/^/device /'
for cpu in /sys/devices/system/cpu/cpu[1-9]*; do
    [ -e $cpu/online ] || continue
    echo 0 >$cpu/online && echo "off $(nproc)"
    echo 1 >$cpu/online && echo "on $(nproc)"
done
grep -c HV-PCI-MSI /proc/interrupts | sed 's/^/msi /'
head -c 65536 /dev/hwrng | wc -c | sed 's/^/entropy /'
ls /usr/bin/env >/dev/null && echo "files host"
touch /usr/rootvisor-test && echo "overlay writable"
dmesg | sed 's/^/dmesg /'
"""


@pytest.mark.parametrize("vps", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["stock", "mshv"])
def test_kernel_boots_as_root_partition(kernel: str, vps: int, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = shell(kernel, vps, EVIDENCE, "--report", str(report))
    text = result.stdout.decode(errors="replace")
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:] + text[-2000:]
    lines = text.splitlines()
    dmesg = [line for line in lines if line.startswith("dmesg ")]
    assert f"nproc {vps}" in lines
    assert any("Hyper-V: running as root partition" in line for line in dmesg)
    assert [line for line in dmesg if BAD_LINES.search(line)] == []
    assert lines.count(f"off {vps - 1}") == vps - 1
    assert lines.count(f"on {vps}") == vps - 1
    assert any(re.fullmatch(r"msi [1-9]\d*", line) for line in lines)
    assert "entropy 65536" in lines
    assert "files host" in lines
    assert "overlay writable" in lines
    assert any(line.startswith("device crw") for line in lines) == (kernel == "mshv")
    facts = json.loads(report.read_text())
    assert facts["ended"] == "poweroff"
    assert facts["interrupts"]["delivered"] > 0
    assert facts["interrupts"]["blocked"] == 0
    assert facts["hypercalls"].get("HVCALL_CREATE_VP", 0) == vps - 1
    assert facts["deposits"]["in_use"] == 0


def test_exit_status_and_streams_of_the_command_pass_through() -> None:
    result = shell("mshv", 1, "tr a-z A-Z; echo low >&2; exit 7", stdin=b"shout\n\x00\xff")
    assert result.returncode == 7
    assert result.stdout == b"SHOUT\n\x00\xff"
    assert result.stderr == b"low\n"


def test_bulk_data_comes_back_unharmed() -> None:
    megabytes = int(os.environ.get("ROOTVISOR_BULK_MB", "16"))
    data = hashlib.shake_256(b"rootvisor").digest(1 << 20) * megabytes
    result = run_root(["--kernel", "mshv", "--", "cat"], stdin=data)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("kernel", ["stock", "mshv"])
def test_poweroff_ends_with_status_0(kernel: str) -> None:
    result = shell(kernel, 2, "echo before; poweroff; while :; do sleep 1; done")
    assert (result.returncode, result.stdout) == (0, b"before\n"), result.stderr


@pytest.mark.parametrize("kernel", ["stock", "mshv"])
def test_reboot_ends_with_status_122(kernel: str) -> None:
    result = shell(kernel, 2, "reboot; while :; do sleep 1; done")
    assert result.returncode == 122, result.stderr


@pytest.mark.parametrize("kernel", ["stock", "mshv"])
def test_panic_ends_with_status_123_and_the_report(kernel: str) -> None:
    result = shell(kernel, 2, "echo c >/proc/sysrq-trigger")
    assert result.returncode == 123, result.stderr
    text = result.stderr.decode(errors="replace")
    assert "sysrq triggered crash" in text
    assert "crash parameters" in text


def test_command_that_never_ends_meets_the_timeout() -> None:
    result = run_root(["--kernel", "mshv", "--", "sleep", "1000"], timeout_s=25)
    assert result.returncode == 124
    assert b"did not end in time" in result.stderr


def test_kernel_that_never_reaches_user_space_meets_the_timeout() -> None:
    result = run_root(
        ["--kernel", "mshv", "--append", "rdinit=/nothing init=/nothing panic=0", "--", "true"], timeout_s=30
    )
    # The kernel panics without an init, which is a crash report; one that hangs would be a time-out.
    assert result.returncode in (123, 124)
    assert result.stderr


def test_disk_survives_a_sudden_kill_up_to_the_last_flush(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    blocks = 64
    with image.open("wb") as file:
        file.truncate(blocks * 2 * 65536)
    # Each block is announced only after the flush that covers it.
    script = """
    n=0
    while [ $n -lt 64 ]; do
        tag=$(printf '%08d' $n)
        yes "$tag" | head -c 65536 |
            dd of=/dev/vda bs=65536 seek=$n count=1 iflag=fullblock conv=notrunc,fsync 2>/dev/null
        echo "$n"
        n=$((n + 1))
    done
    sleep 1000
    """
    command = [
        *(*RUN, "--kernel", "mshv"),
        *("--disk", f"path={image}", "--", "sh", "-c", script),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout is not None
    acknowledged = -1
    try:
        for line in process.stdout:
            acknowledged = int(line)
            if acknowledged >= 20:
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert acknowledged >= 20
    with image.open("rb") as file:
        for number in range(acknowledged + 1):
            expected = (f"{number:08d}\n".encode() * 7282)[:65536]
            assert file.read(65536) == expected, f"block {number} of {acknowledged} is not what was flushed"


def test_readonly_disk_refuses_writes(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"untouched".ljust(1 << 20, b"\0"))
    script = (
        'head -c 9 /dev/vda; dd if=/dev/zero of=/dev/vda bs=512 count=1 oflag=direct 2>/dev/null; echo " $?"'
    )
    result = run_root(["--kernel", "mshv", "--disk", f"path={image},readonly=on", "--", "sh", "-c", script])
    assert result.stdout == b"untouched 1\n", result.stderr
    assert image.read_bytes().startswith(b"untouched")


def test_triple_fault_ends_with_status_121(tmp_path: Path) -> None:
    kernel = bare_kernel(tmp_path / "ud2", bytes.fromhex("0f0b"))  # the IDT is empty: #UD, #DF, shutdown
    result = run_root(["--kernel", str(kernel), "--", "true"])
    assert result.returncode == 121
    assert b"triple fault" in result.stderr


def test_kernel_that_hangs_meets_the_timeout(tmp_path: Path) -> None:
    kernel = bare_kernel(tmp_path / "hang", bytes.fromhex("faebfe"))
    result = run_root(["--kernel", str(kernel), "--", "true"], timeout_s=3)
    assert result.returncode == 124
    assert b"did not reach user space" in result.stderr


def test_kernel_that_halts_is_interrupted_by_a_signal(tmp_path: Path) -> None:
    kernel = bare_kernel(tmp_path / "halt", bytes.fromhex("faf4ebfd"))
    process = subprocess.Popen(
        [*RUN, "--kernel", str(kernel), "--", "true"],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    await_processor(process)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_two_runs_at_once_do_not_meet() -> None:
    command = [*RUN, "--kernel", "mshv", "--", "echo"]
    runs = [
        subprocess.Popen(
            [*command, name], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
        )
        for name in ("one", "two")
    ]
    assert [run.communicate(timeout=DEADLINE_S)[0] for run in runs] == [b"one\n", b"two\n"]
    assert [run.returncode for run in runs] == [0, 0]


def test_reader_that_goes_away_ends_the_command() -> None:
    command = [*RUN, "--kernel", "mshv", "--", "yes"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(timeout=DEADLINE_S) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_restart_on_reboot_boots_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    # The first boot leaves a mark on the disk and reboots, the second finds it.
    script = """
    if [ "$(head -c 4 /dev/vda)" = mark ]; then echo again; exit 5; fi
    printf mark | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null
    echo first; reboot; while :; do sleep 1; done
    """
    result = run_root(
        ["--kernel", "mshv", "--on-reboot", "restart", "--disk", f"path={disk}", "--", "sh", "-c", script]
    )
    assert (result.returncode, result.stdout) == (5, b"first\nagain\n"), result.stderr
