# SPDX-License-Identifier: Apache-2.0
"""Logical processors: the root announces each before it creates VPs on it (kernel ``drivers/hv/hv_proc.c``)."""

from __future__ import annotations

import os
from time import clock_gettime_ns

from ...kvm.abi import MSR_TSC
from ...tlfs import hypercalls, privileges, status
from ..errors import HvError
from ..hypercall_table import TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor


@TABLE.simple(
    hypercalls.ADD_LOGICAL_PROCESSOR,
    hypercalls.ADD_LOGICAL_PROCESSOR_INPUT,
    hypercalls.ADD_LOGICAL_PROCESSOR_OUTPUT.size,
    privileges.CPU_MANAGEMENT,
)
def add_logical_processor(
    vp: VirtualProcessor, lp_index: int, apic_id: int, _proximity: int, _proximity_flags: int
) -> bytes:
    """LP ``lp_index`` has ``apic_id``. INVALID_LP_INDEX: out of range or known; INVALID_PARAMETER: no such APIC.

    Proximity is not looked at: callers leave old bytes there.
    """
    hypervisor = vp.partition.hypervisor
    known = hypervisor.logical_processors
    if lp_index >= hypervisor.max_lps or lp_index in known:
        raise HvError(status.INVALID_LP_INDEX)
    if vp.partition.vp_by_apic_id(apic_id) is None or apic_id in known.values():
        raise HvError(status.INVALID_PARAMETER)
    known[lp_index] = apic_id
    return hypercalls.ADD_LOGICAL_PROCESSOR_OUTPUT.pack(0, bytes(48))


@TABLE.simple(
    hypercalls.GET_LOGICAL_PROCESSOR_RUN_TIME,
    hypercalls.GET_LOGICAL_PROCESSOR_RUN_TIME_INPUT,
    hypercalls.GET_LOGICAL_PROCESSOR_RUN_TIME_OUTPUT.size,
    privileges.CPU_MANAGEMENT,
)
def get_logical_processor_run_time(vp: VirtualProcessor, lp_index: int) -> bytes:
    """Times in 100 ns: since creation, of the LP's thread, of the hypervisor (its user-mode time).

    A kernel asks for LP 1 to learn whether it was started by kexec: INVALID_LP_INDEX is the answer it hopes for.
    """
    partition = vp.partition
    apic_id = partition.hypervisor.logical_processors.get(lp_index)
    owner = partition.vp_by_apic_id(apic_id) if apic_id is not None else None
    if owner is None:
        raise HvError(status.INVALID_LP_INDEX)
    now = partition.reference_time.at(vp.vcpu.get_msr(MSR_TSC))
    run_time = clock_gettime_ns(owner.cpu_clock) // 100 if owner.cpu_clock else 0
    hypervisor_time = int(os.times().user * 10_000_000)
    return hypercalls.GET_LOGICAL_PROCESSOR_RUN_TIME_OUTPUT.pack(now, run_time, 0, hypervisor_time)
