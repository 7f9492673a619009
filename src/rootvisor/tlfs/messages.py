# SPDX-License-Identifier: Apache-2.0
"""SynIC messages and event flags (TLFS "Inter-Partition Communication")."""

from __future__ import annotations

from .layout import Layout

#: One slot of the message page: 16 slots of 256 bytes, slot n belongs to SINTn.
MESSAGE_HEADER = Layout(
    "hv_message_header", 16, "message_type:I", "payload_size:B", "flags:B", "_:2x", "sender:Q"
)
MESSAGE_SLOT_SIZE = 256
MESSAGE_PAYLOAD_MAX = 240
MESSAGE_FLAG_PENDING = 1
MESSAGE_FLAGS_OFFSET = 5

MESSAGE_NONE = 0
EVENT_FLAGS_PER_SINT = 2048
SINT_COUNT = 16
