# SPDX-License-Identifier: Apache-2.0
"""HVCALL_TRANSLATE_VIRTUAL_ADDRESS: control flags and result codes (``include/hyperv/hvgdk_mini.h``)."""

from __future__ import annotations

# --- HV_TRANSLATE_GVA_* control flags -----------------------------------------------------------------------------
VALIDATE_READ = 0x1
VALIDATE_WRITE = 0x2
VALIDATE_EXECUTE = 0x4
PRIVILEGE_EXEMPT = 0x8
SET_PAGE_TABLE_BITS = 0x10

# --- hv_translate_gva_result_code ---------------------------------------------------------------------------------
SUCCESS = 0
PAGE_NOT_PRESENT = 1
PRIVILEGE_VIOLATION = 2
INVALID_PAGE_TABLE_FLAGS = 3
GPA_UNMAPPED = 4
GPA_NO_READ_ACCESS = 5
GPA_NO_WRITE_ACCESS = 6
GPA_ILLEGAL_OVERLAY_ACCESS = 7
INTERCEPT = 8
