# SPDX-License-Identifier: Apache-2.0
"""A processor made of lists, for the emulator to work on."""

from __future__ import annotations

from rootvisor.x86.processor import Fault

PAGE_FAULT = 14


class Model:
    """Registers as lists, and one piece of memory at ``start``; beyond it accesses fault.

    ``accesses`` records what was done: ("read", address, size), ("write", ...), ("in", port, size), ("out", ...).
    ``readonly`` is a set of pages that cannot be written, ``absent`` of pages that are not there.
    """

    def __init__(self, memory: bytes = b"", start: int = 0, rip: int = 0, rflags: int = 2) -> None:
        self.registers = [0] * 16
        self.rip = rip
        self.rflags = rflags
        self.segments = [0] * 6
        self.stack = 0xFFFF_FFFF
        self.width = 64
        self.vectors = [0] * 32
        self.memory = bytearray(memory)
        self.start = start
        self.readonly: set[int] = set()
        self.absent: set[int] = set()
        self.accesses: list[tuple[str, int, int]] = []
        self.ports: dict[int, int] = {}

    def general(self, number: int, /) -> int:
        return self.registers[number]

    def set_general(self, number: int, value: int, /) -> None:
        assert 0 <= value < 1 << 64
        self.registers[number] = value

    def segment_base(self, number: int, /) -> int:
        return self.segments[number]

    def stack_mask(self) -> int:
        return self.stack

    def vector(self, number: int, size: int, /) -> int:
        assert size in (16, 32, 64)
        return self.vectors[number] & (1 << size * 8) - 1

    def set_vector(self, number: int, size: int, value: int, /) -> None:
        assert size in (16, 64)
        assert 0 <= value < 1 << size * 8
        if size == 16:
            value |= self.vectors[number] >> 128 << 128
        self.vectors[number] = value & (1 << self.width * 8) - 1

    def _check(self, address: int, size: int, write: bool) -> int:
        assert 0 <= address < 1 << 64
        page = address >> 12
        assert size and page == address + size - 1 >> 12, "an access crosses a page"
        at = address - self.start
        if page in self.absent or (write and page in self.readonly) or not 0 <= at <= len(self.memory) - size:
            raise Fault(PAGE_FAULT, 2 if write else 0, address)
        return at

    def read(self, address: int, size: int, write_intent: bool, /) -> int:
        assert size in (1, 2, 4, 8)
        at = self._check(address, size, write_intent)
        self.accesses.append(("read", address, size))
        return int.from_bytes(self.memory[at : at + size], "little")

    def write(self, address: int, size: int, value: int, /) -> None:
        assert size in (1, 2, 4, 8)
        at = self._check(address, size, True)
        self.accesses.append(("write", address, size))
        self.memory[at : at + size] = value.to_bytes(size, "little")

    def probe(self, address: int, size: int, write: bool, /) -> None:
        self._check(address, size, write)

    def input(self, port: int, size: int, /) -> int:
        assert 0 <= port < 0x10000
        self.accesses.append(("in", port, size))
        return self.ports.get(port, 0xFFFF_FFFF) & (1 << size * 8) - 1

    def output(self, port: int, size: int, value: int, /) -> None:
        assert 0 <= port < 0x10000
        assert 0 <= value < 1 << size * 8
        self.accesses.append(("out", port, size))
        self.ports[port] = value

    def state(self) -> tuple[object, ...]:
        """Everything that an instruction can change."""
        return self.rip, self.rflags, list(self.registers), list(self.vectors), bytes(self.memory)
