# SPDX-License-Identifier: Apache-2.0
"""Intercepts that a VMM installs on a child (``HVCALL_INSTALL_INTERCEPT``; the mshv driver passes it through)."""

from __future__ import annotations

from ...tlfs import hypercalls, privileges, status
from ...tlfs import intercepts as tlfs
from ..errors import HvError
from ..hypercall_table import TABLE
from .callers import child_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vp import VirtualProcessor

#: KVM takes 16 ranges in its MSR filter; the first three are the synthetic MSRs and KVM's own.
_MSR_LIMIT = 13


@TABLE.simple(hypercalls.INSTALL_INTERCEPT, tlfs.INSTALL_INTERCEPT_INPUT, 0, privileges.CREATE_PARTITIONS)
def install_intercept(
    vp: VirtualProcessor, partition_id: int, access_mask: int, intercept_type: int, parameter: int
) -> None:
    """TLFS HvCallInstallIntercept; an access mask of 0 takes the intercept back.

    INVALID_PARTITION_STATE before INITIALIZE, INVALID_PARAMETER for what is no intercept, FEATURE_UNAVAILABLE for what
    KVM cannot intercept (exceptions but #BP and #DB, INIT and SIPI, APIC registers), NO_RESOURCES beyond 13 MSRs.
    """
    from ..child_partition import INITIALIZED

    child = child_of(vp, partition_id)
    child.require(INITIALIZED)
    intercepts = child.intercepts
    of_msr = intercept_type == tlfs.TYPE_MSR_INDEX
    known = parameter & 0xFFFF_FFFF in intercepts.msrs
    if of_msr and access_mask and not known and len(intercepts.msrs) >= _MSR_LIMIT:
        raise HvError(status.NO_RESOURCES)
    intercepts.install(access_mask, intercept_type, parameter)
    if intercept_type == tlfs.TYPE_EXCEPTION:
        for target in child.vps:
            target.to_do = True
            if target.running:
                target.vcpu.kick()
    if of_msr:
        child.filter_msrs()
