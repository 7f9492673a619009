# SPDX-License-Identifier: Apache-2.0
"""Where the fields of a message lie, as indices of a view in units of their size (hv_message: 16 bytes, then the
payload; layouts in :mod:`rootvisor.tlfs.intercepts`)."""

from __future__ import annotations

TYPE = 0  # u32
# every intercept
LENGTH = 20  # u8, low four bits
ACCESS = 21  # u8
STATE = 11  # u16
CS_ATTRIBUTES = 19  # u16
RIP = 5  # u64
# access to memory
MEMORY_COUNT = 60  # u8
MEMORY_INFO = 61  # u8
MEMORY_GVA = 8  # u64
MEMORY_GPA = 9  # u64
MEMORY_BYTES = 80
# access to a port
PORT = 28  # u16
PORT_INFO = 58  # u8
PORT_COUNT = 59  # u8
PORT_RAX = 8  # u64
PORT_BYTES = 72
# end of a level-triggered interrupt
EOI_VECTOR = 5  # u32
