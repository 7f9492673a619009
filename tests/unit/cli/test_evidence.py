# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from rootvisor.cli.evidence import Sections, findings, parse_sections

_OUTPUT = """\
==rootvisor== dmesg
[    0.000000] Linux version 7.3.0
[    0.000000] Hypervisor detected: Microsoft Hyper-V
[    0.000000] Hyper-V: running as root partition
==rootvisor== interrupts
           CPU0       CPU1
 24:          9          0   HV-PCI-MSI-0000:00:01.0   0-edge      virtio0-config
==rootvisor== mshv
crw------- 1 root root 10, 125 Jan  1 00:00 /dev/mshv
==rootvisor== nproc
2
==rootvisor== uname
Linux rootvisor 7.3.0 x86_64
==rootvisor== root
PRETTY_NAME="Debian"
/rootvisor-was-here
==rootvisor== end
"""


def _missing(sections: Sections, vps: int = 2, kernel: str = "mshv") -> list[str]:
    return [finding.what for finding in findings(sections, vps, kernel) if not finding.ok]


def test_complete_output_has_all_the_evidence() -> None:
    assert _missing(parse_sections(_OUTPUT)) == []


def test_no_output_has_none() -> None:
    assert len(_missing({})) == len(findings({}, 2, "mshv"))


def test_stock_kernel_needs_no_mshv_device() -> None:
    sections = parse_sections(
        _OUTPUT.replace("crw------- 1 root root 10, 125 Jan  1 00:00 /dev/mshv", "ls: no")
    )
    assert _missing(sections, kernel="stock") == []
    assert _missing(sections) == ["the device for child partitions is there"]


def test_processor_that_did_not_come_up_is_missed() -> None:
    assert _missing(parse_sections(_OUTPUT), vps=4) == ["4 virtual processors are on line"]


def test_kernel_warning_is_shown() -> None:
    sections = parse_sections(
        _OUTPUT.replace("Linux version", "WARNING: CPU: 0 PID: 1 at x\n[ 0.1] Linux version")
    )
    (last,) = [finding for finding in findings(sections, 2, "mshv") if not finding.ok]
    assert last.lines[0].startswith("WARNING: CPU: 0")
