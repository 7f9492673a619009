# SPDX-License-Identifier: Apache-2.0
"""Block device (virtio 1.2, section 5.2) on a raw disk image; data moves between file and guest RAM directly."""

from __future__ import annotations

import struct

from .device import RING_FEATURES, VirtioDevice
from .disk_image import SECTOR_BYTES, DiskImage
from .queue import QueueError
from .registers import DEVICE_BLOCK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .queue import Chain, Queue

F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

# Request types (5.2.6) and status.
T_IN = 0
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8
T_DISCARD = 11
T_WRITE_ZEROES = 13
S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

ID_BYTES = 20

_HEADER = struct.Struct("<I4xQ")  # type, sector
_SEGMENT = struct.Struct("<QII")  # sector, sectors, flags
_FLAG_UNMAP = 1

_QUEUE_SIZE = 128
# A request takes a header and a status descriptor besides its data.
_MAX_SEGMENTS = _QUEUE_SIZE - 2
_MAX_RANGES = 16
_MAX_DISCARD_SECTORS = 1 << 22
# Zeroes may have to be written out: no more at once than takes a moment.
_MAX_ZERO_SECTORS = 1 << 16

# struct virtio_blk_config: capacity, size_max, seg_max, geometry, blk_size, topology, writeback and queues, discard
# (sectors, segments, alignment), write zeroes (sectors, segments, may unmap).
_CONFIG = struct.Struct("<QII4xI8x4xIIIIIB3x")


class Block(VirtioDevice):
    """The device.

    Arguments:
        image: the image; closed with the device. If it was opened read-only the device is, too.
        identity: up to 20 bytes of serial number.
    """

    device_type = DEVICE_BLOCK

    def __init__(self, image: DiskImage, *, identity: str = "", name: str = "block") -> None:
        features = RING_FEATURES | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
        features |= F_RO if image.readonly else F_DISCARD | F_WRITE_ZEROES
        super().__init__(name, features, (_QUEUE_SIZE,))
        self._image = image
        self._identity = identity.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self.config = _CONFIG.pack(
            image.size // SECTOR_BYTES,
            0,
            _MAX_SEGMENTS,
            SECTOR_BYTES,
            _MAX_DISCARD_SECTORS,
            _MAX_RANGES,
            1,
            _MAX_ZERO_SECTORS,
            _MAX_RANGES,
            1,
        )

    def handle_request(self, queue: Queue, chain: Chain) -> int:
        """Serve one request; its last writable byte takes the status."""
        writable = chain.writable
        if not writable:
            raise QueueError(f"{self.name}: a request without room for its status")
        last = writable[-1]
        status_view = last[-1:]
        writable[-1] = last[:-1]
        try:
            status, written = self._serve(queue, chain)
        except OSError:
            status, written = S_IOERR, 0
        status_view[0] = status
        # The used length counts from the first writable byte, so a status behind unwritten data counts with it.
        return (chain.writable_bytes() if written or status == S_OK else 0) + 1

    def close(self) -> None:
        """Stop the device, then close the image."""
        super().close()
        self._image.close()

    def _serve(self, queue: Queue, chain: Chain) -> tuple[int, int]:
        header = chain.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return S_IOERR, 0
        kind, sector = _HEADER.unpack(header)
        if kind == T_IN:
            length = chain.writable_bytes()
            if not self._inside(sector, length):
                return S_IOERR, 0
            self._image.read(sector * SECTOR_BYTES, [view for view in chain.writable if view])
            return S_OK, length
        if kind == T_OUT:
            return self._write(queue, chain, sector), 0
        if kind == T_FLUSH:
            if not self._image.readonly:
                self._image.flush()
            return S_OK, 0
        if kind == T_GET_ID:
            return S_OK, chain.write(self._identity)
        if kind in (T_DISCARD, T_WRITE_ZEROES):
            return self._ranges(chain, kind), 0
        return S_UNSUPP, 0

    def _inside(self, sector: int, length: int) -> bool:
        return length % SECTOR_BYTES == 0 and sector * SECTOR_BYTES + length <= self._image.size

    def _write(self, queue: Queue, chain: Chain, sector: int) -> int:
        data = _after_header(chain.readable)
        length = sum(map(len, data))
        if self._image.readonly or not self._inside(sector, length):
            return S_IOERR
        self._image.write(sector * SECTOR_BYTES, data)
        queue.counters.bytes += length
        self._settle()
        return S_OK

    def _settle(self) -> None:
        # A driver that knows no flush believes that what is written is stable (5.2.6.2).
        if not self.driver_features & F_FLUSH:
            self._image.flush()

    def _ranges(self, chain: Chain, kind: int) -> int:
        if self._image.readonly:
            return S_IOERR
        feature, limit = (
            (F_DISCARD, _MAX_DISCARD_SECTORS) if kind == T_DISCARD else (F_WRITE_ZEROES, _MAX_ZERO_SECTORS)
        )
        if not self.driver_features & feature:
            return S_UNSUPP
        data = chain.read(_HEADER.size + (_MAX_RANGES + 1) * _SEGMENT.size)[_HEADER.size :]
        if not data or len(data) % _SEGMENT.size or len(data) > _MAX_RANGES * _SEGMENT.size:
            return S_IOERR
        ranges = list(_SEGMENT.iter_unpack(data))
        for sector, sectors, flags in ranges:
            if flags & ~_FLAG_UNMAP or (kind == T_DISCARD and flags):
                return S_UNSUPP
            if sectors > limit or not self._inside(sector, sectors * SECTOR_BYTES):
                return S_IOERR
        for sector, sectors, flags in ranges:
            if not sectors:
                continue
            offset, length = sector * SECTOR_BYTES, sectors * SECTOR_BYTES
            if kind == T_DISCARD:
                self._image.discard(offset, length)
            else:
                self._image.write_zeroes(offset, length, unmap=bool(flags & _FLAG_UNMAP))
        self._settle()
        return S_OK


def _after_header(buffers: list[memoryview]) -> list[memoryview]:
    """The readable bytes behind the request header, however the driver cut its buffers."""
    skip = _HEADER.size
    rest: list[memoryview] = []
    for view in buffers:
        if skip >= len(view):
            skip -= len(view)
        else:
            rest.append(view[skip:] if skip else view)
            skip = 0
    return rest
