# SPDX-License-Identifier: Apache-2.0
"""The root partition works physical devices itself: Linux's own drivers, interrupts through the hypervisor."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from rootvisor.boot.memory_map import MemoryMap
from rootvisor.hypervisor.overlay import OwnedPages
from rootvisor.trace.lines import TraceLines
from tests.hardware.conftest import DEVICES, DMA, NIC, NVME, await_true, driver
from tests.kvm.command import DEADLINE_S, RUN, run_root

MIB = 1 << 20
AIM = Path(__file__).with_name("aim.py")


def words(result: subprocess.CompletedProcess[bytes]) -> str:
    return result.stdout.decode(errors="replace") + result.stderr.decode(errors="replace")


# Blocks are written directly and read back past all caches, one processor going off-line and on-line meanwhile; then
# the network card fetches a file of this machine's, and sends it back.
WORK = r"""
set -e
disk=/dev/nvme0n1
dd if=/dev/urandom of=/tmp/pattern bs=1M count=8 2>/dev/null
(for n in 1 2 3 4; do echo 0 >/sys/devices/system/cpu/cpu1/online; echo 1 >/sys/devices/system/cpu/cpu1/online; done) &
for turn in 1 2 3; do
    dd if=/tmp/pattern of=$disk bs=128k oflag=direct conv=fsync,notrunc 2>/dev/null
    dd if=$disk bs=128k count=64 iflag=direct 2>/dev/null | cmp - /tmp/pattern
done
wait
sha256sum </tmp/pattern
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
tries=0
until grep -q 1 /sys/class/net/eth0/carrier; do tries=$((tries + 1)); [ $tries -lt 600 ]; sleep 0.1; done
exec 5<>/dev/tcp/10.0.2.2/$PORT
head -c 4194304 <&5 >/tmp/fetched
cat /tmp/fetched >&5
cmp /tmp/fetched <(head -c 4194304 <&5)
sha256sum </tmp/fetched
grep -E 'nvme|eth0' /proc/interrupts
dmesg | grep -E 'WARNING|BUG:|Oops|timeout|I/O error|Detected.*Hang' && exit 1
echo all done
"""


def test_disk_and_network_card_work_by_themselves_and_come_back(nvme: Path) -> None:
    port = os.environ["ROOTVISOR_HARDWARE_PORT"]
    result = run_root(
        [
            "--vps", "2", "--memory", "512M", "--device", f"pci:{NVME}", "--device", f"pci:{NIC}",
            "--", "bash", "-c", WORK.replace("$PORT", port),
        ]
    )  # fmt: skip
    text = words(result)
    assert result.returncode == 0 and "all done" in text, text
    sums = re.findall(r"^([0-9a-f]{64})  -$", text, re.MULTILINE)
    assert len(sums) == 2 and sums[1] == os.environ["ROOTVISOR_HARDWARE_SHA256"], text
    for name in ("nvme0q0", "eth0"):
        line = next(line for line in text.splitlines() if line.endswith((f" {name}", f"{name}-rx-0")))
        assert "HV-PCI-MSIX" in line and sum(int(count) for count in line.split()[1:3]) > 0, line
    await_true(lambda: driver(NIC) != "vfio-pci" and driver(NVME) == "nvme", "a device has not come back")
    del nvme  # it has a new name, perhaps


def test_the_network_card_works_with_its_interrupt_line() -> None:
    port = os.environ["ROOTVISOR_HARDWARE_PORT"]
    script = (
        "ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up\n"
        "tries=0; until grep -q 1 /sys/class/net/eth0/carrier; do tries=$((tries + 1)); [ $tries -lt 600 ] || exit 1; "
        f"sleep 0.1; done; head -c 4194304 </dev/tcp/10.0.2.2/{port} | sha256sum; grep eth0 /proc/interrupts"
    )
    result = run_root(
        [
            "--memory", "256M", "--append", "e1000e.IntMode=0", "--device", f"pci:{NIC}",
            "--", "bash", "-c", script,
        ]
    )  # fmt: skip
    assert result.returncode == 0, words(result)
    digest, line = result.stdout.decode().splitlines()
    assert digest.split()[0] == os.environ["ROOTVISOR_HARDWARE_SHA256"]
    assert "IO-APIC" in line and "fasteoi" in line and int(line.split()[1]) > 10, line


def test_what_the_root_wrote_is_on_the_disk(nvme: Path) -> None:
    """The image as this machine's own driver reads it: the root wrote to the disk, not to something like it."""
    marker = hashlib.sha256(b"direct hardware").hexdigest()
    result = run_root(
        [
            "--memory", "256M", "--device", f"pci:{NVME}", "--", "sh", "-c",
            f"echo {marker} | dd of=/dev/nvme0n1 bs=512 seek=2000 conv=sync,notrunc,fsync 2>/dev/null",
        ]
    )  # fmt: skip
    assert result.returncode == 0, words(result)
    await_true(lambda: driver(NVME) == "nvme", "the disk has not come back")
    del nvme

    def there() -> bool:
        for path in Path("/dev").glob("nvme*n1"):
            with path.open("rb", buffering=0) as disk:
                disk.seek(2000 * 512)
                return disk.read(512).startswith(marker.encode())
        return False

    await_true(there, "the disk does not hold what was written")


def exits(tmp_path: Path, count: int) -> dict[str, int]:
    report = tmp_path / f"report{count}"
    result = run_root(
        [
            "--memory", "256M", "--device", f"pci:{NVME}", "--report", str(report), "--", "sh", "-c",
            f"dd if=/dev/nvme0n1 of=/dev/null bs=4k count={count} iflag=direct 2>/dev/null; "
            "awk '/nvme0q1/ {print $2}' /proc/interrupts",
        ]
    )  # fmt: skip
    assert result.returncode == 0, words(result)
    assert int(result.stdout) >= count, "every read had an interrupt"
    found: dict[str, int] = json.loads(report.read_text())["exits"]
    return found


def test_reads_of_the_disk_do_not_leave_the_partition(nvme: Path, tmp_path: Path) -> None:
    """Two thousand reads more, and no more exits for memory-mapped registers: doorbells go straight to the device."""
    few, many = exits(tmp_path, 16), exits(tmp_path, 2016)
    assert many.get("mmio", 0) - few.get("mmio", 0) < 50, (few, many)


def test_dma_reaches_what_it_was_given_and_nothing_else() -> None:
    memory = 512 * MIB
    layout = MemoryMap(memory, 40, OwnedPages.needed(1) + 6)
    # the kernel tells of ten refusals at most in five seconds, and the IOMMU remembers one at a time
    hostile = [
        layout.owned_gpa,
        layout.owned_gpa + 4096,
        memory,
        memory + 7 * MIB,
        0xFE000000,
        1 << 32,
        5 << 32,
        1 << 38,
    ]
    result = run_root(
        [
            "--memory", "512M", "--device", f"pci:{DMA}", "--",
            "python3", str(AIM), "0000:00:04.0", "own", *(hex(address) for address in hostile), "own",
        ]
    )  # fmt: skip
    text = words(result)
    assert result.returncode == 0, text
    lines = result.stdout.decode().splitlines()
    own = [line for line in lines if line.startswith("own ")]
    assert len(own) == 2 and all(line.endswith("AIMEDDMA") for line in own), "its own memory it does reach"
    others = [line.split() for line in lines if line.startswith("other ")]
    assert [int(address, 16) for _, address, _, _ in others] == hostile
    for _, address, before, after in others:
        assert before == after == "00" * 8, f"something came from {address}"
    told = re.findall(
        f"rootvisor: DMA of {DMA} was refused: it wanted to (?:read|write to) (0x[0-9a-f]+), (.*)", text
    )
    what = {int(gpa, 16): words for gpa, words in told}
    assert what.keys() <= set(hostile) and what.get(layout.owned_gpa) == "a page of the hypervisor", text
    assert "where no memory is" in what.values(), text


def deposits(trace: Path) -> dict[int, set[int]]:
    """The pages that each partition has from the root, by a trace that may still grow."""
    found: dict[int, set[int]] = {}
    if trace.exists():
        for line in TraceLines(trace.read_bytes().splitlines()):
            if line.get("call") == "DEPOSIT_MEMORY" and line["status_code"] == 0:
                rest = bytes.fromhex(line["input"].get("rest", ""))
                pages = struct.unpack(f"<{len(rest) // 8}Q", rest)[: line["rep_count"]]
                found.setdefault(line["input"]["partition_id"], set()).update(pages)
    return found


def test_dma_does_not_reach_what_the_root_has_deposited_until_it_is_withdrawn(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    process = subprocess.Popen(
        [
            *RUN, "--timeout", str(2 * DEADLINE_S), "--memory", "256M", "--watch-deposits", "--trace", str(trace),
            "--device", f"pci:{DMA}",
            "--", "python3", "-I", "-S", str(AIM.with_name("aim_at_deposits.py")), "0000:00:04.0",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == b"deposited\n", "the root did not come to it"
        # the root's own deposits do not count: it may touch those that came back as statistics pages, and so may DMA
        await_true(lambda: max(deposits(trace), default=1) > 1, "the trace has no deposits for a child")
        child, pages = max(deposits(trace).items())
        aimed = [gpn << 12 for gpn in (min(pages), sorted(pages)[len(pages) // 2], max(pages))]
        line = " ".join(map(hex, aimed)).encode() + b"\n"
        out, err = process.communicate(line, timeout=2 * DEADLINE_S)
    finally:
        process.kill()
    text = out.decode() + err.decode()
    assert process.returncode == 0, text
    lines = [line.split() for line in out.decode().splitlines()]
    assert [line[2] for line in lines if line[0] == "own"] == ["AIMEDDMA"] * 2, "its own memory it does reach"
    others = [line for line in lines if line[0] == "other"]
    assert [int(line[1], 16) for line in others] == aimed
    assert all(line[2:] == ["00" * 8] * 2 for line in others), f"something came from a deposited page: {text}"
    told = re.findall(
        f"rootvisor: DMA of {DMA} was refused: it wanted to (read|write to) (0x[0-9a-f]+), "
        f"memory that the root deposited for partition {child}\n",
        text,
    )
    assert (
        told and {int(gpa, 16) for _, gpa in told} <= set(aimed) and text.count("was refused") == len(told)
    ), text
    assert lines[-1][0] == "again" and int(lines[-1][1], 16) in aimed and lines[-1][2] == "1", text


def test_the_option_rom_reads_in_the_root_as_it_does_outside() -> None:
    def read(folder: str) -> str:
        return f"cd {folder} && echo 1 >rom && sha256sum <rom && wc -c <rom"

    await_true(lambda: driver(NIC) != "vfio-pci", "the network card has not come back")
    outside = subprocess.run(["sh", "-c", read(str(DEVICES / NIC))], capture_output=True, check=True).stdout
    result = run_root(
        [
            "--memory",
            "256M",
            "--device",
            f"pci:{NIC}",
            "--",
            "sh",
            "-c",
            read("/sys/bus/pci/devices/0000:00:04.0"),
        ]
    )
    assert result.returncode == 0 and result.stdout == outside, words(result)
    assert int(outside.split()[2]) > 4096


def acknowledged(process: subprocess.Popen[bytes], least: int) -> int:
    """The last block that the root said was flushed, after at least so many."""
    assert process.stdout is not None
    last = -1
    for line in process.stdout:
        last = int(line)
        if last >= least:
            return last
    pytest.fail(f"the root ended after block {last}: {process.wait()}")


WRITER = r"""
n=0
while :; do
    printf 'block %08d\n' $n |
        dd of=/dev/nvme0n1 bs=4096 seek=$((4096 + n)) conv=sync,notrunc,fsync 2>/dev/null || exit 1
    echo $n
    n=$((n + 1))
done
"""


def with_disk(script: str) -> list[str]:
    """The command of a root partition that has the disk, and runs a script."""
    options = ["--memory", "256M", "--timeout", str(DEADLINE_S), "--device", f"pci:{NVME}"]
    return [*RUN, *options, "--", "sh", "-c", script]


def test_a_killed_hypervisor_gives_the_disk_back_with_all_that_was_flushed(nvme: Path) -> None:
    for turn in range(int(os.environ.get("ROOTVISOR_HARDWARE_KILLS", "2"))):
        process = subprocess.Popen(
            with_disk(WRITER),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            last = acknowledged(process, 20 + 7 * turn)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        await_true(lambda: driver(NVME) == "nvme", "the disk has not come back")

        def whole(blocks: int = last + 1) -> bool:
            for path in Path("/dev").glob("nvme*n1"):
                with path.open("rb", buffering=0) as disk:
                    for block in range(blocks):
                        disk.seek((4096 + block) * 4096)
                        if not disk.read(4096).startswith(f"block {block:08d}\n".encode()):
                            return False
                    return True
            return False

        await_true(whole, f"turn {turn}: blocks up to {last} were flushed, and are not there")
    del nvme


def refused(*devices: str, more: Sequence[str] = ()) -> str:
    options = [*more] + [word for device in devices for word in ("--device", device)]
    result = run_root([*options, "--", "true"])
    lines = result.stderr.decode().splitlines()
    assert result.returncode in (2, 125) and len(lines) == 1 and "Traceback" not in lines[0], words(result)
    return lines[0]


def test_what_cannot_be_given_is_one_line_with_the_reason(nvme: Path) -> None:
    assert "no PCI device 0000:00:1e.0; see what there is" in refused("pci:00:1e.0")
    assert "is a bridge; give a device behind it" in refused("pci:00:00.0")
    assert "no PCI address; write it as" in refused("pci:nonsense")
    assert "only the appliance has emulated hardware" in refused("emulated:nic")
    assert "given twice" in refused(f"pci:{NVME}", f"pci:{NVME}")
    subprocess.run(["mkfs.ext2", "-q", "-F", str(nvme), "8M"], check=True)
    subprocess.run(["mount", str(nvme), "/mnt"], check=True)
    try:
        assert f"{nvme.name} is mounted at /mnt; give another device" in refused(f"pci:{NVME}")
    finally:
        subprocess.run(["umount", "/mnt"], check=True)
    limit = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
    before = limit.read_text()
    limit.write_text("65535")
    try:
        line = refused(f"pci:{NVME}", more=["--memory", "300M", "--watch-deposits"])
    finally:
        limit.write_text(before)
    assert "needs a mapping, and the kernel allows 65,535; give less --memory, or: echo" in line
    await_true(lambda: driver(NVME) == "nvme", "nothing was taken away for good")


def test_a_device_of_another_run_is_refused_and_stays_with_it(nvme: Path) -> None:
    del nvme
    process = subprocess.Popen(
        with_disk("echo up; read x"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == b"up\n"
        assert "end the other run that has it" in refused(f"pci:{NVME}")
    finally:
        process.communicate(b"\n", timeout=DEADLINE_S)
    assert process.returncode == 0
