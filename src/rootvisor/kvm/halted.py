# SPDX-License-Identifier: Apache-2.0
"""Whether a processor sleeps inside KVM_RUN (HLT, waiting for SIPI): KVM's statistics tell without stopping it."""

from __future__ import annotations

import os
import struct
from fcntl import ioctl

from . import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .vcpu import Vcpu

#: struct kvm_stats_header: flags, name size, descriptors, offsets of the id, the descriptors and the data
_HEADER = struct.Struct("<6I")
#: struct kvm_stats_desc: flags, exponent, size, offset, bucket size; the name follows
_DESCRIPTOR = struct.Struct("<IhHII")
_NAME = b"blocking"


class HaltedState:
    """``HaltedState(vcpu)()`` is true while the processor sleeps; always false where KVM does not count that
    (Linux < 5.16). Close it."""

    __slots__ = ("_at", "_fd")

    def __init__(self, vcpu: Vcpu) -> None:
        self._at = -1
        try:
            self._fd = ioctl(vcpu.fd, abi.KVM_GET_STATS_FD)
        except OSError:
            self._fd = -1
            return
        _flags, name_size, count, _id, descriptors, data = _HEADER.unpack(os.pread(self._fd, 24, 0))
        size = _DESCRIPTOR.size + name_size
        table = os.pread(self._fd, size * count, descriptors)
        for at in range(0, len(table), size):
            if table[at + _DESCRIPTOR.size : at + size].rstrip(b"\0") == _NAME:
                self._at = data + _DESCRIPTOR.unpack_from(table, at)[3]

    def __call__(self) -> bool:
        """One read of a file; any thread."""
        return self._at >= 0 and os.pread(self._fd, 8, self._at) != bytes(8)

    def close(self) -> None:
        """Closes the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._at = -1
