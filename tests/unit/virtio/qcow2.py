# SPDX-License-Identifier: Apache-2.0
"""qcow2 images (QEMU docs/interop/qcow2.rst) as far as tests need them: written whole, read back cluster by cluster."""

from __future__ import annotations

import struct
from pathlib import Path

CLUSTER = 65536
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_COPIED = 1 << 63
_OFFSET = 0x00FFFFFFFFFFFE00


def write_qcow2(path: Path, content: bytes) -> None:
    """An image of at most 512 MiB, version 3, every cluster allocated."""
    count = -(-len(content) // CLUSTER)
    # Header, refcount table, refcount block, L1 table, L2 table, then the data.
    first = 5
    total = first + count
    header = _HEADER.pack(
        b"QFI\xfb", 3, 0, 0, 16, len(content), 0, 1, 3 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0, 4, 104
    )
    counts = struct.pack(f">{total}H", *[1] * total)
    table = struct.pack(f">{count}Q", *[(first + n) * CLUSTER | _COPIED for n in range(count)])
    parts = (
        header,
        struct.pack(">Q", 2 * CLUSTER),
        counts,
        struct.pack(">Q", 4 * CLUSTER | _COPIED),
        table,
    )
    path.write_bytes(
        b"".join(part.ljust(CLUSTER, b"\0") for part in parts) + content.ljust(count * CLUSTER, b"\0")
    )


def read_qcow2(path: Path) -> bytes:
    """The contents of an image without compression or backing file."""
    data = path.read_bytes()
    fields = _HEADER.unpack_from(data)
    size, l1_at = fields[5], fields[8]
    content = bytearray()
    for number in range(-(-size // CLUSTER)):
        l2_at = struct.unpack_from(">Q", data, l1_at + 8 * (number // (CLUSTER // 8)))[0] & _OFFSET
        entry = struct.unpack_from(">Q", data, l2_at + 8 * (number % (CLUSTER // 8)))[0]
        at = entry & _OFFSET
        zero = entry & 1 or not at
        content += bytes(CLUSTER) if zero else data[at : at + CLUSTER].ljust(CLUSTER, b"\0")
    return bytes(content[:size])
