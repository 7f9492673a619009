# SPDX-License-Identifier: Apache-2.0
"""Parts of the interface that a guest can be started without: name -> (privileges, features, recommendations)."""

from __future__ import annotations

from ..tlfs import cpuid, privileges

HIDEABLE: dict[str, tuple[int, int, int]] = {
    "apic": (0, 0, cpuid.RECOMMEND_APIC_MSRS),
    "direct-timers": (0, privileges.FEATURE_DIRECT_TIMERS, 0),
    "flush": (0, 0, cpuid.RECOMMEND_REMOTE_FLUSH),
    "frequencies": (privileges.ACCESS_FREQUENCY_REGS, privileges.FEATURE_FREQUENCY_MSRS, 0),
    "ipi": (0, 0, cpuid.RECOMMEND_CLUSTER_IPI),
    "timers": (privileges.ACCESS_SYNTHETIC_TIMER_REGS, privileges.FEATURE_DIRECT_TIMERS, 0),
    "tsc-page": (privileges.ACCESS_PARTITION_REFERENCE_TSC, 0, 0),
    "vp-sets": (0, 0, cpuid.RECOMMEND_EX_PROCESSOR_MASKS),
}
