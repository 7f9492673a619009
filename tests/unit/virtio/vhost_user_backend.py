# SPDX-License-Identifier: Apache-2.0
"""A vhost-user backend that records what it is sent."""

from __future__ import annotations

import array
import os
import socket
import struct
import threading

from rootvisor.virtio import vhost_user as vu
from rootvisor.virtio.registers import F_INDIRECT_DESC, F_RING_RESET, F_VERSION_1

OFFERED = F_VERSION_1 | F_INDIRECT_DESC | F_RING_RESET | vu.F_PROTOCOL_FEATURES | 1


class Backend:
    """Answers as a well-behaved backend does, in a thread."""

    def __init__(
        self,
        *,
        features: int = OFFERED,
        protocol: int = vu.PROTOCOL_F_REPLY_ACK,
        refuse: int = 0,
        keep_log: bool = True,
    ) -> None:
        self.keep_log = keep_log
        ours, theirs = socket.socketpair()
        self.fd = theirs.detach()
        self.socket = ours
        self.features, self.protocol, self.refuse = features, protocol, refuse
        self.log: list[tuple[int, bytes, int]] = []
        self.fds: dict[tuple[int, int], int] = {}
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def requests(self) -> list[int]:
        return [request for request, _, _ in self.log]

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.socket.close()
        for fd in self.fds.values():
            os.close(fd)

    def _serve(self) -> None:
        while True:
            data, ancillary, _, _ = self.socket.recvmsg(12, socket.CMSG_LEN(64))
            if not data:
                return
            request, flags, size = struct.unpack("<III", data)
            payload = self.socket.recv(size, socket.MSG_WAITALL) if size else b""
            fds = array.array("i")
            for _, _, part in ancillary:
                fds.frombytes(part)
            for number, fd in enumerate(fds):
                index = payload[0] if request not in (vu.SET_MEM_TABLE, vu.SET_BACKEND_REQ_FD) else number
                old = self.fds.pop((request, index), None)
                if old is not None:
                    os.close(old)
                self.fds[request, index] = fd
            if self.keep_log:
                self.log.append((request, payload, len(fds)))
            answer = self.answer(request, payload)
            if answer is None and flags & 8:
                answer = struct.pack("<Q", request == self.refuse)
            if answer is not None:
                self.socket.send(struct.pack("<III", request, 1 | 4, len(answer)) + answer)

    def answer(self, request: int, payload: bytes) -> bytes | None:
        """The answer to a request that always has one."""
        if request == vu.GET_FEATURES:
            return struct.pack("<Q", self.features)
        if request == vu.GET_PROTOCOL_FEATURES:
            return struct.pack("<Q", self.protocol)
        if request == vu.GET_VRING_BASE:
            return struct.pack("<II", payload[0], 42 + payload[0])
        return None
