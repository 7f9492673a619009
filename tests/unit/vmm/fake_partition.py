# SPDX-License-Identifier: Apache-2.0
"""A child partition and a processor that are none: what is done to them is recorded, what they say is scripted."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence

from rootvisor.mshv import MshvError, RegisterPage
from rootvisor.tlfs import hypercalls, registers, translation
from rootvisor.tlfs import intercepts as types

STATUS_INVALID_PARAMETER = 5


class FakePartition:
    """``fail``: names of methods that the kernel refuses from now on."""

    def __init__(self) -> None:
        self.irqfds: list[tuple[int, int]] = []
        self.routes: list[tuple[int, int, int]] = []
        self.interrupts: list[tuple[int, int, int, bool, bool]] = []
        self.doorbells: list[tuple[int, int, int, int | None]] = []
        self.fail: set[str] = set()

    def _refuse(self, name: str) -> None:
        if name in self.fail:
            raise MshvError(name, 22)

    def add_irqfd(self, fd: int, number: int) -> None:
        self._refuse("add_irqfd")
        os.fstat(fd)
        assert (fd, number) not in self.irqfds
        self.irqfds.append((fd, number))

    def remove_irqfd(self, fd: int, number: int) -> None:
        self._refuse("remove_irqfd")
        self.irqfds.remove((fd, number))

    def set_msi_routing(self, routes: Sequence[tuple[int, int, int]]) -> None:
        self._refuse("set_msi_routing")
        self.routes = list(routes)

    def assert_interrupt(
        self, vector: int, destination: int, mode: int, *, level: bool = False, logical: bool = False
    ) -> None:
        self._refuse("assert_interrupt")
        self.interrupts.append((vector, destination, mode, level, logical))

    def add_doorbell(self, gpa: int, fd: int, size: int, value: int | None) -> None:
        self._refuse("add_doorbell")
        self.doorbells.append((gpa, fd, size, value))

    def remove_doorbell(self, gpa: int, fd: int, size: int, value: int | None) -> None:
        self.doorbells.remove((gpa, fd, size, value))


class FakeVp:
    """Runs a script: each element is a message (bytes), or a function that is called in the processor's thread.

    At the script's end :meth:`wait` waits to be interrupted.
    """

    def __init__(self, index: int = 0) -> None:
        import threading

        self.index = index
        self.buffer = bytearray(256)
        self.message = memoryview(self.buffer)
        self.register_page = RegisterPage(mmap.mmap(-1, 4096))
        self.script: list[bytes | Callable[[], None]] = []
        self.set: list[tuple[str, int]] = []
        self.hypercalls: list[tuple[int, bytes, int]] = []
        self.states: dict[int, bytes] = {}
        self.values: dict[int, int] = {}
        self.unknown: set[int] = set()
        #: page number -> (result, page number)
        self.pages: Callable[[int, int], tuple[int, int]] = lambda page, _flags: (translation.SUCCESS, page)
        self._interrupted = threading.Event()
        self.idle = threading.Event()

    def wait(self) -> bool:
        if self._interrupted.is_set():
            self._interrupted.clear()
            return False
        while self.script:
            step = self.script.pop(0)
            if callable(step):
                step()
                continue
            self.buffer[:] = step.ljust(256, b"\0")
            return True
        self.idle.set()
        assert self._interrupted.wait(30), "nobody interrupts the processor"
        self._interrupted.clear()
        return False

    def interrupt(self, number: int = 0, timeout: float = 10.0) -> bool:
        self._interrupted.set()
        return True

    def set_registers(self, values: dict[str | int, int] | None = None, **named: int) -> None:
        self.set += [(str(name), value) for name, value in [*(values or {}).items(), *named.items()]]

    def get_registers(self, *names: int) -> list[int]:
        for number, name in enumerate(names):
            if name in self.unknown:
                raise MshvError("get", 22, status=STATUS_INVALID_PARAMETER, reps=number)
        return [self.values.get(name, 0) for name in names]

    def get_state(self, kind: int) -> bytes:
        if kind not in self.states:
            raise MshvError("MSHV_GET_VP_STATE", 22)
        return self.states[kind]

    def set_state(self, kind: int, data: bytes) -> None:
        self.states[kind] = data

    def hypercall(self, code: int, data: bytes, output: int = 0, reps: int = 0) -> bytes:
        self.hypercalls.append((code, data, reps))
        if code == hypercalls.TRANSLATE_VIRTUAL_ADDRESS:
            _partition, _vp, flags, page = registers.TRANSLATE_INPUT.unpack(data)
            result, gpa_page = self.pages(page, flags)
            return registers.TRANSLATE_OUTPUT.pack(result, 0, 0, gpa_page)
        if code == hypercalls.SET_VP_REGISTERS:
            for at in range(16, len(data), 32):
                name = int.from_bytes(data[at : at + 4], "little")
                self.values[name] = int.from_bytes(data[at + 16 : at + 32], "little")
        return bytes(output)

    def close(self) -> None:
        self.register_page.close()


def message(kind: int, **fields: int | bytes) -> bytes:
    """A message as the hypervisor writes it: fields of its layout in ``tlfs.intercepts``, zero where not given.

    Field names are those of the message's own layout or of the header's.
    """
    data = bytearray(256)
    data[0:4] = kind.to_bytes(4, "little")
    at = {
        "length": (20, 1), "access": (21, 1), "state": (22, 2), "cs_attributes": (38, 2), "rip": (40, 8),
        "rflags": (48, 8),
    }  # fmt: skip
    if kind == types.X64_IO_PORT_INTERCEPT:
        at |= {"port": (56, 2), "info": (58, 1), "count": (59, 1), "rax": (64, 8), "code": (72, 16)}
    elif kind == types.X64_APIC_EOI:
        at |= {"vector": (20, 4)}
    else:
        at |= {"count": (60, 1), "info": (61, 1), "gva": (64, 8), "gpa": (72, 8), "code": (80, 16)}
    for name, value in fields.items():
        offset, size = at[name]
        content = value.ljust(size, b"\0") if isinstance(value, bytes) else value.to_bytes(size, "little")
        data[offset : offset + size] = content
    return bytes(data)
