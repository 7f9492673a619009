# SPDX-License-Identifier: Apache-2.0
"""The evidence that a Linux guest ran in a child partition: what its console showed, against what was made for it."""

from __future__ import annotations

import json

from rootvisor.cli.demo_guest import Expected
from rootvisor.cli.evidence import TROUBLE, Finding, Sections, without_timestamp
from rootvisor.tlfs import intercepts

_PART = "demo: "


def guest_parts(lines: list[str]) -> Sections:
    """The parts of what the guest printed; before the first: what the VMM and the kernel had to say."""
    parts: Sections = {}
    current = parts.setdefault("", [])
    for line in lines:
        text = line.rstrip("\r")
        if text.startswith(_PART):
            current = parts.setdefault(text.removeprefix(_PART).strip(), [])
        else:
            current.append(text)
    return parts


def vmm_facts(lines: list[str]) -> dict[str, float]:
    """How the VMM ended: `status`, `in-time`, `requests`, `first-output-s`, `total-s`."""
    facts = {}
    for line in lines:
        name, _, value = line.partition(" ")
        try:
            facts[name] = float(value)
        except ValueError:
            continue
    return facts


def vmm_counters(lines: list[str]) -> dict[str, dict[str, int]]:
    """What the VMM counted; empty when it could not be asked."""
    try:
        counters = json.loads("\n".join(lines))
    except ValueError:
        return {}
    return counters if isinstance(counters, dict) else {}


def guest_findings(sections: Sections, expected: Expected) -> list[Finding]:
    """What the guest showed."""
    parts = guest_parts(sections.get("guest", []))
    facts = vmm_facts(sections.get("vmm", []))
    log = [without_timestamp(line) for line in parts.get("dmesg", [])]
    uname = parts.get("uname", [])[:1]
    hypervisor = [line for line in log if line.startswith("Hypervisor detected: Microsoft Hyper-V")]
    is_root = any("running as root partition" in line for line in log)
    disk = parts.get("disk", [])[:1]
    sector = [f"{expected.disk_sha256}  as the demo wrote it"]
    page = parts.get("web", [])[:1]
    file = parts.get("file", [])[:1]
    trouble = [line for line in log if TROUBLE.search(line)]
    ended = [line for line in parts.get("end", []) if line.strip()]
    return [
        Finding(
            "a Linux guest boots in it", uname[:1] != [] and uname[0].startswith("Linux guest "), tuple(uname)
        ),
        Finding(
            "the guest sees the Microsoft hypervisor, and is not its root",
            bool(hypervisor) and not is_root,
            tuple(hypervisor[:1]),
        ),
        Finding(
            "its disk (virtio-blk) has the checksum that it should have",
            bool(disk) and disk[0].split()[:1] == [expected.disk_sha256],
            tuple(disk if disk and disk[0].split()[:1] == [expected.disk_sha256] else disk + sector),
        ),
        Finding(
            "it fetches a page from the root partition (virtio-net)",
            page == [expected.page] and facts.get("requests", 0) >= 1,
            tuple(page),
        ),
        Finding("it reads a shared file (virtio-fs)", file == [expected.file], tuple(file)),
        Finding("its kernel has nothing to complain about", bool(log) and not trouble, tuple(trouble[:5])),
        Finding(
            "it powers off, and the VMM ends with status 0",
            facts.get("status") == 0 and facts.get("in-time") == 1 and "end" in parts,
            tuple(ended[:3]) if facts.get("status") else (),
        ),
    ]


def guest_exits(counters: dict[str, dict[str, int]]) -> dict[str, int]:
    """Messages that the VMM got from the hypervisor, by kind."""
    named: dict[str, int] = {}
    for kind, count in counters.get("exits", {}).items():
        named[_KINDS.get(int(kind, 16), kind)] = count
    return named


_KINDS = {
    intercepts.UNMAPPED_GPA: "unmapped GPA",
    intercepts.GPA_INTERCEPT: "GPA intercept",
    intercepts.HYPERCALL_INTERCEPT: "hypercall",
    intercepts.X64_IO_PORT_INTERCEPT: "I/O port",
    intercepts.X64_MSR_INTERCEPT: "MSR",
    intercepts.X64_CPUID_INTERCEPT: "CPUID",
    intercepts.X64_EXCEPTION_INTERCEPT: "exception",
    intercepts.X64_APIC_EOI: "APIC EOI",
    intercepts.X64_HALT: "halt",
}
