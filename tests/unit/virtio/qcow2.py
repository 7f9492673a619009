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


def name_backing_file(path: Path, name: str, image_format: str = "", *, external_data: bool = False) -> None:
    """Has an image say that it stands on another file, and that one's format unless it is empty; or that its data are
    elsewhere. That file's bytes show where the image has none of its own."""
    with path.open("r+b") as file:
        if name:
            at = 1024
            file.seek(8)
            file.write(struct.pack(">QI", at, len(name)))
            file.seek(at)
            file.write(name.encode())
        if image_format:
            file.seek(104)  # behind the header
            file.write(
                struct.pack(">II", 0xE2792ACA, len(image_format)) + image_format.encode().ljust(8, b"\0")
            )
        if external_data:
            file.seek(72)
            file.write(struct.pack(">Q", 1 << 2))


def resize_qcow2(path: Path, size: int) -> None:
    """Gives an image without content a size: no cluster has anything yet."""
    with path.open("r+b") as file:
        file.seek(24)
        file.write(size.to_bytes(8, "big"))
