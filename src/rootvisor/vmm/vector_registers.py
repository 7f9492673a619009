# SPDX-License-Identifier: Apache-2.0
"""Vector registers of a stopped processor. XMM registers have names; what is above them lies in the XSAVE state."""

from __future__ import annotations

from ..mshv.vp import STATE_XSAVE
from ..tlfs import registers as names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..mshv import Vp

_IN_PAGE = 6
# The XSAVE header behind the 512 bytes of FXSAVE (Intel SDM 1, 13.4.2), and the first component behind that: AVX, the
# upper halves of YMM registers, which comes first in a compacted image.
_XSTATE_BV, _XCOMP_BV, _AVX_OFFSET = 512, 520, 576
_AVX = 1 << 2
_HALF = 16


def read_vector(vp: Vp, number: int, size: int) -> int:
    """The low ``size`` bytes (16, 32, 64) of vector register ``number``."""
    if number >= 16:
        return 0  # AVX-512, which guests do not have
    low = vp.register_page.xmm(number) if number < _IN_PAGE else vp.get_registers(names.XMM0 + number)[0]
    if size == _HALF:
        return low
    state = vp.get_state(STATE_XSAVE)
    if not int.from_bytes(state[_XSTATE_BV : _XSTATE_BV + 8], "little") & _AVX:
        return low
    at = _AVX_OFFSET + _HALF * number
    return low | int.from_bytes(state[at : at + _HALF], "little") << 128


def write_vector(vp: Vp, number: int, size: int, value: int) -> None:
    """Writes 16 bytes and leaves the rest, or (``size`` 64) all of it."""
    if number >= 16:
        return
    low = value & (1 << 128) - 1
    if number < _IN_PAGE:
        vp.register_page.set_xmm(number, low)
    else:
        vp.set_registers({names.XMM0 + number: low})
    if size == _HALF:
        return
    high = value >> 128 & (1 << 128) - 1
    state = bytearray(vp.get_state(STATE_XSAVE))
    present = int.from_bytes(state[_XSTATE_BV : _XSTATE_BV + 8], "little")
    components = int.from_bytes(state[_XCOMP_BV : _XCOMP_BV + 8], "little")
    if not components & _AVX or (not high and not present & _AVX):
        return  # no AVX, or its state is all zeros, as it shall be
    at = _AVX_OFFSET + _HALF * number
    if not present & _AVX:
        state[_AVX_OFFSET : _AVX_OFFSET + 16 * _HALF] = bytes(16 * _HALF)
    state[at : at + _HALF] = high.to_bytes(_HALF, "little")
    state[_XSTATE_BV : _XSTATE_BV + 8] = (present | _AVX).to_bytes(8, "little")
    vp.set_state(STATE_XSAVE, bytes(state))
