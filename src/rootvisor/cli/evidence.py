# SPDX-License-Identifier: Apache-2.0
"""The evidence that Linux runs as the root partition: a script for the root, and what its output must show."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rootvisor.cli import demo_root

Sections = dict[str, list[str]]
"""Name of a part of the script's output to its lines."""

_MARK = demo_root.MARK

SCRIPT = f"""
part() {{ echo "{_MARK}$1"; }}
part dmesg; dmesg
part interrupts; cat /proc/interrupts
part mshv; ls -l /dev/mshv 2>&1
part nproc; nproc
part uname; uname -a
part root; head -n 1 /etc/os-release; touch /rootvisor-was-here && ls /rootvisor-was-here
"""
"""Runs in the root partition with /bin/sh; every command is followed by what `findings` looks at."""

TROUBLE = re.compile(
    r"\bWARNING: |\bBUG: |\bOops\b|\bstall(s|ed)? on CPU|soft lockup|general protection fault"
)
_TIMESTAMP = re.compile(r"^\[\s*\d+\.\d+\] ")


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of evidence: what it shows, whether it is there, and the lines that show it."""

    what: str
    ok: bool
    lines: tuple[str, ...] = ()


def parse_sections(output: str) -> Sections:
    """The parts of what the script printed."""
    sections: Sections = {}
    lines: list[str] = []
    for line in output.splitlines():
        if line.startswith(_MARK):
            lines = sections.setdefault(line.removeprefix(_MARK).strip(), [])
        else:
            lines.append(line)
    return sections


def without_timestamp(line: str) -> str:
    """A line of a kernel's log without its time."""
    return _TIMESTAMP.sub("", line)


def findings(sections: Sections, vps: int, kernel: str) -> list[Finding]:
    """What the output shows. A stock kernel has no /dev/mshv, so there it is not asked for."""
    log = [without_timestamp(line) for line in sections.get("dmesg", [])]
    found = [
        _lines("the kernel sees the Microsoft hypervisor", log, r"^Hypervisor detected: Microsoft Hyper-V"),
        _lines("the kernel runs as its root partition", log, r"^Hyper-V: running as root partition"),
    ]
    if kernel != "stock":
        device = sections.get("mshv", [])
        found.append(
            Finding("the device for child partitions is there", _is_device(device), tuple(device[:1]))
        )
    interrupts = [_squeeze(line) for line in sections.get("interrupts", [])]
    msi = _lines("PCI devices interrupt through the hypervisor", interrupts, r"HV-PCI-MSI")
    count = sections.get("nproc", [])
    found += [
        msi,
        Finding(
            f"{vps} virtual processor{'s are' if vps > 1 else ' is'} on line", count[:1] == [str(vps)], ()
        ),
        Finding(
            "this machine's files are there, and writes stay in memory",
            "/rootvisor-was-here" in sections.get("root", []),
            tuple(sections.get("root", [])[:1]),
        ),
    ]
    trouble = [line for line in log if TROUBLE.search(line)]
    found.append(
        Finding("the kernel has nothing to complain about", bool(log) and not trouble, tuple(trouble[:5]))
    )
    return found


def _lines(what: str, lines: list[str], pattern: str) -> Finding:
    """Evidence that consists of lines which match."""
    matching = tuple(line for line in lines if re.search(pattern, line))
    return Finding(what, bool(matching), matching[:4])


def _is_device(lines: list[str]) -> bool:
    return bool(lines) and lines[0].startswith("c") and lines[0].rstrip().endswith("/dev/mshv")


def _squeeze(line: str) -> str:
    return " ".join(line.split())
