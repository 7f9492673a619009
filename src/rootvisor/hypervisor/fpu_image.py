# SPDX-License-Identifier: Apache-2.0
"""FPU and SIMD registers of a parked VP: its XSAVE image in the standard format, read at most once per stop.

KVM_GET_FPU would be smaller, but has no MXCSR, and shows old values of components in their initial state.
"""

from __future__ import annotations

from ..tlfs import status
from .errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_vp import ChildVp

SIZE = 4096
MXCSR = 24
MXCSR_MASK = 28
XMM = 160
XSTATE_BV = 512
_X87, _SSE = 1, 2
#: What processors without DAZ accept, when the image says nothing.
_DEFAULT_MXCSR_MASK = 0xFFBF


class FpuImage:
    """The image of one VP; ``buffer`` is valid between :meth:`load` and :meth:`leave`."""

    __slots__ = ("buffer", "changed", "loaded")

    def __init__(self) -> None:
        self.buffer = bytearray(SIZE)
        self.loaded = False
        self.changed = False

    def load(self, vp: ChildVp) -> bytearray:
        """The image, read from KVM unless it is here."""
        if not self.loaded:
            vp.vcpu.xsave(self.buffer)
            self.loaded = True
        return self.buffer

    def get(self, vp: ChildVp, offset: int) -> int:
        """16 bytes of the legacy area."""
        return int.from_bytes(self.load(vp)[offset : offset + 16], "little")

    def set(self, vp: ChildVp, offset: int, value: int) -> None:
        """Stores 16 bytes of the legacy area: control words, MXCSR (128 bits as in FXSAVE), x87 and XMM registers.

        HV_STATUS_INVALID_REGISTER_VALUE for reserved bits of MXCSR.
        """
        image = self.load(vp)
        if offset == 16:
            mask = int.from_bytes(image[MXCSR_MASK : MXCSR_MASK + 4], "little") or _DEFAULT_MXCSR_MASK
            if value >> 64 & 0xFFFFFFFF & ~mask:
                raise HvError(status.INVALID_REGISTER_VALUE)
            value = value & (1 << 96) - 1 | mask << 96
        image[offset : offset + 16] = value.to_bytes(16, "little")
        if offset < XMM:
            image[XSTATE_BV] |= _X87
        if offset == 16 or offset >= XMM:
            image[XSTATE_BV] |= _SSE
        self.changed = True

    def set_xmm(self, vp: ChildVp, data: memoryview) -> None:
        """Stores XMM0 and up from 96 bytes of the register page."""
        image = self.load(vp)
        image[XMM : XMM + len(data)] = data
        image[XSTATE_BV] |= _SSE
        self.changed = True

    def store(self, vp: ChildVp) -> None:
        """Hands changes over to KVM."""
        if self.changed:
            self.changed = False
            vp.vcpu.set_xsave(self.buffer)

    def leave(self, vp: ChildVp) -> None:
        """The VP is about to run, or somebody else changes its FPU state: changes go to KVM, the image is dropped."""
        self.store(vp)
        self.loaded = False

    def forget(self) -> None:
        """The VP has run."""
        self.loaded = False
        self.changed = False
