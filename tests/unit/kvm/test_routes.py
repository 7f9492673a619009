# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
import threading
from _thread import allocate_lock

from rootvisor.kvm import abi
from rootvisor.kvm.vm import Vm


class Recorder(Vm):
    """Without a KVM. Another thread has time for a route of its own while the first table is on its way."""

    def __init__(self) -> None:
        self._routes = {}
        self._route_lock = allocate_lock()
        self._split = True
        self.tables: list[dict[int, int]] = []
        self.other: threading.Thread | None = None

    def ioctl(self, request: int, argument: int | bytearray = 0) -> int:
        assert request == abi.KVM_SET_GSI_ROUTING and isinstance(argument, bytearray)
        if self.other is None:
            self.other = threading.Thread(target=self.set_msi_route, args=(25, (0xFEE00000, 0x52)))
            self.other.start()
            self.other.join(0.3)
        (count,) = struct.unpack_from("<I", argument)
        entries = (struct.unpack_from("<IIIIIII", argument, 8 + 48 * number) for number in range(count))
        self.tables.append({entry[0]: entry[6] for entry in entries})
        return 0


def test_an_older_table_never_comes_after_a_newer_one() -> None:
    vm = Recorder()
    vm.set_msi_route(24, (0xFEE00000, 0x51))
    assert vm.other is not None
    vm.other.join()
    assert vm.tables == [{24: 0x51}, {24: 0x51, 25: 0x52}]


def test_a_route_that_is_there_already_is_not_set_again() -> None:
    vm = Recorder()
    vm.other = threading.current_thread()
    vm.set_msi_route(24, (0xFEE00000, 0x51))
    vm.set_msi_route(24, (0xFEE00000, 0x51))
    vm.set_msi_route(25, None)
    vm.set_msi_route(24, None)
    assert vm.tables == [{24: 0x51}, {}]
