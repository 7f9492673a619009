# SPDX-License-Identifier: Apache-2.0
"""Calls about a child's CPUID (no header in Linux; contract child-partitions 4.5)."""

from __future__ import annotations

from .layout import Layout

INTERCEPT_TYPE_CPUID = 2
#: parameters: leaf, subleaf, then value and mask of EAX, EBX, ECX, EDX
REGISTER_INTERCEPT_RESULT_INPUT = Layout(
    "hv_input_register_intercept_result", 60,
    "partition_id:Q", "vp_index:I", "intercept_type:I", "leaf:I", "subleaf:I", "subleaf_specific:B",
    "always_override:B", "_:2x", "eax:I", "eax_mask:I", "ebx:I", "ebx_mask:I", "ecx:I", "ecx_mask:I", "edx:I",
    "edx_mask:I",
)  # fmt: skip
GET_VP_CPUID_VALUES_INPUT = Layout(
    "hv_input_get_vp_cpuid_values", 24, "partition_id:Q", "vp_index:I", "flags:I", "_:8x"
)
#: An element: leaf, subleaf, XFEM and XSS to compute leaf 0xD with.
CPUID_LEAF = Layout("hv_cpuid_leaf_info", 24, "eax:I", "ecx:I", "xfem:Q", "xss:Q")
CPUID_VALUES_SIZE = 16
USE_VP_XFEM_XSS = 1 << 0
APPLY_REGISTERED_VALUES = 1 << 1
