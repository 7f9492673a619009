# SPDX-License-Identifier: Apache-2.0
"""Network device on a stream socket: passt, or whatever else QEMU's `-netdev stream` talks to.

On the wire each Ethernet frame follows its length, 32 bits in network byte order. Frames move between the socket and
guest RAM directly, as many as the driver gave in one call.
"""

from __future__ import annotations

# `socket` would import enum and selectors on the boot path; its core is all that is needed.
import _socket
import select

from .device import RING_FEATURES
from .net import (
    DATA_VALID,
    ETHERNET_HEADER_BYTES,
    F_GUEST_CSUM,
    F_MRG_RXBUF,
    HEADER_BYTES,
    MAX_FRAME,
    QUEUES,
    RX_QUEUE,
    TX_QUEUE,
    NetDevice,
    ReceiveBuffers,
    skip_bytes,
)
from .registers import DEVICE_NET
from .stream import advance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .queue import Chain, Queue

_LENGTH_BYTES = 4
# More than the kernel takes in one call.
_IOV_MAX = 1024
# Frames handed to the socket in one call, and their buffers beyond which it is not made longer.
_FRAMES_PER_SEND = 32
_VIEWS_PER_SEND = 256
# After so many frames the other direction has its turn.
_FRAMES_PER_ROUND = 64
# A frame that passt hands over at once must find room.
_SOCKET_BYTES = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


class PasstNet(NetDevice):
    """The device.

    Arguments:
        fd: the connected socket, owned by the device from now on.
        mac: the guest's address, six bytes.
        mtu: told to the driver, which uses it at once; large frames are what makes this backend fast. `None`: the
            driver takes 1500 until DHCP says otherwise.
        backend: name for messages.

    When the backend ends the link goes down and `on_failure` hears of it; the guest goes on.

    Raises `ValueError` for an address or MTU that cannot be.
    """

    device_type = DEVICE_NET

    def __init__(
        self, fd: int, mac: bytes, *, mtu: int | None = 65520, name: str = "net", backend: str = "passt"
    ) -> None:
        super().__init__(name, RING_FEATURES | F_MRG_RXBUF | F_GUEST_CSUM, QUEUES)
        self.describe(mac, mtu)
        self.vectors = 3
        self.backend = backend
        try:
            self._socket = _socket.socket(fileno=fd)
        except OSError as error:
            raise ValueError(f"{backend}: descriptor {fd} is not a socket") from error
        _enlarge(self._socket)
        self._alive = True
        self._header = bytes(HEADER_BYTES)
        # What the watch waits for; the end of the connection always.
        self._events = -1
        # Receiving: the next frame's length word, and what is still to come of the frame that goes on.
        self._buffers: ReceiveBuffers | None = None
        self._word = bytearray(_LENGTH_BYTES)
        self._word_bytes = 0
        self._frame_bytes = 0
        self._frame_rest: list[memoryview] = []
        self._dropping = False
        self._scratch = memoryview(bytearray(MAX_FRAME))
        # Sending: requests whose frames are partly in the socket, and the rest of these frames; then bytes of a frame
        # whose request is complete already.
        self._sending: list[tuple[Chain, int]] = []
        self._send_rest: list[memoryview] = []
        self._backlog = b""

    @property
    def backend_alive(self) -> bool:
        """Whether the backend is still there."""
        return self._alive

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        """Serve the queues."""
        # The frames come through a socket of this host: nothing can have damaged them.
        self._header = DATA_VALID if features & F_GUEST_CSUM else bytes(HEADER_BYTES)
        super().activate(queues, features)
        self._watch(self._events if self._events > 0 else 0)

    def start_queue(self, queue: Queue) -> None:
        """Receive into a queue, or send from it."""
        if queue.index == RX_QUEUE:
            self._buffers = ReceiveBuffers(queue, bool(self.driver_features & F_MRG_RXBUF))
        super().start_queue(queue)

    def stop_queue(self, queue: Queue) -> None:
        """Leave a queue; frames under way are finished without it."""
        super().stop_queue(queue)
        if queue.index == RX_QUEUE:
            self._drop_frame()
            self._buffers = None
            self._watch(self._events & ~select.POLLIN)
        else:
            self._keep_rest()
            self._sending.clear()

    def set_dma(self, enabled: bool) -> None:
        """Bus mastering went off: nothing of the guest's memory is held any more."""
        if not enabled:
            self._drop_frame()
            if self._buffers is not None:
                self._buffers.give_back()
            self._keep_rest()
            queue = self.queues[TX_QUEUE]
            if queue is not None:
                queue.push_together(self._sending)
                queue.notify()
            self._sending.clear()
        super().set_dma(enabled)

    def handle_queue(self, queue: Queue) -> None:
        """Room for frames, or frames."""
        if queue.index == RX_QUEUE:
            queue.quiet()
            if self._alive:
                self._watch(self._events | select.POLLIN)
        else:
            self._transmit(queue)

    def close(self) -> None:
        """Stop and hang up."""
        super().close()
        self._alive = False
        self._socket.close()

    def _watch(self, events: int) -> None:
        if self._alive and events != self._events:
            self._events = events
            self.worker.watch(self._socket.fileno(), events, self._ready)

    def _ready(self, events: int) -> None:
        if events & select.POLLOUT:
            self._flush()
        if events & select.POLLIN:
            self._receive()
        elif events & (select.POLLHUP | select.POLLERR):
            self._ended(f"{self.backend} has ended")

    def _ended(self, reason: str) -> None:
        """Nobody is there any more: the cable is out, what the driver sends is dropped."""
        if not self._alive:
            return
        self._alive = False
        self.worker.unwatch(self._socket.fileno())
        self._drop_frame()
        self._send_rest, self._backlog = [], b""
        queue = self.queues[TX_QUEUE]
        if queue is not None:
            self._sent(queue)
            self._transmit(queue)
        self.set_link(False)
        if self.on_failure is not None:
            self.on_failure(f"{self.name}: {reason}")

    # Receiving.

    def _receive(self) -> None:
        queue, buffers = self.queues[RX_QUEUE], self._buffers
        if queue is None or buffers is None or not queue.dma:
            # What comes before there is a driver waits in the socket.
            self._watch(self._events & ~select.POLLIN)
            return
        for _ in range(_FRAMES_PER_ROUND):
            if not self._frame_rest and not self._begin_frame(queue, buffers):
                break
            if not self._go_on(buffers):
                break
        queue.notify()

    def _begin_frame(self, queue: Queue, buffers: ReceiveBuffers) -> bool:
        """Find out the next frame's length and a place for it; false when one or the other must be awaited."""
        if self._word_bytes < _LENGTH_BYTES:
            count = self._receive_into([memoryview(self._word)[self._word_bytes :]])
            self._word_bytes += count
            if self._word_bytes < _LENGTH_BYTES:
                return False
        length = int.from_bytes(self._word, "big")
        if not length or length > MAX_FRAME:
            self._ended(f"{self.backend} sends a frame of {length} bytes")
            return False
        needed = length + HEADER_BYTES
        while not buffers.gather(needed):
            if not queue.listen():
                self._watch(self._events & ~select.POLLIN)
                return False
        self._dropping = buffers.room < needed
        if self._dropping:
            self._frame_rest = [self._scratch[:length]]
        else:
            rest: list[memoryview] = []
            for view in skip_bytes(buffers.views(), HEADER_BYTES):
                if len(view) >= length:
                    rest.append(view[:length])
                    break
                rest.append(view)
                length -= len(view)
            self._frame_rest = rest
        self._frame_bytes = needed
        self._word_bytes = 0
        return True

    def _go_on(self, buffers: ReceiveBuffers) -> bool:
        """Fill the frame, and read the next length with its end; false when the socket is empty."""
        rest = self._frame_rest
        together = len(rest) < _IOV_MAX
        count = self._receive_into([*rest, memoryview(self._word)] if together else rest[:_IOV_MAX])
        if not count:
            return False
        wanted = sum(map(len, rest))
        if count < wanted:
            self._frame_rest = advance(rest, count)
            return True
        self._frame_rest = []
        self._word_bytes = count - wanted
        if not self._dropping:
            buffers.deliver(self._frame_bytes, self._header)
        return True

    def _receive_into(self, views: Sequence[memoryview]) -> int:
        """Bytes received, 0 when there are none now or never again."""
        try:
            count = self._socket.recvmsg_into(views, 0, _socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            return 0
        except OSError as error:
            self._ended(f"{self.backend} is gone: {error.strerror}")
            return 0
        if not count:
            self._ended(f"{self.backend} has ended")
        return count

    def _drop_frame(self) -> None:
        """The frame that goes on is nobody's: its rest is read to nowhere."""
        if self._frame_rest and not self._dropping:
            self._frame_rest = [self._scratch[: sum(map(len, self._frame_rest))]]
        self._dropping = True

    # Sending.

    def _transmit(self, queue: Queue) -> None:
        while not self._send_rest and not self._backlog:
            queue.quiet()
            while self._pop_frames(queue):
                if self._send_rest and not self._send():
                    queue.notify()
                    return
                self._sent(queue)
            more = queue.listen()
            queue.notify()
            if not more:
                return

    def _pop_frames(self, queue: Queue) -> bool:
        """Requests for one call; false when there is none."""
        rest, sending = self._send_rest, self._sending
        while len(sending) < _FRAMES_PER_SEND and len(rest) < _VIEWS_PER_SEND:
            chain = queue.pop()
            if chain is None:
                break
            sending.append((chain, 0))
            length = chain.readable_bytes() - HEADER_BYTES
            if not ETHERNET_HEADER_BYTES <= length <= MAX_FRAME or not self._alive:
                continue
            queue.counters.bytes += length
            rest.append(memoryview(length.to_bytes(_LENGTH_BYTES, "big")))
            rest.extend(skip_bytes(chain.readable, HEADER_BYTES))
        return bool(sending)

    def _send(self) -> bool:
        """Send the rest; false when the socket is full."""
        while self._send_rest:
            try:
                count = self._socket.sendmsg(
                    self._send_rest[:_IOV_MAX], (), _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL
                )
            except BlockingIOError:
                self._watch(self._events | select.POLLOUT)
                return False
            except OSError as error:
                self._send_rest = []
                self._ended(f"{self.backend} is gone: {error.strerror}")
                return True
            self._send_rest = advance(self._send_rest, count)
        return True

    def _sent(self, queue: Queue) -> None:
        if self._sending:
            queue.push_together(self._sending)
            self._sending.clear()

    def _flush(self) -> None:
        """The socket takes more."""
        if self._backlog:
            self._send_rest = [memoryview(self._backlog), *self._send_rest]
            self._backlog = b""
        if not self._send():
            if not self._sending:
                self._keep_rest()
            return
        self._watch(self._events & ~select.POLLOUT)
        queue = self.queues[TX_QUEUE]
        if queue is not None:
            self._sent(queue)
            self._transmit(queue)

    def _keep_rest(self) -> None:
        """The frames under way must not be read from the guest's memory any more."""
        if self._send_rest:
            self._backlog += b"".join(self._send_rest)
            self._send_rest = []
            self._watch(self._events | select.POLLOUT)


def _enlarge(stream: _socket.socket) -> None:
    for forced, plain in ((_SO_SNDBUFFORCE, _socket.SO_SNDBUF), (_SO_RCVBUFFORCE, _socket.SO_RCVBUF)):
        try:
            stream.setsockopt(_socket.SOL_SOCKET, forced, _SOCKET_BYTES)
        except OSError:
            stream.setsockopt(_socket.SOL_SOCKET, plain, _SOCKET_BYTES)
