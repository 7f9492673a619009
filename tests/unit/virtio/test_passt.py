# SPDX-License-Identifier: Apache-2.0
"""Network devices with passt itself behind them: on its stream socket, and over vhost-user where it knows that."""

from __future__ import annotations

import shutil
import socket
import struct
import threading

import pytest

from rootvisor.daemons.passt import GUEST_ADDRESS, HOST_ADDRESS, Passt, has_vhost_user, start_passt
from rootvisor.virtio.net import F_MRG_RXBUF
from rootvisor.virtio.net_stream import PasstNet
from rootvisor.virtio.net_vhost_user import VhostUserNet
from rootvisor.virtio.registers import F_VERSION_1
from tests.unit.daemons.test_daemons import LOOPBACK, has_passt
from tests.unit.virtio.guest_side import Guest
from tests.unit.virtio.net_side import MAC, NetDriver

ARP, IPV4 = b"\x08\x06", b"\x08\x00"
SYN, ACK, PUSH = 2, 16, 8


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) & ~1]))
    total += data[-1] << 8 if len(data) & 1 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Stack:
    """As much of a guest's network as one connection takes."""

    def __init__(self, driver: NetDriver) -> None:
        self.driver = driver
        self.ours, self.theirs = socket.inet_aton(GUEST_ADDRESS), socket.inet_aton(HOST_ADDRESS)
        self.sequence, self.seen = 1000, 0
        request = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + MAC + self.ours + bytes(6) + self.theirs
        driver.send(b"\xff" * 6 + MAC + ARP + request)
        while True:
            answer = driver.receive(1)[0]
            if answer[12:14] == ARP and answer[28:32] == self.theirs:
                self.gateway = answer[22:28]
                return

    def send(self, port: int, flags: int, data: bytes = b"") -> None:
        tcp = struct.pack(">HHIIBBHHH", 40000, port, self.sequence, self.seen, 5 << 4, flags, 65535, 0, 0)
        pseudo = self.ours + self.theirs + struct.pack(">BBH", 0, 6, len(tcp) + len(data))
        tcp = tcp[:16] + checksum(pseudo + tcp + data).to_bytes(2, "big") + tcp[18:]
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp) + len(data), 1, 0, 64, 6, 0)
        ip += self.ours + self.theirs
        ip = ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:]
        self.driver.send(self.gateway + MAC + IPV4 + ip + tcp + data)
        self.sequence += len(data) + bool(flags & SYN)

    def receive(self) -> tuple[int, bytes]:
        """Flags and data of the next TCP segment."""
        while True:
            for frame in self.driver.receive(1):
                if frame[12:14] != IPV4 or frame[23] != 6:
                    continue
                length = struct.unpack_from(">H", frame, 16)[0]
                tcp = frame[34 : 14 + length]
                sequence = struct.unpack_from(">I", tcp, 4)[0]
                data = tcp[(tcp[12] >> 4) * 4 :]
                self.seen = sequence + len(data) + bool(tcp[13] & SYN) & 0xFFFFFFFF
                return tcp[13], data


@has_passt
@pytest.mark.parametrize("vhost_user", [False, True], ids=["stream", "vhost-user"])
def test_guest_talks_to_the_host_through_passt(vhost_user: bool) -> None:
    program = shutil.which("passt")
    assert program is not None
    if vhost_user and not has_vhost_user(program):
        pytest.skip("this passt does not know vhost-user")
    passt: Passt = start_passt(vhost_user=vhost_user, options=LOOPBACK)
    fd = passt.take_socket()
    guest = Guest(VhostUserNet(fd, MAC) if vhost_user else PasstNet(fd, MAC))
    driver = NetDriver(guest, F_VERSION_1 | F_MRG_RXBUF)
    driver.offer(200)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)
    received: list[bytes] = []
    answered = threading.Event()

    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(10)
            received.append(accepted.recv(100))
            accepted.sendall(b"to the guest")
            answered.wait(10)

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    stack = Stack(driver)
    port = listener.getsockname()[1]
    stack.send(port, SYN)
    assert stack.receive()[0] & (SYN | ACK) == SYN | ACK
    stack.send(port, ACK)
    guest.function.pause()
    guest.function.resume()
    stack.send(port, ACK | PUSH, b"from the guest")
    data = b""
    while not data:
        data = stack.receive()[1]
    assert data == b"to the guest" and received == [b"from the guest"]
    answered.set()
    guest.close()
    passt.close()
    server.join(10)
    listener.close()
