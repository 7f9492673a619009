# SPDX-License-Identifier: Apache-2.0
"""The ports that bare-metal test kernels expect."""

from __future__ import annotations

import pytest

from rootvisor.chips.debug_exit import DebugExit
from rootvisor.chips.fw_cfg import FirmwareConfiguration


def item(chip: FirmwareConfiguration, number: int, size: int) -> bytes:
    chip.write(0, 2, number)
    return bytes(chip.read(1, 1) for _ in range(size))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, b"QEMU"),
        (3, (64 << 20).to_bytes(8, "little")),
        (5, b"\3\0\0\0"),
        (0x0F, b"\3\0"),
        (0x4711, bytes(8)),
    ],
)
def test_configuration_items(number: int, expected: bytes) -> None:
    chip = FirmwareConfiguration(64 << 20, 3)
    assert item(chip, number, len(expected)) == expected
    assert item(chip, number, len(expected)) == expected, "selecting begins anew"


def test_configuration_ignores_other_accesses() -> None:
    chip = FirmwareConfiguration(1 << 20, 1)
    chip.write(1, 1, 5)
    chip.write(0, 4, 5)
    assert (chip.read(0, 2), chip.read(1, 2), chip.read(1, 1)) == (0, 0, 0)


@pytest.mark.parametrize(("value", "status"), [(0, 1), (1, 3), (77, 155), (0xFFFFFFFF, 0xFF)])
def test_exit_port_gives_the_status_of_isa_debug_exit(value: int, status: int) -> None:
    ended: list[tuple[str, str]] = []
    port = DebugExit(lambda how, detail: ended.append((how, detail)))
    assert port.read(0, 4) == 0xFFFFFFFF
    port.write(0, 4, value)
    port.write(0, 4, 5)
    assert port.status == status
    assert ended == [("exit", f"{value:#x} written to port 0xf4")]
