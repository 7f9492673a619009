# SPDX-License-Identifier: Apache-2.0
"""The offset of a processor's TSC to the host's (vCPU attribute ``KVM_VCPU_TSC_OFFSET``, since Linux 5.16).

Unlike the MSR it can be moved exactly: the TSC does not go on between reading and writing.
"""

from __future__ import annotations

from fcntl import ioctl
from struct import pack

from . import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .vcpu import Vcpu

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def _attribute(vcpu: Vcpu, request: int, value: int) -> int | None:
    import ctypes

    cell = ctypes.c_uint64(value)
    attribute = bytearray(pack("<IIQQ", 0, abi.VCPU_TSC_CTRL, abi.VCPU_TSC_OFFSET, ctypes.addressof(cell)))
    try:
        ioctl(vcpu.fd, request, attribute)
    except OSError:
        return None
    return cell.value


def get(vcpu: Vcpu) -> int | None:
    """TSC of the guest less the (scaled) one of the host, modulo 2^64; None when KVM does not tell."""
    return _attribute(vcpu, abi.KVM_GET_DEVICE_ATTR, 0)


def set(vcpu: Vcpu, offset: int) -> bool:
    """Moves the guest's TSC; False when KVM does not know how."""
    return _attribute(vcpu, abi.KVM_SET_DEVICE_ATTR, offset & _MASK64) is not None
