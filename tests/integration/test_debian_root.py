# SPDX-License-Identifier: Apache-2.0
"""A whole Debian is the root partition, with an NVMe disk and a network card as its only disk and network.

ROOTVISOR_HARDWARE_LOAD_S is how long both work under load, 0 for not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor import kernels
from rootvisor.appliance import check
from tests.integration.debian_root import PATIENCE_S, DebianRoot, iperf3_server
from tests.vmm import debian

LOAD_S = int(os.environ.get("ROOTVISOR_HARDWARE_LOAD_S", "0"))
LIMIT_S = 3600 + 6 * LOAD_S
TROUBLE = (
    r"WARNING:|BUG:|Oops|nvme.*timeout|I/O error|EXT4-fs error|NETDEV WATCHDOG|Hardware Unit Hang|nobody cared|"
    r"soft lockup|hung task|rcu.*stall"
)
SENT = random.Random(2).randbytes(8 << 20)

pytestmark = [
    pytest.mark.boot,
    pytest.mark.timeout(LIMIT_S + 300),
    pytest.mark.skipif(
        not LOAD_S and "ROOTVISOR_SOAK" not in os.environ,
        reason="takes minutes: make soak, or ROOTVISOR_SOAK=1",
    ),
]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[DebianRoot]:
    problems = check()
    if problems:
        pytest.skip(f"the appliance does not work here: {[str(one) for one in problems]}")
    kernels.ensure("stock")
    try:
        debian.root_image(lambda *_: None)
    except debian.Unavailable as error:
        pytest.skip(str(error))
    with DebianRoot(tmp_path, 2, LIMIT_S) as made:
        yield made


#: What there is, and what is not.
LOOK = r"""
set -e
dmesg | grep -q 'Hyper-V: running as root partition'
ls -l /dev/mshv >&2
[ -z "$(ls /sys/bus/virtio/devices 2>/dev/null)" ]
findmnt -n -o SOURCE /
basename "$(readlink /sys/block/nvme0n1/device/device/driver)"
card=$(basename "$(dirname /sys/class/net/e*/device)")
basename "$(readlink /sys/class/net/$card/device/driver)"
ls /sys/block | grep -v -e loop -e nvme0n1 || true
"""


def test_debian_boots_from_nvme_and_is_reached_through_its_card(machine: DebianRoot, tmp_path: Path) -> None:
    """Login prompt on the serial port, ssh in, 8 MiB in and out again, what was written is on the image."""
    prompt = machine.log_in()
    machine.types(b"echo $((6 * 7))-on-the-console\n")
    machine.prints(b"42-on-the-console")
    assert machine.ssh(LOOK).decode().split() == ["/dev/nvme0n1p1", "nvme", "e1000e"]
    assert machine.ssh("systemctl is-system-running --wait || systemctl --failed").split() == [b"running"]
    machine.ssh("cat >/root/sent; sync", data=SENT)
    assert machine.ssh("sha256sum </root/sent").split()[0].decode() == hashlib.sha256(SENT).hexdigest()
    assert machine.ssh("cat /root/sent") == SENT
    assert not machine.ssh(f"dmesg | grep -E '{TROUBLE}' || true")
    counted = machine.ssh("cat /proc/interrupts").decode()
    for name in ("nvme0q1", r"en\S+-rx-0"):
        line = re.search(rf"^ *\d+: .*HV-PCI-MSIX.* {name}$", counted, re.MULTILINE)
        assert line and sum(int(count) for count in line[0].split()[1:3]) > 100, counted
    report = machine.powers_off()
    assert report["ended"] == "poweroff"
    image = (tmp_path / "nvme.img").read_bytes()
    assert SENT[: 1 << 20] in image, "the file is on the image"
    print(f"login prompt after {prompt:.1f} s, exits of the run: {report['exits']}")


#: Counters of the root's own VPs, which the hypervisor refreshes once a second, as the kernel shows them.
COUNTERS = r"""
sleep 2
cat /sys/kernel/debug/mshv/partition/*/vp/*/stats |
    awk '/VpNestedPageFaultInterceptsCount|VpIoInstructionsCount|VpHypercallsCount|VpMsrAccessesCount/ {
        sum[$1] += $NF } END { for (name in sum) print name, sum[name] }' | tr -d :
"""
FIO = (
    "fio --name=load --filename=/dev/nvme0n1p2 --rw=randwrite --bs=4k-64k --size=100% --ioengine=libaio --iodepth=16 "
    "--direct=1 --verify=crc32c --verify_fatal=1 --verify_backlog=256 --loops=100000 --time_based "
    "--output-format=json --runtime="
)
#: CPU 1 goes off-line and on-line until the load is over. Without the pauses, other programs stood still for minutes in
#: a run of ten (not understood).
HOTPLUG = (
    "turns=0; while [ ! -e /tmp/over ]; do echo 0 >/sys/devices/system/cpu/cpu1/online; sleep 0.5; "
    "echo 1 >/sys/devices/system/cpu/cpu1/online; sleep 0.5; turns=$((turns + 1)); done; echo $turns >/tmp/turns"
)


def counters(machine: DebianRoot) -> dict[str, int]:
    lines = machine.ssh(COUNTERS).decode().splitlines()
    return {name: int(count) for name, count in (line.split() for line in lines)}


def done_by(fio: bytes) -> tuple[int, int]:
    """Reads and writes that ended well."""
    text = fio.decode()
    (job,) = json.loads(text[text.index("{") :])["jobs"]
    assert not job["error"], job
    return job["read"]["total_ios"], job["write"]["total_ios"]


@pytest.mark.skipif(not LOAD_S, reason="ROOTVISOR_HARDWARE_LOAD_S is how many seconds it takes; make soak")
def test_disk_and_card_under_load_lose_nothing_while_processors_come_and_go(
    machine: DebianRoot, tmp_path: Path
) -> None:
    machine.log_in()
    machine.ssh("systemctl is-system-running --wait || true; systemctl start sys-kernel-debug.mount")
    # The data path by itself: what one I/O costs the hypervisor.
    before = counters(machine)
    count = sum(done_by(machine.ssh(FIO + "20")))
    spent = {name: value - before[name] for name, value in counters(machine).items()}
    print(f"{count} reads and writes of the disk, exits to the hypervisor: {spent}")
    assert len(spent) == 4 and count >= 100 and sum(spent.values()) <= count // 100, (count, spent)
    with iperf3_server(tmp_path) as port:
        network = f"iperf3 --client 10.0.2.2 --port {port} --bidir --time {LOAD_S} --interval 10 --json"
        machine.ssh(
            f"rm -f /tmp/over; ({HOTPLUG}) >/dev/null 2>&1 </dev/null & "
            f"{FIO}{LOAD_S} --output=/tmp/fio.json & {network} >/tmp/iperf3.json || true; wait %2; status=$?; "
            "touch /tmp/over; wait; exit $status",
            seconds=4 * LOAD_S + 4 * PATIENCE_S,
        )
    reads, writes = done_by(machine.ssh("cat /tmp/fio.json"))
    moved = json.loads(machine.ssh("cat /tmp/iperf3.json"))
    turns = int(machine.ssh("cat /tmp/turns"))
    trouble = machine.ssh(f"dmesg | grep -E '{TROUBLE}' || true").decode()
    interrupts = machine.ssh("grep -E 'nvme0q|-rx-0|-tx-0' /proc/interrupts").decode()
    report = machine.powers_off()
    assert not trouble, trouble
    assert "error" not in moved, moved["error"]
    print(f"{LOAD_S} s: {reads} reads and {writes} writes verified, CPU 1 off-line and on-line {turns} times")
    for name in ("sum", "sum_bidir_reverse"):
        pieces = [interval[name]["bytes"] for interval in moved["intervals"]]
        assert len(pieces) >= LOAD_S // 10 - 1 and all(pieces), f"{name}: bytes in each 10 s: {pieces}"
        print(f"iperf3 {name}: {sum(pieces) >> 20} MiB, {min(pieces) >> 20} in the poorest 10 s")
    print(interrupts, f"exits of the run: {report['exits']}")
    assert reads and writes and turns >= LOAD_S // 10, (reads, writes, turns)
