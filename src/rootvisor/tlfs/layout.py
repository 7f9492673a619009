# SPDX-License-Identifier: Apache-2.0
"""Fixed binary layouts: a name, named fields, and a size that is checked at import."""

from __future__ import annotations

from struct import Struct


class Layout:
    """A little-endian structure of the interface.

    ``Layout("hv_input_x", 16, "partition_id:Q", "vp_index:I", "_:4x")``: fields are ``name:struct-format``; a field
    called ``_`` is padding. ``unpack`` gives the fields in order, ``pack`` takes them in order.
    """

    __slots__ = ("fields", "name", "offsets", "pack", "pack_into", "size", "unpack", "unpack_from")

    def __init__(self, name: str, size: int, *fields: str) -> None:
        self.name = name
        self.size = size
        names = []
        formats = []
        offsets = []
        offset = 0
        for field in fields:
            label, _, code = field.partition(":")
            formats.append(code)
            if label != "_":
                names.append(label)
                offsets.append(offset)
            offset += Struct("<" + code).size
        if offset != size:
            raise AssertionError(f"{name}: fields take {offset} bytes, not {size}")
        compiled = Struct("<" + "".join(formats))
        self.fields = tuple(names)
        self.offsets = tuple(offsets)
        self.pack = compiled.pack
        self.pack_into = compiled.pack_into
        self.unpack = compiled.unpack
        self.unpack_from = compiled.unpack_from
