# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from rootvisor.pci import registers as reg
from rootvisor.pci.ecam import Ecam
from rootvisor.pci.function import PciFunction
from rootvisor.pci.root import PciRoot
from tests.unit.virtio.guest_side import ECAM, MMIO32, MMIO64, Platform


class Opaque(PciFunction):
    """A function whose reads have side effects while `open`."""

    open = False

    @property
    def config_is_plain(self) -> bool:
        return not self.open


def window() -> tuple[PciRoot, memoryview, list[bool], Ecam]:
    root = PciRoot(Platform(), ECAM, MMIO32, MMIO64)
    storage = memoryview(bytearray(root.ecam_bytes))
    shown: list[bool] = []
    return root, storage, shown, Ecam(root, storage, shown.append)


def test_memory_shows_functions_and_all_ones_elsewhere() -> None:
    root, storage, shown, ecam = window()
    bdf = root.add(PciFunction(0x1AF4, 0x1041, 0x020000))
    ecam.follow()
    assert shown == [True]
    assert bytes(storage[bdf << 12 : (bdf << 12) + 4]) == b"\xf4\x1a\x41\x10"
    assert bytes(storage[(bdf | 1) << 12 : ((bdf | 1) << 12) + 4]) == b"\xff\xff\xff\xff"
    ecam.write(bdf << 12 | reg.COMMAND, 2, reg.COMMAND_MEMORY)
    assert storage[(bdf << 12) + reg.COMMAND] == reg.COMMAND_MEMORY == ecam.read(bdf << 12 | reg.COMMAND, 2)
    assert shown == [True]


def test_memory_goes_while_a_function_has_side_effects() -> None:
    root, _, shown, ecam = window()
    function = Opaque(0x1AF4, 0x1041, 0x020000)
    bdf = root.add(function)
    ecam.follow()
    function.open = True
    ecam.write(bdf << 12 | reg.COMMAND, 2, 0)
    ecam.write(bdf << 12 | reg.COMMAND, 2, 0)
    function.open = False
    ecam.write(bdf << 12 | reg.COMMAND, 2, 0)
    assert shown == [True, False, True]


def test_function_added_later_appears() -> None:
    root, storage, _, ecam = window()
    ecam.follow()
    bdf = root.add(PciFunction(0x1AF4, 0x1042, 0x010000))
    assert storage[bdf << 12] == 0xFF
    ecam.follow()
    assert bytes(storage[bdf << 12 : (bdf << 12) + 4]) == b"\xf4\x1a\x42\x10"
