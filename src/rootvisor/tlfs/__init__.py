# SPDX-License-Identifier: Apache-2.0
"""The Top Level Functional Specification as numbers and layouts, nothing else.

Spelling follows ``include/hyperv/*.h`` of the Linux kernel; a search for the part after ``HV_`` finds both ends.
"""
