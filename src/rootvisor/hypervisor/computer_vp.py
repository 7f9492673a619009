# SPDX-License-Identifier: Apache-2.0
"""A VP of a partition that has a computer of its own (the root, or a guest): a thread in KVM_RUN, and each exit."""

from __future__ import annotations

from errno import EFAULT
from fcntl import ioctl
from struct import Struct

from ..bus.address_space import AddressError, write_access
from ..kvm import abi
from ..kvm.errors import KvmError, ioctl_error
from ..tlfs import status
from . import hypercall_abi
from .errors import GeneralProtection, HvError, HypervisorError, Restart, UndefinedOpcode
from .hypercall_table import SIMPLE, TABLE
from .vp import VirtualProcessor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .computer_partition import ComputerPartition

    #: handler; unpack_from and size of the input (None, 0 where there is none); pack_into and size of the output
    #: (likewise); whether Hypervisor.lock is held
    SimpleCall = tuple[
        Callable[..., Any], Callable[..., Any] | None, int, Callable[..., Any] | None, int, bool
    ]

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


class ComputerVp(VirtualProcessor):
    """VP ``index`` of the partition: its ports and MMIO are the computer's devices."""

    __slots__ = ()
    partition: ComputerPartition

    def _run(self) -> None:
        vcpu = self.vcpu
        u8, u16, u32, u64 = vcpu.u8, vcpu.u16, vcpu.u32, vcpu.u64
        fd = vcpu.fd
        run = abi.KVM_RUN
        run_vcpu = self._entry()
        exits = self.exits
        ports = self.partition.ports
        writes = ports.writes
        mmio = self.partition.mmio
        execute = hypercall_abi.execute
        # Simple calls that were made before, with their operands in memory, are executed here: what `execute` does, in
        # its order of checks, but those that do not change, and less the frames.
        simple_calls: dict[int, SimpleCall] = {}
        counts = self.hypercalls
        lock = self.partition.hypervisor.lock
        pages = self.operand_pages
        find_page = self.operand_page
        waking = self.waking
        rax, rcx, rdx, r8 = hypercall_abi.RAX, hypercall_abi.RCX, hypercall_abi.RDX, hypercall_abi.R8
        rip, dirty = hypercall_abi.RIP, hypercall_abi.DIRTY
        efer, lma = hypercall_abi.EFER, hypercall_abi.EFER_LMA
        cs_l, ss_dpl = hypercall_abi.CS_L, hypercall_abi.SS_DPL
        hypercall_access = write_access(hypercall_abi.PORT, 4)
        coalesced = self.partition.vm.coalesced
        # The ring's two heads as one word; without a ring padding, which never changes. The ring is empty as long as
        # the word is what it was after the last time it was emptied. Only ports and device memory come after what is
        # in it: no hypercall and no MSR depends on a device's registers.
        ring = (coalesced.offset or abi.RUN_UNION + 248) // 8
        drained = 0
        readers = self._readers()
        while True:
            try:
                run_vcpu(fd, run)  # two arguments: a third costs 18 us (contract/kvm-mapping 1.1)
            except InterruptedError:
                if self.stopping:
                    return
                u8[1] = 0
                continue
            except BlockingIOError:
                continue  # an application processor woke up for INIT or SIPI
            except OSError as error:
                if self.stopping:
                    return
                if self._explained(error):
                    continue
                raise self._run_failed(error) from error
            # Below, the frequent exits do few and always the same operations. What differs between exits costs more
            # than it looks, above all under emulation, where every world switch empties the emulator's caches.
            reason = u32[2]
            exits[reason] += 1
            # EXIT_IO: direction u8, size u8, port u16, count u32, data offset u64 (page aligned)
            if reason == 2:
                access = u64[4]
                if access == hypercall_access:
                    code = u64[rcx]  # the control word of a call with nothing else in it
                    if code in simple_calls and u64[efer] & lma and u8[cs_l] and not u8[ss_dpl]:
                        handler, unpack, size, store, output, alone = simple_calls[code]
                        counts[code] += 1
                        try:
                            if unpack is not None:
                                gpa = u64[rdx]
                                at = gpa & 0xFFF
                                if at & 7 or at + size > 4096:
                                    raise HvError(status.INVALID_ALIGNMENT)
                                fields = unpack(pages.get(gpa >> 12) or find_page(gpa >> 12, False), at)
                            if store is not None:
                                gpa = u64[r8]
                                at = gpa & 0xFFF
                                if at & 7 or at + output > 4096:
                                    raise HvError(status.INVALID_ALIGNMENT)
                                page = pages.get(gpa >> 12) or find_page(gpa >> 12, True)
                            if alone:
                                with lock:
                                    answer = handler(self) if unpack is None else handler(self, *fields)
                            else:
                                answer = handler(self) if unpack is None else handler(self, *fields)
                            if store is not None and answer is not None:
                                store(page, at, answer)
                            u64[rax] = 0
                        except HvError as error:
                            u64[rax] = error.status
                        except Restart:
                            u64[rip] = u64[rip] - hypercall_abi.OUT_OFFSET & _MASK64
                        except AddressError:  # an operand names memory that is not there
                            u64[rax] = status.INVALID_PARAMETER
                        u64[dirty] = 1  # SYNC_REGS
                    else:
                        try:
                            execute(self)
                            self._remember(code, simple_calls)
                        except UndefinedOpcode:
                            self._inject_undefined_opcode()
                    if waking:
                        self.wake()
                    continue
                if u64[ring] != drained:  # writes that did not exit come first
                    drained = coalesced.drain(ports.write, mmio.write)
                found = writes.get(access)
                if found is not None:
                    offset, size, write = found
                    at = u64[5]
                    write(offset, size, u8[at] if size == 1 else u16[at >> 1] if size == 2 else u32[at >> 2])
                else:
                    self._port_io(u16[17], u8[33])
            elif reason == 29:  # EXIT_X86_RDMSR: error u8 (cleared by KVM), reason u32, index u32, data u64
                read = readers.get(u32[11])
                if read is not None:
                    try:
                        u64[6] = read() & _MASK64
                    except (GeneralProtection, KvmError):
                        u8[32] = 1
                else:
                    self._read_msr(u32[11])
            elif reason == 6:  # EXIT_MMIO: gpa u64, data[8], len u32, is_write u8
                if u64[ring] != drained:
                    drained = coalesced.drain(ports.write, mmio.write)
                size = u32[12]
                if u8[52]:
                    mmio.write(u64[4], size, int.from_bytes(u8[40 : 40 + size], "little"))
                else:
                    u8[40:48] = mmio.read(u64[4], size).to_bytes(8, "little")
            elif reason == 30:
                self._write_msr(u32[11], u64[6])
            elif reason == abi.EXIT_SHUTDOWN:
                self.partition.end("triple-fault", self._where())
            elif reason != abi.EXIT_INTR:
                self._unexpected_exit(reason)
            # Who ended the partition in here has kicked this VP as well: KVM_RUN gives EINTR before the guest runs.

    def _entry(self) -> Callable[[int, int], Any]:
        """What the run loop calls with the processor's descriptor and KVM_RUN."""
        return ioctl

    def _remember(self, code: int, simple_calls: dict[int, SimpleCall]) -> None:
        """The call that has just been made is made the short way from now on, if it is one for that. A trace sees every
        call, so none is."""
        call = TABLE.calls.get(code)
        if (
            call is not None
            and call.kind == SIMPLE
            and not call.privilege & ~self.partition.privileges
            and self.trace is None
        ):
            store = Struct(f"{call.output}s").pack_into if call.output else None
            self.hypercalls.setdefault(
                code, 0
            )  # the call may have been another: in 32-bit code RCX is not its code
            simple_calls[code] = (call.handler, call.unpack, call.size, store, call.output, call.alone)

    def _port_io(self, port: int, size: int) -> None:
        """A port access that the loop does not know: reads, string I/O, ports without a device."""
        vcpu = self.vcpu
        u8 = vcpu.u8
        ports = self.partition.ports
        if port == hypercall_abi.PORT and u8[32]:  # an OUT of another size than the hypercall page's
            try:
                hypercall_abi.execute(self)
            except UndefinedOpcode:
                self._inject_undefined_opcode()
            self.wake()
        elif vcpu.u32[9] != 1:
            self._string_io(port, size)
        else:
            at = vcpu.u64[5]
            if u8[32]:
                ports.write(port, size, int.from_bytes(u8[at : at + size], "little"))
            else:
                u8[at : at + size] = ports.read(port, size).to_bytes(size, "little")

    def _string_io(self, port: int, size: int) -> None:
        """INS/OUTS: KVM hands over several items at once."""
        u8 = self.vcpu.u8
        at = self.vcpu.u64[5]
        ports = self.partition.ports
        for _ in range(self.vcpu.u32[9]):
            if u8[32]:
                ports.write(port, size, int.from_bytes(u8[at : at + size], "little"))
            else:
                u8[at : at + size] = ports.read(port, size).to_bytes(size, "little")
            at += size

    def _readers(self) -> dict[int, Callable[[], int]]:
        """The MSRs that can be read, for the run loop; none while tracing, when :meth:`_read_msr` reports each."""
        if self.trace is not None:
            return {}
        return {number: accessors[0] for number, accessors in self._msrs.items() if accessors[0] is not None}

    def _explained(self, error: OSError) -> bool:
        """KVM_RUN failed; whether the VP may go on. With --watch-deposits: it met a deposited page, which is told."""
        hypervisor = self.partition.hypervisor
        watch = hypervisor.deposited.watch
        if watch is None or error.errno != EFAULT:
            return False
        with hypervisor.lock:
            return watch.caught(self)

    def _run_failed(self, error: OSError) -> Exception:
        if error.errno == EFAULT:  # the memory behind a slot is gone or full
            return HypervisorError(
                f"VP {self.index} touched memory that the host cannot provide ({self._where()}); "
                "free memory on this machine or lower --memory"
            )
        return ioctl_error(abi.KVM_RUN, error)

    def _unexpected_exit(self, reason: int) -> None:
        u32 = self.vcpu.u32
        name = abi.EXIT_NAMES.get(reason, str(reason))
        if reason == abi.EXIT_INTERNAL_ERROR:
            name += f" (suberror {u32[8]})"
        elif reason == abi.EXIT_FAIL_ENTRY:
            name += f" (hardware reason {self.vcpu.u64[4]:#x})"
        raise HypervisorError(
            f"KVM stopped VP {self.index} with exit {name}, {self._where()}; see `rootvisor doctor`"
        )
