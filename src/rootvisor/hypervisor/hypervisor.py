# SPDX-License-Identifier: Apache-2.0
"""The hypervisor: partitions by id, logical processors, system properties."""

from __future__ import annotations

from _thread import RLock

from ..kvm.system import Kvm
from ..tlfs import hypercalls, status
from . import calls
from .errors import HvError
from .partition import Partition
from .root_partition import RootPartition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .address_space import GuestMemory

#: The root partition's id. Not 0 (invalid) and not all ones ("self").
ROOT_PARTITION_ID = 1
MAX_VPS = 64
MAX_LPS = 64


class Version:
    """CPUID 0x40000002. Builds 27744 .. 27751 are the ones that the mshv driver knows."""

    __slots__ = ("build", "major", "minor", "service_pack")

    def __init__(self) -> None:
        self.build = 27751
        self.major = 10
        self.minor = 0
        self.service_pack = 0


class Hypervisor:
    """``scheduler`` is hypercalls.SCHEDULER_HYPERVISOR or SCHEDULER_ROOT."""

    __slots__ = (
        "kvm",
        "lock",
        "logical_processors",
        "max_lps",
        "max_vps",
        "partitions",
        "scheduler",
        "sleep_state",
        "version",
    )

    def __init__(self, kvm: Kvm, scheduler: int = hypercalls.SCHEDULER_HYPERVISOR) -> None:
        calls.load()
        self.kvm = kvm
        #: held while a hypercall does its work, so that the calls of two VPs do not mix; recursive, because a child VP
        #: holds it around its whole call
        self.lock = RLock()
        self.scheduler = scheduler
        self.version = Version()
        self.max_vps = MAX_VPS
        self.max_lps = MAX_LPS
        self.partitions: dict[int, Partition] = {}
        #: LP index -> APIC id; LP 0 exists from the start
        self.logical_processors: dict[int, int] = {0: 0}
        #: (sleep state, PM1a SLP_TYP, PM1b SLP_TYP) that the root announced
        self.sleep_state: tuple[int, int, int] | None = None

    def create_root(self, memory: GuestMemory, owned: tuple[int, int]) -> RootPartition:
        """The root partition on ``memory``; ``owned`` is (GPA, pages) of the block that belongs to the hypervisor."""
        partition = RootPartition(self, ROOT_PARTITION_ID, memory, owned)
        self.partitions[partition.id] = partition
        return partition

    def partition(self, caller: Partition, partition_id: int) -> Partition:
        """The partition that a hypercall names: itself, or one of its children. HV_STATUS_INVALID_PARTITION_ID."""
        if partition_id in (hypercalls.SELF, caller.id):
            return caller
        raise HvError(status.INVALID_PARTITION_ID)

    def close(self) -> None:
        """Closes every partition and /dev/kvm."""
        for partition in self.partitions.values():
            partition.close()
        self.partitions.clear()
        self.kvm.close()
