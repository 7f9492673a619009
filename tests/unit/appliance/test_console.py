# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rootvisor.appliance.console import KEPT_BYTES, Console

DEATHS = [
    (b"[    0.51] int3: 0000 [#1] PREEMPT SMP NOPTI\n", "int3: 0000 [#1] PREEMPT SMP NOPTI"),
    (b"Oops: 0002 [#3] SMP\n", "Oops: 0002 [#3] SMP"),
    (b"Oops: general protection fault, maybe: 0000 [#1]\n", "maybe: 0000 [#1]"),
    (
        b"BUG: unable to handle page fault for address: ffff\r\n",
        "BUG: unable to handle page fault for address: ffff",
    ),
    (b"[ 1.0] kernel BUG at mm/slub.c:3!\n", "kernel BUG at mm/slub.c:3!"),
    (b"[ 1.0] Kernel panic - not syncing: VFS\n", "Kernel panic - not syncing: VFS"),
]


@pytest.mark.parametrize(("text", "death"), DEATHS)
def test_feed_deadly_line_is_noticed(text: bytes, death: str) -> None:
    console = Console()
    console.feed(text)
    assert console.death is not None
    assert console.death.endswith(death)


@pytest.mark.parametrize(
    "text",
    [
        b"[    1.0] WARNING: CPU: 0 PID: 1 at x.c:3\n",
        b"[    1.0] kvm_amd: Nested Paging enabled\n",
        b"debugging: 12 [ok]\n",
        b"[    3.8] reboot: Power down\n",
    ],
)
def test_feed_other_line_is_no_death(text: bytes) -> None:
    console = Console()
    console.feed(text)
    assert console.death is None


def test_feed_line_in_pieces_is_noticed_once_whole() -> None:
    console = Console()
    for byte in b"x\nKernel panic - not syncing: a":
        console.feed(bytes([byte]))
    assert console.death is None
    console.feed(b"b\n")
    assert console.death == "Kernel panic - not syncing: ab"


def test_tail_has_no_control_characters_or_stamps() -> None:
    console = Console()
    console.feed(b"\x1bc\x1b[?7l\x1b[2J\r\n[    0.1] one\r\n\r\n\x07two\xff\n")
    assert console.tail() == ["one", "two\ufffd"]


def test_feed_endless_output_is_bounded() -> None:
    console = Console()
    for _ in range(100):
        console.feed(b"x" * 5000)
    console.feed(b"\nend\n")
    assert console.tail(1) == ["end"]
    assert sum(map(len, console.tail(1000))) <= KEPT_BYTES
