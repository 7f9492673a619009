# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rootvisor.cli.demo_guest import Expected
from rootvisor.cli.evidence import parse_sections
from rootvisor.cli.guest_evidence import guest_exits, guest_findings, vmm_counters

EXPECTED = Expected("ab" * 32, "a page", "a file")
OUTPUT = f"""\
==rootvisor== guest
rootvisor: ready
demo: uname
Linux guest 7.3.0 x86_64
demo: dmesg
[    0.000000] Hypervisor detected: Microsoft Hyper-V
demo: nproc
1
demo: disk
{EXPECTED.disk_sha256}  /dev/vda
demo: web
a page
demo: file
a file
demo: end
==rootvisor== vmm
status 0
in-time 1
requests 1
first-output-s 2.5
total-s 4.0
==rootvisor== counters
{{"_disk0": {{}}, "exits": {{"0x80000000": 12, "0x80010000": 3, "0x80001234": 1}}}}
==rootvisor== end
"""


def missing(output: str) -> list[str]:
    return [one.what for one in guest_findings(parse_sections(output), EXPECTED) if not one.ok]


def test_complete_output_has_all_the_evidence() -> None:
    assert missing(OUTPUT) == []
    assert missing(OUTPUT.replace("\n", "\r\n")) == []  # as a terminal sends lines


def test_no_output_has_none() -> None:
    assert len(missing("")) == len(guest_findings({}, EXPECTED))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("Linux guest", "Linux rootvisor"), "boots"),
        (("Hypervisor detected: Microsoft Hyper-V", "Hypervisor detected: KVM"), "hypervisor"),
        (
            ("Microsoft Hyper-V\n", "Microsoft Hyper-V\n[ 0.1] Hyper-V: running as root partition\n"),
            "hypervisor",
        ),
        (("ab  /dev/vda", "ac  /dev/vda"), "checksum"),
        (("demo: web\na page", "demo: web\nwget: timed out"), "page"),
        (("requests 1", "requests 0"), "page"),
        (("demo: file\na file", "demo: file\ncat: no such file"), "shared file"),
        (("demo: nproc", "[ 0.2] WARNING: CPU: 0\ndemo: nproc"), "complain"),
        (("status 0", "status 1"), "powers off"),
        (("in-time 1", "in-time 0"), "powers off"),
        (("demo: end\n", ""), "powers off"),
    ],
)
def test_what_is_not_as_it_should_be_is_missed(change: tuple[str, str], what: str) -> None:
    assert change[0] in OUTPUT
    (only,) = missing(OUTPUT.replace(*change))
    assert what in only


def test_exits_have_names_where_they_have_any() -> None:
    counters = vmm_counters(parse_sections(OUTPUT)["counters"])
    assert guest_exits(counters) == {"unmapped GPA": 12, "I/O port": 3, "0x80001234": 1}


@pytest.mark.parametrize("text", ["", "no json", "[1]"])
def test_counters_that_could_not_be_had_are_none(text: str) -> None:
    assert vmm_counters([text]) == {}
    assert guest_exits({}) == {}
