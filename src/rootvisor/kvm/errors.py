# SPDX-License-Identifier: Apache-2.0
"""What KVM refused, as one line: which call, which errno, what to do."""

from __future__ import annotations

import errno
import os

from .abi import IOCTL_NAMES

_MENDS = {
    ("open", errno.ENOENT): "load the module (modprobe kvm_amd or kvm_intel) or use --engine appliance",
    (
        "open",
        errno.EACCES,
    ): "join the kvm group (usermod -aG kvm $USER, then log in again) or use --engine appliance",
    ("open", errno.EPERM): "join the kvm group or use --engine appliance",
    ("open", errno.ENODEV): "switch virtualization on in the firmware or use --engine appliance",
    (
        "KVM_CREATE_VM",
        errno.EBUSY,
    ): "another hypervisor holds the processor; stop it or use --engine appliance",
    ("KVM_CREATE_VM", errno.ENOMEM): "free memory on this machine",
    ("KVM_CREATE_VCPU", errno.EINVAL): "fewer virtual processors: see KVM's limit in `rootvisor doctor`",
    ("KVM_CREATE_VCPU", errno.ENOMEM): "free memory on this machine",
    ("KVM_SET_USER_MEMORY_REGION", errno.ENOMEM): "give the partition less memory (--memory)",
}


class KvmError(Exception):
    """KVM cannot do what was asked; ``str()`` is one line with the mend."""


def kvm_error(call: str, error: OSError) -> KvmError:
    """The error for ``call`` ('open' or an ioctl's name) that failed with ``error``."""
    number = error.errno or 0
    name = errno.errorcode.get(number, str(number))
    mend = _MENDS.get((call, number), "see `rootvisor doctor`, or use --engine appliance")
    what = "cannot open /dev/kvm" if call == "open" else f"{call} failed"
    return KvmError(f"{what}: {os.strerror(number).lower()} ({name}); {mend}")


def ioctl_error(request: int, error: OSError) -> KvmError:
    """The error for ioctl number ``request`` that failed with ``error``."""
    return kvm_error(IOCTL_NAMES.get(request, f"ioctl {request:#x}"), error)
