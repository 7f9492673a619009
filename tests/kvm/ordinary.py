# SPDX-License-Identifier: Apache-2.0
"""An ordinary partition (``rootvisor run --as guest``) with the bare-metal agent in it, driven as :mod:`.guest`.

The hypervisor's pages are where the guest puts them: the hypercall page at CALL_PAGE, and the pages of VP n from
``pages(n)`` on. What the guest sees there is not in ``ram``: :meth:`Ordinary.read`.
"""

from __future__ import annotations

import struct

from rootvisor.bus.address_space import GuestMemory
from rootvisor.hypervisor.guest_partition import GuestPartition
from rootvisor.hypervisor.synic import Synic
from rootvisor.tlfs import messages, msrs
from tests.kvm import guest as g
from tests.kvm.guest import Guest, control

CALL_PAGE, TSC_PAGE = 0xE00000, 0xE01000
ADDRESS_BITS = 40


def pages(vp: int) -> tuple[int, int, int]:
    """SIMP, SIEFP and assist page of a VP."""
    base = 0xE10000 + vp * 0x4000
    return base, base + 0x1000, base + 0x2000


class Ordinary(Guest):
    """:class:`Guest` without the root's privileges."""

    partition: GuestPartition  # type: ignore[assignment]

    def _create(self, memory: GuestMemory, vps: int) -> GuestPartition:  # type: ignore[override]
        return self.hypervisor.create_guest(memory, vps, ADDRESS_BITS)

    def enable_hypercalls(self) -> None:
        self.wrmsr(msrs.GUEST_OS_ID, 0x8100_0007_0003_0000)
        self.wrmsr(msrs.HYPERCALL, CALL_PAGE | 1)

    def announce(self, vp: int) -> None:
        """A guest finds its VPs as they are."""

    def enable_synic(self, vp: int = 0) -> Synic:
        """Message and event pages on, all SINTs masked still."""
        simp, siefp, _assist = pages(vp)
        self.wrmsr(msrs.SIMP, simp | 1, vp)
        self.wrmsr(msrs.SIEFP, siefp | 1, vp)
        self.wrmsr(msrs.SCONTROL, 1, vp)
        return self.partition.vps[vp].synic

    def leave_doorbell(self, vp: int) -> None:
        """The VP runs on from its doorbell, with nothing to do, and meets what waits for it: an INIT."""
        base = g.MAILBOXES + vp * g.MAILBOX_SIZE
        self.ram[base : base + 4] = bytes(4)
        self._bell.go[vp].release()

    def read(self, gpa: int, vp: int = 0) -> int:
        """Eight bytes as the guest sees them."""
        op = self.one(g.LOAD, vp, rcx=gpa)
        assert op.fault == 0, f"load from {gpa:#x} faults with {op.fault:#x}"
        return op.rax

    def write(self, gpa: int, value: int, vp: int = 0) -> int:
        """Stores eight bytes; 0 or the exception."""
        return self.one(g.STORE, vp, rcx=gpa, rax=value).fault

    def slot(self, sint: int, vp: int = 0) -> tuple[int, int, int, int, bytes]:
        """Type, size, flags, sender, payload of a SINT's message slot, as the guest reads it."""
        at = pages(vp)[0] + sint * messages.MESSAGE_SLOT_SIZE
        words = [g.Op(g.LOAD, rcx=at + n * 8) for n in range(6)]
        self.run(words, vp)
        kind, size, flags, sender = struct.unpack_from(
            "<IBBxxQ", struct.pack("<2Q", words[0].rax, words[1].rax)
        )
        return kind, size, flags, sender, struct.pack("<4Q", *(word.rax for word in words[2:]))

    def free_slot(self, sint: int, vp: int = 0) -> None:
        """The guest's part of taking a message: type := 0."""
        at = pages(vp)[0] + sint * messages.MESSAGE_SLOT_SIZE
        self.write(at, self.read(at, vp) & ~0xFFFFFFFF, vp)


class WithoutKvmsSynic(Ordinary):
    """On a KVM without CONFIG_KVM_HYPERV."""

    def _create(self, memory: GuestMemory, vps: int) -> GuestPartition:  # type: ignore[override]
        partition = super()._create(memory, vps)
        partition.kvm_synic = False
        return partition


__all__ = ["CALL_PAGE", "TSC_PAGE", "Ordinary", "WithoutKvmsSynic", "control", "pages"]
