# SPDX-License-Identifier: Apache-2.0
"""A program that holds one idle KVM machine for as long as the appliance runs, and a clock that ticks.

KVM and the scheduler patch their own code when the first virtual machine appears and when the last one goes
(``preempt_notifier_key``, ``apic_sw_disabled``: static branches that count users). QEMU before 8.1 may keep running the
breakpoint that such a patch puts in place for a moment, when another emulated processor translates the page at that
moment: the kernel then dies with an int3 oops. With one machine held from the time when a single processor ran, the
counts never return to zero, and nothing is patched.

The clock: QEMU's emulated SVM sets and clears its flag for pending virtual interrupts at every VMRUN and #VMEXIT
without the lock under which other threads set the flag for real ones in the same word (``helper_vmrun``, ``do_vmexit``
in target/i386/tcg/sysemu/svm_helper.c), so that now and then a real one is lost. The local APIC's timer is one-shot:
when its interrupt is the lost one, a guest that spins (at a lock that another of its processors holds) is never left
any more, and everything stands still for ever. Seen in a boot with two VPs on a loaded host: timer interrupt in the
APIC's IRR, guest spinning, and life again at the next interrupt of any device. So there always is a next one: channel 0
of the interval timer, which Linux has no use for once it has found the local APIC's, ticks 18 times a second.

The program must run before any file system but the initial ramdisk is there, so it is a few instructions of our own:
ioperm and the timer's mode; open "kvm", KVM_CREATE_VM, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU; then pause for ever.
"""

from __future__ import annotations

import struct

_BASE = 0x400000
_HEADERS = 64 + 56

_TICK = bytes.fromhex(
    "bf40000000 be04000000 ba01000000 b8ad000000 0f05"  # ioperm(0x40, 4, 1)
    "b034 e643"  # channel 0, low and high byte, mode 2: a pulse each time that the count is down
    "31c0 e640 e640"  # 65536 counts of 1.193182 MHz: 18.2 a second
)
_OPEN = "be02000800 31d2 b802000000 0f05"  # mov esi,O_RDWR|O_CLOEXEC; xor edx,edx; mov eax,open; syscall
_IOCTL = "31d2 b810000000 0f05"  # xor edx,edx; mov eax,ioctl; syscall
_CODE = bytes.fromhex(
    "89c7 be01ae0000"  # mov edi,eax; mov esi,KVM_CREATE_VM
    + _IOCTL
    + "89c7 be60ae0000"  # mov edi,eax; mov esi,KVM_CREATE_IRQCHIP
    + _IOCTL
    + "be41ae0000"  # mov esi,KVM_CREATE_VCPU
    + _IOCTL
    + "b822000000 0f05 ebf7"  # pause for ever
)


def holder_program() -> bytes:
    """The program as a static ELF-64 file; it opens ``kvm`` in its working folder."""
    start = bytes.fromhex(_OPEN)
    path_at = 7 + len(start) + len(_CODE)
    code = b"\x48\x8d\x3d" + struct.pack("<i", path_at - 7) + start + _CODE + b"kvm\0"  # lea rdi,[rip+path]
    code = _TICK + code
    size = _HEADERS + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 2, 62, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + code
