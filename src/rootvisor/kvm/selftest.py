# SPDX-License-Identifier: Apache-2.0
"""Decides whether this machine's KVM can run an unmodified kernel, by running ring-0 code on it.

The mere presence of /dev/kvm says little: some hosts emulate ring 0 in software (instructions such as CMPXCHG16B stop
with an internal error), some intercept XSETBV wrongly. The test guest runs in long mode with paging, uses port I/O,
a filtered MSR, CMPXCHG16B and a page-table change, and sets XCR0.

Run as ``python -I -S -m rootvisor.kvm.selftest`` in a process of its own with a deadline (a broken KVM can hang); it
prints one JSON object ``{"usable", "reason", "xsave", "capabilities"}``.
"""

from __future__ import annotations

import struct
import time

from . import abi
from .errors import KvmError
from .memory import SharedMemory
from .system import Kvm

PORT = 0x3C
_MSR = 0x40000000

#: 64-bit test code at GPA 0x4000: port out; rdmsr; cmpxchg16b; map and touch a page; xsetbv if CPUID has XSAVE; out 0.
CODE = bytes.fromhex(
    "b011" "e63c"                    # mov al,0x11; out 0x3c,al
    "b900000040" "0f32" "e63c"       # mov ecx,0x40000000; rdmsr; out (value from the filter exit)
    "be00500000"                     # mov esi,0x5000
    "31c0" "31d2" "bb01000000" "31c9"  # xor eax; xor edx; mov ebx,1; xor ecx
    "480fc70e"                       # cmpxchg16b [rsi]
    "8a06" "e63c"                    # mov al,[rsi]; out   -> 1
    "8b0425f81f0000"                 # mov eax,[0x1ff8]   (padding read through paging)
    "b801000000" "31c9" "0fa2"       # cpuid 1
    "0fbae11a" "7323"                # bt ecx,26; jnc +35
    "0f20e0" "480d00000400" "0f22e0"  # mov rax,cr4; or rax,0x40000; mov cr4,rax
    "31c9" "0f01d0" "0c03" "0f01d1"  # xor ecx; xgetbv; or al,3; xsetbv
    "31c9" "0f01d0" "e63c"           # xgetbv; out -> xcr0 low byte
    "b022" "e63c" "eb04"             # mov al,0x22; out; jmp over the no-xsave mark
    "b033" "e63c"                    # mov al,0x33; out
    "f4"                             # hlt
)  # fmt: skip


class Verdict:
    """The outcome: ``usable``, a ``reason`` in words, whether XSAVE may be shown to guests."""

    __slots__ = ("capabilities", "reason", "usable", "xsave")

    def __init__(self, usable: bool, reason: str, xsave: bool, capabilities: dict[str, int]) -> None:
        self.usable = usable
        self.reason = reason
        self.xsave = xsave
        self.capabilities = capabilities

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "usable": self.usable,
            "reason": self.reason,
            "xsave": self.xsave,
            "capabilities": self.capabilities,
        }


def check(path: str = "/dev/kvm") -> Verdict:
    """The full test. Never raises for a machine that lacks something."""
    capabilities: dict[str, int] = {}
    try:
        kvm = Kvm(path)
    except KvmError as error:
        return Verdict(False, str(error), False, capabilities)
    try:
        capabilities["max_vcpus"] = kvm.capability(abi.CAP_MAX_VCPUS)
        missing = kvm.missing_capabilities()
        if missing:
            return Verdict(False, f"this kernel's KVM lacks {', '.join(missing)}", False, capabilities)
        started = time.monotonic()
        problem, xsave = run_guest(kvm)
        capabilities["selftest_us"] = int((time.monotonic() - started) * 1e6)
    except KvmError as error:
        return Verdict(False, f"the processor test failed: {error}", False, capabilities)
    finally:
        kvm.close()
    if problem:
        return Verdict(False, f"unmodified ring-0 code does not run: {problem}", False, capabilities)
    return Verdict(True, "runs unmodified ring-0 code with every capability needed", xsave, capabilities)


def run_guest(kvm: Kvm) -> tuple[str, bool]:
    """Runs the test guest; returns (problem or '', XSAVE works)."""
    from fcntl import ioctl

    memory = SharedMemory("selftest", 0x8000)
    vm = kvm.create_vm()
    try:
        view = memory.view
        struct.pack_into("<Q", view, 0x1000, 0x2003)
        struct.pack_into("<Q", view, 0x2000, 0x3003)
        struct.pack_into("<Q", view, 0x3000, 0x83)
        view[0x4000 : 0x4000 + len(CODE)] = CODE
        vm.filter_msrs([(_MSR, 0x1000)])
        vm.create_irqchip()
        vm.set_memory(0, 0, memory.size, memory.address)
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid(kvm.supported_cpuid())
        code = (0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0)
        data = (0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0)
        segments = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data)
        segments["cs"] = code
        vcpu.set_sregs(segments, cr0=0x80050033, cr3=0x1000, cr4=0x20, efer=0x500)
        vcpu.set_regs(rip=0x4000, rsp=0x7F00, rflags=2)
        seen: list[int] = []
        for _ in range(64):
            try:
                ioctl(vcpu.fd, abi.KVM_RUN)
            except InterruptedError:
                continue
            except OSError as error:
                return f"KVM_RUN failed after {len(seen)} steps: {error.strerror}", False
            reason = vcpu.u32[2]
            if reason == abi.EXIT_IO:
                value = vcpu.u8[vcpu.u64[5]]
                seen.append(value)
                if value in (0x22, 0x33) and len(seen) > 2:
                    break
            elif reason == abi.EXIT_X86_RDMSR:
                vcpu.u8[32] = 0
                vcpu.u64[6] = 0x44
            else:
                where = abi.EXIT_NAMES.get(reason, str(reason))
                return f"stopped with exit {where} after {len(seen)} steps", False
        if seen[:3] != [0x11, 0x44, 0x01] or seen[-1] not in (0x22, 0x33):
            return f"wrong results {seen}", False
        # Emulated SVM does not intercept XSETBV: KVM then misses the change and CPUID 0xD goes stale.
        xsave = seen[-1] == 0x22 and vcpu.xcr0() == seen[3]
        return "", xsave
    finally:
        vm.close()
        memory.close()


def main() -> int:
    """Prints the verdict as JSON."""
    import json

    print(json.dumps(check().as_dict()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
