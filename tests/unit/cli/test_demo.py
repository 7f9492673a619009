# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rootvisor.cli import demo_guest, launch
from rootvisor.cli.prepare import RunPlan

Run = Callable[..., tuple[int, str, str]]

_OUTPUT = """\
==rootvisor== dmesg
[    0.000000] Hypervisor detected: Microsoft Hyper-V
[    0.000000] Hyper-V: running as root partition
==rootvisor== interrupts
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
==rootvisor== guest
demo: uname
Linux guest 7.3.0 x86_64
demo: dmesg
[    0.000000] Hypervisor detected: Microsoft Hyper-V
demo: disk
@DISK@  /dev/vda
demo: web
@PAGE@
demo: file
@FILE@
demo: end
==rootvisor== vmm
status 0
in-time 1
requests 1
first-output-s 2.5
total-s 4.0
==rootvisor== counters
{"exits": {"0x80000000": 12}}
==rootvisor== end
"""
_REPORT = {
    "boot_to_userspace_s": 1.25,
    "exits": {"io": 300, "x86_rdmsr": 20},
    "hypercalls": {"HVCALL_CREATE_VP": 1},
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Replaces the machine: prints `output` with what the demo made, writes a report, ends with `status`."""
    monkeypatch.setattr(demo_guest, "base_archive", lambda _kernel, _devices: __file__)

    def install(output: str, status: int) -> None:
        def run(plan: RunPlan, streams: tuple[int, int, int]) -> int:
            assert plan.description.command is not None
            folder = Path(plan.description.command.argv[-1]).parent
            found = {
                "@DISK@": hashlib.sha256((folder / "disk.img").read_bytes()).hexdigest(),
                "@PAGE@": json.loads((folder / "demo.json").read_text())["page"].strip(),
                "@FILE@": (folder / "shared" / "greeting").read_text().strip(),
            }
            text = output
            for word, value in found.items():
                text = text.replace(word, value)
            os.write(streams[1], text.encode())
            assert plan.description.report is not None
            Path(plan.description.report).write_text(json.dumps(_REPORT))
            return status

        monkeypatch.setattr(launch, "run_with_streams", run)

    return install


def test_demo_with_all_the_evidence_succeeds(
    rootvisor: Run, bzimage: Path, machine: Callable[[str, int], None]
) -> None:
    machine(_OUTPUT, 0)
    status, out, _ = rootvisor("demo", "--kernel", str(bzimage))
    assert status == 0
    for text in (
        "running as root partition",
        "1.25 s",
        "320 (io 300, rdmsr 20)",
        "1 (CREATE_VP 1)",
        "12 (unmapped GPA 12)",
        "Next:",
    ):
        assert text in out


def test_demo_json_has_evidence_and_numbers(
    rootvisor: Run, bzimage: Path, machine: Callable[[str, int], None]
) -> None:
    machine(_OUTPUT, 0)
    status, out, _ = rootvisor("demo", "--json", "--kernel", str(bzimage))
    report = json.loads(out)
    assert (status, report["ok"], report["report"]) == (0, True, _REPORT)


def test_demo_with_missing_evidence_fails(
    rootvisor: Run, bzimage: Path, machine: Callable[[str, int], None]
) -> None:
    machine(_OUTPUT.replace("\n2\n", "\n1\n"), 0)
    status, out, err = rootvisor("demo", "--kernel", str(bzimage))
    assert status == 1
    assert "Next:" not in out
    assert "1 piece of evidence is missing" in err


def test_demo_whose_guest_misses_something_fails_and_shows_the_console(
    rootvisor: Run, bzimage: Path, machine: Callable[[str, int], None]
) -> None:
    told = _OUTPUT.replace("@PAGE@", "wget: timed out").replace(
        "demo: uname", "rootvisor: no net\ndemo: uname"
    )
    machine(told, 0)
    status, out, err = rootvisor("demo", "--kernel", str(bzimage))
    assert status == 1
    assert "wget: timed out" in out
    assert "rootvisor: no net" in err


def test_demo_that_does_not_run_has_the_machines_status(
    rootvisor: Run, bzimage: Path, machine: Callable[[str, int], None], own_cache: Path
) -> None:
    machine("", 123)
    status, out, err = rootvisor("demo", "--kernel", str(bzimage))
    assert (status, out) == (123, "")
    assert "status 123" in err
    assert list((own_cache / "runs").iterdir()) == []
