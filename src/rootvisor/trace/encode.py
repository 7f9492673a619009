# SPDX-License-Identifier: Apache-2.0
"""The process behind a trace sink: reads frames of records from stdin, writes JSON lines to stdout.

Started as a script (`python -I -S encode.py`). It ends when the pipe ends, however the recording process
ended.
"""

from __future__ import annotations

import json
import marshal
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 3)[0])

from rootvisor.trace.decode import decode_record


def read_frames(stream: BinaryIO) -> Iterator[list[tuple[Any, ...]]]:
    """The lists of records in a stream of frames; a frame cut short by a kill is dropped."""
    while True:
        head = stream.read(4)
        if len(head) < 4:
            return
        length = int.from_bytes(head, "little")
        payload = stream.read(length)
        if len(payload) < length:
            return
        yield marshal.loads(payload)


def encode(source: BinaryIO, target: BinaryIO) -> int:
    """Turn every record of `source` into a JSON line of `target`; the number of lines."""
    start_ns = 0
    count = 0
    for records in read_frames(source):
        lines = []
        for record in records:
            line, start_ns = decode_record(record, start_ns)
            lines.append(json.dumps(line, separators=(",", ":")))
        target.write(("\n".join(lines) + "\n").encode("utf-8", "replace"))
        target.flush()
        count += len(lines)
    return count


def main() -> int:
    """Encode stdin to stdout; 1 when the output cannot be written."""
    try:
        encode(sys.stdin.buffer, sys.stdout.buffer)
    except OSError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
