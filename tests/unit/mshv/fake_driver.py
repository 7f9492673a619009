# SPDX-License-Identifier: Apache-2.0
"""Stands in for the driver: records ioctls, answers them, and reaches the memory that their pointers name."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from rootvisor.mshv import abi
from rootvisor.tlfs.layout import Layout

#: code, input -> status, elements done, output
HypercallAnswer = Callable[[int, bytes, int], tuple[int, int, bytes]]


class FakeDriver:
    """``ioctl`` of this object takes the place of fcntl's; handles get real file descriptors of /dev/null."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.hypercalls: list[tuple[int, bytes, int]] = []
        self.answer: HypercallAnswer = lambda code, data, reps: (0, reps, b"")
        self.fail: dict[int, list[int]] = {}
        """Request -> errno for each of the next calls."""
        self.message = bytes(256)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        packed = bytes(argument) if isinstance(argument, bytearray) else b""
        self.calls.append((request, packed))
        if self.fail.get(request):
            number = self.fail[request].pop(0)
            raise OSError(number, os.strerror(number))
        if request in (abi.CREATE_PARTITION, abi.CREATE_VP):
            return os.open("/dev/null", os.O_RDWR)
        if request == abi.ROOT_HVCALL:
            assert isinstance(argument, bytearray)
            self._hypercall(argument)
        if request == abi.RUN_VP:
            assert isinstance(argument, bytearray)
            argument[:] = self.message
        return 0

    def _hypercall(self, argument: bytearray) -> None:
        code, reps, in_size, out_size, status, in_ptr, out_ptr = abi.ROOT_HVCALL_ARGUMENT.unpack(argument)
        assert status == 0
        assert in_ptr % 4096 == 0
        data = ctypes.string_at(in_ptr, in_size)
        self.hypercalls.append((code, data, reps))
        status, done, output = self.answer(code, data, reps)
        argument[:] = abi.ROOT_HVCALL_ARGUMENT.pack(code, done, in_size, out_size, status, in_ptr, out_ptr)
        if status:
            raise OSError(22, "Invalid argument")
        if out_size:
            ctypes.memmove(out_ptr, output.ljust(out_size, b"\0"), out_size)

    def last(self, layout: Layout, request: int) -> dict[str, int]:
        """Fields of the argument of the last ioctl ``request``."""
        packed = next(data for number, data in reversed(self.calls) if number == request)
        return dict(zip(layout.fields, layout.unpack(packed), strict=True))
