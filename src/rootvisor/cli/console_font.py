# SPDX-License-Identifier: Apache-2.0
"""Runs in the root partition, as `python -I -S console_font.py`: prints the font of the kernel's console, the height of
its characters and their lines in hexadecimal (`screen_text.Font`). They are 8 pixels wide.
"""

from __future__ import annotations

import os
import sys
from array import array
from fcntl import ioctl
from struct import pack, unpack_from

#: struct console_font_op of linux/kd.h: op, flags, width, height, charcount, data. A character has 32 bytes.
KDFONTOP = 0x4B72
_GET = 1
_FORMAT = "5IP"
_CHARACTERS, _CHARACTER_BYTES = 512, 32


def main() -> int:
    """Its exit status."""
    glyphs = array("B", bytes(_CHARACTERS * _CHARACTER_BYTES))
    try:
        fd = os.open("/dev/tty0", os.O_RDWR | os.O_NOCTTY)
        request = pack(_FORMAT, _GET, 0, 8, 32, _CHARACTERS, glyphs.buffer_info()[0])
        _, _, width, height, count = unpack_from("5I", ioctl(fd, KDFONTOP, request))
    except OSError as error:
        sys.stderr.write(f"the console has no font to show: {error.strerror}\n")
        return 1
    if width != 8:
        sys.stderr.write(f"the console's font is {width} pixels wide, not 8\n")
        return 1
    lines = [
        bytes(glyphs[number * _CHARACTER_BYTES : number * _CHARACTER_BYTES + height])
        for number in range(count)
    ]
    print(height, b"".join(lines).hex())
    return 0


if __name__ == "__main__":
    sys.exit(main())
