# SPDX-License-Identifier: Apache-2.0
"""`rootvisor demo hardware`: a root partition that works physical devices by itself, in an appliance that has some."""

from __future__ import annotations

import re
import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from rootvisor.cli.description import RunOptions
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.cli.evidence import Finding, parse_sections
from rootvisor.cli.output import Progress, table
from rootvisor.cli.paths import make_cache_dir, source_root
from rootvisor.cli.png import PngError, read_png
from rootvisor.cli.run_folder import run_folder
from rootvisor.cli.screen_text import Font, read_text

_DISK_BYTES = 256 << 20
_TIMEOUT_S = 600.0
_MEMORY_BYTES = 512 << 20
#: Lines of the kernel's log that are surely on a screen which it has its console on.
_LEAST_LOG_LINES = 10
_LOG_LINE = re.compile(r"^\[ *\d+\.\d+\] ")
_SHOWN_LOG_LINES = 3

#: What the root partition runs. Parts of its output begin as those of the other demo do.
_SCRIPT = r"""
part() { echo "==rootvisor== $1"; }
part dmesg
dmesg | grep -E 'Hyper-V: running as root partition'
part devices
for device in /sys/bus/pci/devices/*; do
    [ -e $device/driver ] || continue
    driver=$(readlink $device/driver)
    set -- $device/msi_irqs/*
    [ -e "$1" ] || shift
    echo "${device##*/} $(cat $device/vendor) $(cat $device/device) ${driver##*/} with $# interrupts"
done
part screen
echo "$words" >/dev/tty0
$font
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
    picture: Path
    report: dict[str, Any]
    seconds: float
    engine: str


def show_hardware(options: RunOptions) -> Outcome:
    """Boot with an NVMe disk, a network card and a display, and look at what the root does with them."""
    from rootvisor.cli.demo import boot_and_listen
    from rootvisor.cli.prepare import python_argv

    if options.kernel == "stock":
        raise usage_error(
            "the distribution's cloud kernel has no drivers for these devices", "leave --kernel out"
        )
    if options.engine == "kvm":
        raise usage_error("only the appliance has emulated hardware", "leave --engine out")
    with Progress() as progress, run_folder() as folder:
        picture = make_cache_dir("demo") / "screen.png"
        picture.unlink(missing_ok=True)
        # Nobody could have known them before: the picture is of this run.
        words = f"the root partition wrote this on its screen: {secrets.token_hex(4)}"
        font = [*python_argv(), str(source_root() / "rootvisor" / "cli" / "console_font.py")]
        script = _SCRIPT.replace("$words", words).replace("$font", shlex.join(font))
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
            hardware=(f"emulated:nvme,path={image}", "emulated:nic", "emulated:display"),
            report=str(folder / "report.json"),
            screenshot=str(picture),
            command=("sh", "-c", script),
        )
        status, output, report, seconds, plan = boot_and_listen(run, folder, progress)
    if status:
        raise UserError(
            f"the root partition ended with status {status} before it showed everything",
            "see its log: rootvisor run --engine appliance --device emulated:nic --console stderr -- true",
            status,
        )
    sections = parse_sections(output.decode("utf-8", "replace"))
    screen = _read_screen(picture, sections.get("screen", []))
    found = [*_findings(sections), _screen_finding(screen, words, picture)]
    return Outcome(found, picture, report, seconds, plan.engine.reason)


def _read_screen(picture: Path, font: list[str]) -> list[str]:
    """The text in the picture; nothing where there is no picture, or no font to read it by."""
    try:
        return read_text(read_png(picture), Font.parse(" ".join(font)))
    except (OSError, PngError, ValueError):
        return []


def _screen_finding(screen: list[str], words: str, picture: Path) -> Finding:
    log = [line for line in screen if _LOG_LINE.match(line)]
    lines = [*log[-_SHOWN_LOG_LINES:], *(line for line in screen if line == words)]
    return Finding(
        "the display shows its console; read from the picture",
        words in screen and len(log) >= _LEAST_LOG_LINES,
        (*lines, f"picture: {picture}") if lines else (),
    )


def _findings(sections: dict[str, list[str]]) -> list[Finding]:
    """A line for each claim of the demo that the root's own words show."""
    devices = sections.get("devices", [])
    drivers = [line.split()[3] for line in devices if len(line.split()) > 3]
    wanted = ("nvme", "e1000e", "bochs-drm")
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
            "its own drivers work an NVMe disk, a network card and a display",
            all(name in drivers for name in wanted),
            tuple(line for line in devices if any(f" {name} " in line for name in wanted)),
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
