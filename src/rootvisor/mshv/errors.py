# SPDX-License-Identifier: Apache-2.0
"""What /dev/mshv refused, as one line: which call, which errno, the hypervisor's own status, what to do."""

from __future__ import annotations

import errno
import os

from rootvisor.tlfs import status as statuses
from rootvisor.tlfs.hypercalls import call_name

_MENDS: dict[tuple[str, int], str] = {
    ("open", errno.ENOENT): "boot a root partition whose kernel has CONFIG_MSHV_ROOT; modprobe mshv_root",
    ("open", errno.EACCES): "become root: /dev/mshv has mode 0600",
    ("open", errno.EPERM): "become root: /dev/mshv has mode 0600",
    ("open", errno.ENXIO): "modprobe mshv_root",
    ("mmap", errno.ENOMEM): "give the guest less memory",
    ("mmap", errno.ENODEV): "this hypervisor has no such page; use registers by hypercall",
    ("MSHV_CREATE_PARTITION", errno.EINVAL): "check the creation flags: this kernel may not know one of them",
    ("MSHV_CREATE_PARTITION", errno.ENOMEM): "free memory in the root partition",
    ("MSHV_CREATE_PARTITION", errno.EMFILE): "raise the limit of open files (ulimit -n)",
    ("MSHV_INITIALIZE_PARTITION", errno.ENOMEM): "free memory in the root partition",
    ("MSHV_CREATE_VP", errno.EEXIST): "use another index: the partition has this VP",
    ("MSHV_CREATE_VP", errno.EINVAL): "use an index below 256",
    ("MSHV_CREATE_VP", errno.ENOMEM): "free memory in the root partition",
    ("MSHV_CREATE_VP", errno.EIO): "initialize the partition first",
    ("MSHV_SET_GUEST_MEMORY", errno.EEXIST): "unmap the region that overlaps first",
    ("MSHV_SET_GUEST_MEMORY", errno.ENOENT): "nothing is mapped there",
    (
        "MSHV_SET_GUEST_MEMORY",
        errno.EINVAL,
    ): "align address and size to 4096; to unmap, name the region as it was mapped",
    ("MSHV_SET_GUEST_MEMORY", errno.EIO): "initialize the partition first",
    ("MSHV_IRQFD", errno.EBUSY): "use another eventfd: this one has an interrupt",
    ("MSHV_IRQFD", errno.EINVAL): "resampling needs an eventfd and a level-triggered route",
    ("MSHV_IOEVENTFD", errno.EEXIST): "remove the doorbell that is at this address first",
    (
        "MSHV_IOEVENTFD",
        errno.ENOENT,
    ): "there is no such doorbell: address, size, value and eventfd must be the same",
    (
        "MSHV_IOEVENTFD",
        errno.EOPNOTSUPP,
    ): "the driver has doorbells in memory only; handle the port's intercepts",
    (
        "MSHV_SET_MSI_ROUTING",
        errno.EINVAL,
    ): "interrupt numbers are below 4096, and the address' upper half is 0",
    ("MSHV_RUN_VP", errno.EBADF): "the VP is closed",
}
_STATUS_MENDS = {
    statuses.INVALID_HYPERCALL_CODE: "this hypervisor does not have the call",
    statuses.INVALID_HYPERCALL_INPUT: "check the input's size and repeat count",
    statuses.INVALID_PARAMETER: "check the arguments",
    statuses.ACCESS_DENIED: "the root partition lacks the privilege",
    statuses.INVALID_PARTITION_STATE: "initialize the partition first; early properties go before that",
    statuses.UNKNOWN_PROPERTY: "this hypervisor does not have the property",
    statuses.PROPERTY_VALUE_OUT_OF_RANGE: "check the value",
    statuses.INVALID_PARTITION_ID: "the partition is closed",
    statuses.INVALID_VP_INDEX: "create the VP first",
    statuses.INVALID_VP_STATE: "stop the VP first",
    statuses.INVALID_REGISTER_VALUE: "check the registers' values",
    statuses.PROCESSOR_FEATURE_NOT_SUPPORTED: "the processor lacks the feature",
    statuses.OBJECT_IN_USE: "try again when it is free",
}
_GENERAL = "see the root partition's dmesg"


class MshvError(OSError):
    """/dev/mshv cannot do what was asked; ``str()`` is one line with the mend.

    ``call``: the ioctl's or system call's name, with the hypercall's for passed-through ones. ``errno``: as the kernel
    gave it. ``status``: HV_STATUS code when the hypervisor itself refused, else None. ``reps``: elements of a
    repeated hypercall that were done before. ``mend``: what to do.
    """

    def __init__(
        self, call: str, number: int, status: int | None = None, reps: int = 0, mend: str = ""
    ) -> None:
        super().__init__(number, os.strerror(number))
        self.call = call
        self.status = status
        self.reps = reps
        if not mend and status is not None:
            mend = _STATUS_MENDS.get(status, "")
        self.mend = mend or _MENDS.get((call.split("(")[0], number), _GENERAL)

    def __str__(self) -> str:
        reason = (
            statuses.status_name(self.status) if self.status is not None else (self.strerror or "").lower()
        )
        code = errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.call} failed: {reason} ({code}); {self.mend}"


def hypercall_error(code: int, number: int, status: int, reps: int = 0) -> MshvError:
    """The error for hypercall ``code`` passed through; ``status`` 0 means that the driver itself refused."""
    call = f"MSHV_ROOT_HVCALL({call_name(code)})"
    if status:
        return MshvError(call, number, status, reps)
    mend = "the driver does not pass this call on" if number == errno.EINVAL else ""
    return MshvError(call, number, None, reps, mend)
