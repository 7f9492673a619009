# SPDX-License-Identifier: Apache-2.0
"""Runs in the root partition: draws four fields of colour on QEMU's ``bochs-display`` by its registers alone (QEMU's
docs/specs/standard-vga.rst).      draw.py PCI-ADDRESS
"""

from __future__ import annotations

import mmap
import os
import sys

WIDTH, HEIGHT = 640, 480
#: Blue, green, red, unused: the fields at the top left, top right, bottom left, bottom right.
COLOURS = (b"\x00\x00\xff\x00", b"\x00\xff\x00\x00", b"\xff\x00\x00\x00", b"\xff\xff\xff\x00")
DISPI = 0x500 // 2
X, Y, BITS, ENABLE = 1, 2, 3, 4


def resource(folder: str, number: int) -> mmap.mmap:
    fd = os.open(f"{folder}/resource{number}", os.O_RDWR)
    try:
        return mmap.mmap(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def main(address: str) -> None:
    folder = f"/sys/bus/pci/devices/{address}"
    with open(f"{folder}/enable", "w") as file:
        file.write("1")
    registers = memoryview(resource(folder, 2)).cast("H")
    for number, value in ((ENABLE, 0), (X, WIDTH), (Y, HEIGHT), (BITS, 32), (ENABLE, 0x41)):
        registers[DISPI + number] = value
    pixels = resource(folder, 0)
    for row in range(HEIGHT):
        left, right = COLOURS[:2] if row < HEIGHT // 2 else COLOURS[2:]
        start = row * WIDTH * 4
        pixels[start : start + WIDTH * 4] = left * (WIDTH // 2) + right * (WIDTH // 2)
    print("drawn", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
