# SPDX-License-Identifier: Apache-2.0
"""`rootvisor demo hardware`: a root partition that works physical devices by itself, in an appliance that has some."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import click

from rootvisor.cli.description import RunOptions
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.cli.evidence import Finding, parse_sections
from rootvisor.cli.output import Progress, table
from rootvisor.cli.run_folder import run_folder

_DISK_BYTES = 256 << 20
_TIMEOUT_S = 600.0
_MEMORY_BYTES = 512 << 20

#: What the root partition runs. Parts of its output begin as those of the other demo do.
_SCRIPT = r"""
part() { echo "==rootvisor== $1"; }
part dmesg
dmesg | grep -E 'Hyper-V: running as root partition'
part devices
for device in /sys/bus/pci/devices/*; do
    [ -e $device/driver ] || continue
    driver=$(readlink $device/driver)
    echo "${device##*/} $(cat $device/vendor) $(cat $device/device) ${driver##*/}"
done
part disk
dd if=/dev/urandom of=/tmp/pattern bs=1M count=16 2>/dev/null
dd if=/tmp/pattern of=/dev/nvme0n1 bs=1M oflag=direct conv=fsync 2>&1 | tail -n 1
dd if=/dev/nvme0n1 of=/tmp/read bs=1M count=16 iflag=direct 2>&1 | tail -n 1
cmp /tmp/pattern /tmp/read && echo the same
part network
ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up
tries=0
until grep -q 1 /sys/class/net/eth0/carrier || [ $tries -ge 300 ]; do tries=$((tries + 1)); sleep 0.1; done
busybox ping -c 3 10.0.2.2 || ping -c 3 10.0.2.2
part interrupts
grep HV-PCI-MSI /proc/interrupts
part end
"""


@dataclass(frozen=True)
class Outcome:
    """What the run showed: findings, and the machine's report."""

    findings: list[Finding]
    report: dict[str, Any]
    seconds: float
    engine: str


def show_hardware(options: RunOptions) -> Outcome:
    """Boot with an NVMe disk and a network card, and look at what the root does with them."""
    from rootvisor.cli.demo import boot_and_listen

    if options.kernel == "stock":
        raise usage_error(
            "the distribution's cloud kernel has no drivers for these devices", "leave --kernel out"
        )
    if options.engine == "kvm":
        raise usage_error("only the appliance has emulated hardware", "leave --engine out")
    with Progress() as progress, run_folder() as folder:
        image = folder / "nvme.img"
        with image.open("wb") as file:
            file.truncate(_DISK_BYTES)
        run = RunOptions(
            kernel=options.kernel,
            vps=options.vps,
            memory_bytes=_MEMORY_BYTES,
            engine="appliance",
            timeout_s=_TIMEOUT_S,
            debug=options.debug,
            hardware=(f"emulated:nvme,path={image}", "emulated:nic"),
            report=str(folder / "report.json"),
            command=("sh", "-c", _SCRIPT),
        )
        status, output, report, seconds, plan = boot_and_listen(run, folder, progress)
    if status:
        raise UserError(
            f"the root partition ended with status {status} before it showed everything",
            "see its log: rootvisor run --engine appliance --device emulated:nic --console stderr -- true",
            status,
        )
    sections = parse_sections(output.decode("utf-8", "replace"))
    return Outcome(_findings(sections), report, seconds, plan.engine.reason)


def _findings(sections: dict[str, list[str]]) -> list[Finding]:
    """A line for each claim of the demo."""
    devices = sections.get("devices", [])
    drivers = [line.split()[-1] for line in devices if line.split()]
    wanted = ("nvme", "e1000e")
    interrupts = [line for line in sections.get("interrupts", []) if re.search(r"nvme0q|eth0", line)]
    counted = [line for line in interrupts if any(int(word) for word in line.split()[1:] if word.isdigit())]
    disk, network = sections.get("disk", []), sections.get("network", [])
    return [
        Finding(
            "Linux runs as the root partition",
            any("running as root partition" in line for line in sections.get("dmesg", [])),
            tuple(sections.get("dmesg", [])),
        ),
        Finding(
            "its own drivers work an NVMe disk and a network card",
            all(any(name == driver for driver in drivers) for name in wanted),
            tuple(line for line in devices if line.split()[-1] in wanted),
        ),
        Finding(
            "their interrupts come through the hypervisor's mapping",
            any("nvme" in line for line in counted) and any("eth0" in line for line in counted),
            tuple(" ".join(line.split()) for line in counted),
        ),
        Finding("the disk gives back what was written", "the same" in disk, tuple(disk)),
        Finding(
            "the network card reaches its network",
            any(" 0% packet loss" in line for line in network),
            tuple(line for line in network if "bytes from" in line or "loss" in line),
        ),
    ]


def show(outcome: Outcome) -> None:
    """The rest of the report for people: what it cost."""
    exits = outcome.report.get("exits") or {}
    rows = [
        ("engine", f"appliance: {outcome.engine}", f"{outcome.seconds:.1f} s"),
        (
            "root partition",
            ", ".join(
                f"{name} {count}" for name, count in sorted(exits.items(), key=lambda item: -item[1])[:5]
            ),
            f"{sum(exits.values())} exits",
        ),
    ]
    click.echo(table(rows))
