# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from rootvisor.machine.kernel_arguments import kernel_command_line

RUN = {
    "kernel": {"multiboot": False}, "command": {"argv": ["true"]}, "append": "", "devices": ["console"],
    "initrds": ["/i"],
}  # fmt: skip


def test_a_run_without_a_ramdisk_finds_its_init_on_a_disk() -> None:
    fields: dict[str, Any] = {"command": None, "initrds": [], "devices": [], "append": "root=/dev/nvme0n1"}
    assert kernel_command_line({**RUN, **fields}) == "console=ttyS0 root=/dev/nvme0n1"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "console=hvc0 quiet"),
        ({"tty": True}, "console=hvc0 quiet"),
        ({"display": True}, "console=tty0 console=hvc0"),
        ({"display": True, "tty": True}, "console=tty0 console=hvc0 quiet"),
        ({"display": True, "verbose": True}, "console=tty0 earlyprintk=ttyS0 console=ttyS0"),
        ({"command": None}, "console=ttyS0 console=hvc0"),
        ({"command": None, "display": True}, "console=tty0 console=ttyS0 console=hvc0"),
        ({"command": None, "devices": []}, "console=ttyS0"),
        ({"append": "quiet"}, "console=hvc0 quiet quiet"),
        ({"role": "guest"}, "panic=-1 console=hvc0 quiet"),
        ({"kernel": {"multiboot": True}, "append": "a b"}, None),
    ],
)
def test_the_last_console_is_the_programs_and_a_display_shows_the_log(
    fields: dict[str, Any], words: str | None
) -> None:
    line = kernel_command_line({**RUN, **fields})
    assert line == ("a b" if words is None else f"rdinit=/init {words}")
