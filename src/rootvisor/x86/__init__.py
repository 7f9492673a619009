# SPDX-License-Identifier: Apache-2.0
"""x86 instructions: how long one is, and which memory it touches. Decoding itself is the iced-x86 library's.

Knows nothing of processors, partitions or KVM.
"""
