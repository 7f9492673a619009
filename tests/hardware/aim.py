# SPDX-License-Identifier: Apache-2.0
"""Runs in the root partition, as a hostile program of it: aims the DMA engine of QEMU's ``edu`` device (its
docs/specs/edu.rst) at addresses of the machine. Prints a line for each: what, address, and what became of it.

    aim.py PCI-ADDRESS ATTEMPT...      ATTEMPT: own, or an address in hexadecimal
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import time

BUFFER = 0x40000
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
START, TO_MEMORY = 1, 2
MARK = b"AIMEDDMA"


class Engine:
    def __init__(self, address: str) -> None:
        folder = f"/sys/bus/pci/devices/{address}"
        with open(f"{folder}/enable", "w") as file:
            file.write("1")
        config = os.open(f"{folder}/config", os.O_RDWR)
        command = int.from_bytes(os.pread(config, 2, 4), "little")
        os.pwrite(config, (command | 6).to_bytes(2, "little"), 4)
        os.close(config)
        fd = os.open(f"{folder}/resource0", os.O_RDWR | os.O_SYNC)
        self.registers = mmap.mmap(fd, 1 << 20)
        os.close(fd)
        self.words = memoryview(self.registers).cast("Q")
        self._take_own_page()

    def move(self, source: int, destination: int, flags: int) -> None:
        self.words[SOURCE // 8] = source
        self.words[DESTINATION // 8] = destination
        self.words[COUNT // 8] = len(MARK)
        self.words[COMMAND // 8] = START | flags
        deadline = time.monotonic() + 30
        while self.words[COMMAND // 8] & START:
            assert time.monotonic() < deadline, "the engine does not end"
            time.sleep(0.001)

    def read(self, address: int) -> bytes:
        """What the device gets from there; zeroes where it gets nothing."""
        self.page[:8] = bytes(8)
        self.move(self.own, BUFFER, 0)
        self.move(address, BUFFER, 0)
        self.move(BUFFER, self.own, TO_MEMORY)
        return bytes(self.page[:8])

    def write(self, address: int) -> None:
        self.page[:8] = MARK
        self.move(self.own, BUFFER, 0)
        self.move(BUFFER, address, TO_MEMORY)

    def _take_own_page(self) -> None:
        """A page of this program, which the root partition's memory surely has."""
        self.page = mmap.mmap(-1, 4096)
        self.page[:] = bytes(4096)
        self.own = page_numbers(self.page)[0] << 12


def page_numbers(memory: mmap.mmap) -> list[int]:
    """Where the pages of a mapping lie, which have been touched."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address >> 12 << 3)
        entries = struct.unpack(f"<{len(memory) >> 12}Q", pagemap.read(len(memory) >> 9))
    assert all(entry >> 63 for entry in entries), "a page is not in memory"
    return [entry & (1 << 55) - 1 for entry in entries]


def main(address: str, attempts: list[str]) -> None:
    engine = Engine(address)
    for attempt in attempts:
        if attempt == "own":
            engine.write(engine.own + 8)
            print(f"own {engine.own:#x} {bytes(engine.page[8:16]).decode(errors='replace')}", flush=True)
            continue
        target = int(attempt, 16)
        before = engine.read(target)
        engine.write(target)
        after = engine.read(target)
        time.sleep(1)
        print(f"other {target:#x} {before.hex()} {after.hex()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
