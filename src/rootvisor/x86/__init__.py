# SPDX-License-Identifier: Apache-2.0
"""x86 instructions: how long one is, which memory it touches (:mod:`.decoder`), and its execution where that memory is
a device's (:mod:`.emulator`). Decoding itself is the iced-x86 library's.

Knows nothing of partitions or KVM.
"""
