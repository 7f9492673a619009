# SPDX-License-Identifier: Apache-2.0
"""Atomic changes of memory that a guest changes at the same time.

Python has no atomic memory operation; the kernel's ``FUTEX_WAKE_OP`` is one: it applies an operation to a 32-bit word
in one instruction, for whoever calls it, and wakes nobody when asked for nobody (``kernel/futex/waitwake.c``).
"""

from __future__ import annotations

from .errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_SYS_FUTEX = 202
_FUTEX_WAKE_OP_PRIVATE = 5 | 128
_OP_OR = 2
_OP_ARGUMENT_SHIFT = 8

_futex: Callable[..., int] | None = None


def set_bit(memory: memoryview, bit: int) -> None:
    """Sets bit ``bit`` (bit 0 is the lowest of byte 0) of writable ``memory``, atomically.

    ``memory`` must begin at a multiple of 4 bytes, as pages do.
    """
    global _futex
    import ctypes

    if _futex is None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        _futex = libc.syscall
    word = ctypes.c_uint32.from_buffer(memory, bit // 32 * 4)
    address = ctypes.c_void_p(ctypes.addressof(word))
    # oparg is the number of the bit, because of OPARG_SHIFT; the comparison (word == 0) only chooses whom to wake
    operation = (_OP_OR | _OP_ARGUMENT_SHIFT) << 28 | (bit % 32) << 12
    none = ctypes.c_void_p(0)
    result = _futex(
        ctypes.c_long(_SYS_FUTEX),
        address,
        ctypes.c_int(_FUTEX_WAKE_OP_PRIVATE),
        ctypes.c_int(0),
        none,
        address,
        ctypes.c_uint32(operation),
    )
    if result < 0:
        raise KvmError(f"cannot change shared memory atomically: errno {ctypes.get_errno()}")
