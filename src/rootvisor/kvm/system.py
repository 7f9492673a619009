# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm itself: version, capabilities, supported CPUID, new machines."""

from __future__ import annotations

import errno
import os
import struct
from fcntl import ioctl

from . import abi
from .errors import KvmError, ioctl_error, kvm_error
from .vm import Vm

#: Capabilities without which Rootvisor cannot work, with the name shown to users.
REQUIRED = (
    (abi.CAP_IRQCHIP, "KVM_CAP_IRQCHIP"),
    (abi.CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
    (abi.CAP_IRQFD, "KVM_CAP_IRQFD"),
    (abi.CAP_PIT2, "KVM_CAP_PIT2"),
    (abi.CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD"),
    (abi.CAP_GET_TSC_KHZ, "KVM_CAP_GET_TSC_KHZ"),
    (abi.CAP_SYNC_REGS, "KVM_CAP_SYNC_REGS"),
    (abi.CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"),
    (abi.CAP_READONLY_MEM, "KVM_CAP_READONLY_MEM"),
    (abi.CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
    (abi.CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR"),
    (abi.CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER"),
)

#: Parameters of KVM's modules: processors that deliver and end interrupts without it.
_EOI_INSIDE = ("/sys/module/kvm_intel/parameters/enable_apicv", "/sys/module/kvm_amd/parameters/avic")

CpuidEntry = tuple[int, int, int, int, int, int, int]


class Kvm:
    """An open /dev/kvm. Raises :class:`KvmError` when it is absent, forbidden or too old."""

    __slots__ = ("fd", "run_size")

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise kvm_error("open", error) from error
        version = self._ioctl(abi.KVM_GET_API_VERSION)
        if version != 12:
            raise KvmError(f"/dev/kvm speaks API version {version}, not 12; use --engine appliance")
        self.run_size = self._ioctl(abi.KVM_GET_VCPU_MMAP_SIZE)

    def _ioctl(self, request: int, argument: int | bytearray = 0) -> int:
        try:
            return ioctl(self.fd, request, argument)
        except OSError as error:
            raise ioctl_error(request, error) from error

    def capability(self, number: int) -> int:
        """KVM_CHECK_EXTENSION: 0 when absent."""
        return self._ioctl(abi.KVM_CHECK_EXTENSION, number)

    def missing_capabilities(self) -> list[str]:
        """Names of the required capabilities that this kernel lacks."""
        missing = [name for number, name in REQUIRED if not self.capability(number)]
        if self.capability(abi.CAP_SYNC_REGS) & 3 != 3:
            missing.append("KVM_CAP_SYNC_REGS with regs and sregs")
        return missing

    def supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID as (function, index, flags, eax, ebx, ecx, edx)."""
        count = 128
        while True:
            buffer = bytearray(8 + 40 * count)
            struct.pack_into("<I", buffer, 0, count)
            try:
                ioctl(self.fd, abi.KVM_GET_SUPPORTED_CPUID, buffer)
            except OSError as error:
                if error.errno == errno.E2BIG and count < 4096:
                    count *= 2
                    continue
                raise ioctl_error(abi.KVM_GET_SUPPORTED_CPUID, error) from error
            entries = struct.unpack_from("<I", buffer)[0]
            unpack = struct.Struct("<7I12x").unpack_from
            return [unpack(buffer, 8 + 40 * index) for index in range(entries)]

    @staticmethod
    def eoi_exits() -> bool:
        """Whether the end of an interrupt makes a guest exit, as it does without APICv and AVIC."""
        for name in _EOI_INSIDE:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                if os.read(fd, 1) in (b"Y", b"1"):
                    return False
            finally:
                os.close(fd)
        return True

    def create_vm(self) -> Vm:
        """A new virtual machine without memory or processors."""
        return Vm(self)

    def close(self) -> None:
        """Closes /dev/kvm; machines made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
