# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.peers import guest

EXPECTED = {"up": "7.3.0", "processors": "2", "disk": "d1", "page": "p1"}
SAID = [
    ("up", "7.3.0"),
    ("clocksource", "tsc"),
    ("processors", "2"),
    ("disk", "d1"),
    ("page", "p1"),
    ("end", ""),
]


def argv(machine: str, accelerator: str = "mshv") -> list[str]:
    return guest.qemu_argv(
        "/q",
        accelerator=accelerator,
        cpu="host",
        machine=machine,
        vps=2,
        memory_mib=256,
        kernel="/k",
        initrd="/i",
        disk="/d",
        append=guest.command_line(80, machine),
    )


def test_judge_all_said_finds_nothing() -> None:
    assert guest.judge(SAID, EXPECTED) == []


def test_judge_wrong_value_is_named() -> None:
    said = [("processors", "1") if entry[0] == "processors" else entry for entry in SAID]
    assert guest.judge(said, EXPECTED) == ["processors: 1 instead of 2"]


def test_judge_guest_that_stops_is_told_by_its_next_word() -> None:
    assert guest.judge(SAID[:3], EXPECTED) == ["the guest did not get to `disk`"]
    assert guest.judge(SAID[:-1], EXPECTED) == ["the guest did not get to its end"]


def test_judge_problems_that_the_guest_saw_count() -> None:
    assert guest.judge([*SAID, ("problem", "WARNING: x")], EXPECTED) == ["WARNING: x"]


@pytest.mark.parametrize(
    "line",
    [
        b"[    1.0] Kernel panic - not syncing: Attempted to kill init!",
        b"[    1.0] Oops: general protection fault, probably for non-canonical address",
        b"[    1.0] BUG: unable to handle page fault",
    ],
)
def test_fatal_lines_are_recognised(line: bytes) -> None:
    assert guest.FATAL.search(line)


def test_fatal_ordinary_lines_are_not() -> None:
    assert not guest.FATAL.search(b"[    0.4] PCI: Fatal: No config space access function found")
    assert not guest.FATAL.search(b"guest: up 7.3.0")


def test_filler_is_the_same_each_time() -> None:
    assert guest.md5(guest.filler(1000, 1)) == guest.md5(guest.filler(1000, 1))
    assert guest.filler(1000, 1) != guest.filler(1000, 2)


def test_command_line_names_the_server() -> None:
    assert "guest.url=http://10.0.2.2:80/page" in guest.command_line(80, "microvm").split()
    assert guest.command_line(80, "microvm", "quiet").endswith(" quiet")


def test_command_line_of_a_q35_keeps_linux_from_buses_that_are_not_there() -> None:
    assert "pci=lastbus=0" in guest.command_line(80, "q35").split()
    assert "pci=lastbus=0" not in guest.command_line(80, "microvm").split()


def test_qemu_argv_microvm_has_virtio_mmio_and_q35_has_pci() -> None:
    assert "virtio-blk-device,drive=disk" in argv("microvm")
    assert "virtio-blk-pci,drive=disk" in argv("q35")
    assert argv("q35")[argv("q35").index("-M") + 1] == "q35,hpet=off"
    assert argv("q35", "kvm")[argv("q35").index("-accel") + 1] == "kvm"


def test_ramdisk_holds_init_and_busybox(tmp_path: Path) -> None:
    (tmp_path / "busybox").write_bytes(b"the program")
    archive = guest.ramdisk(None, str(tmp_path / "busybox"))
    assert b"the program" in archive
    assert b"guest: up" in archive
    assert archive.startswith(b"070701")
