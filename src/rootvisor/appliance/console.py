# SPDX-License-Identifier: Apache-2.0
"""The text that the appliance's kernel prints: kept for the report, and watched for the signs of its death."""

from __future__ import annotations

import re

KEPT_BYTES = 64 << 10
#: An oops with its registers and its trace.
TAIL_LINES = 60

#: What a kernel prints when it cannot go on. The command line has oops=panic, so an oops is an end too.
#: (arch/x86/kernel/dumpstack.c:__die_header, kernel/panic.c:vpanic, arch/x86/mm/fault.c:show_fault_oops.)
_DEATH = re.compile(
    r"Kernel panic - not syncing.*"
    r"|(?:\b[\w ]+: )[0-9a-f]{4} \[#\d+\].*"
    r"|BUG: (?:unable to handle|kernel NULL|scheduling while).*"
    r"|kernel BUG at .*"
    r"|PANIC: .*"
)
_NOISE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1bc|[\x00-\x08\x0b-\x1f\x7f]")
_STAMP = re.compile(r"^\[ *\d+\.\d+\] ?")


class Console:
    """Collects console bytes; ``death`` is the first line that says the kernel has died, or None."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._partial = bytearray()
        self.death: str | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        self._bytes += data
        del self._bytes[:-KEPT_BYTES]
        if self.death:
            return
        *lines, rest = (bytes(self._partial) + data).split(b"\n")
        self._partial = bytearray(rest[-4096:])
        for line in lines:
            text = _readable(line)
            if match := _DEATH.search(text):
                self.death = match.group().strip()
                return

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """The last lines that are not empty, without control characters."""
        texts = (_readable(line) for line in bytes(self._bytes).split(b"\n"))
        return [text for text in texts if text.strip()][-lines:]


def _readable(line: bytes) -> str:
    return _STAMP.sub("", _NOISE.sub("", line.decode("utf-8", "replace"))).rstrip()
