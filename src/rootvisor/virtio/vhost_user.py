# SPDX-License-Identifier: Apache-2.0
"""The vhost-user protocol, front end: devices whose rings another process serves.

Protocol: QEMU docs/interop/vhost-user.rst. Guest physical addresses double as the "user addresses" of the protocol.
"""

from __future__ import annotations

# `socket` would import enum and selectors on the boot path; its core is all that is needed.
import _socket
import select
import struct

from .vhost import RING_FEATURES, VhostDevice, VhostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..pci.platform import MemoryRegion
    from .queue import Queue, QueueAddresses

# Requests.
GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
SET_BACKEND_REQ_FD = 21
GET_CONFIG = 24

# Requests of the backend.
BACKEND_CONFIG_CHANGE_MSG = 2

F_PROTOCOL_FEATURES = 1 << 30
PROTOCOL_F_MQ = 1 << 0
PROTOCOL_F_REPLY_ACK = 1 << 3
PROTOCOL_F_BACKEND_REQ = 1 << 5
PROTOCOL_F_CONFIG = 1 << 9

_NAMES = {
    GET_FEATURES: "GET_FEATURES",
    SET_FEATURES: "SET_FEATURES",
    SET_OWNER: "SET_OWNER",
    SET_MEM_TABLE: "SET_MEM_TABLE",
    SET_VRING_NUM: "SET_VRING_NUM",
    SET_VRING_ADDR: "SET_VRING_ADDR",
    SET_VRING_BASE: "SET_VRING_BASE",
    GET_VRING_BASE: "GET_VRING_BASE",
    SET_VRING_KICK: "SET_VRING_KICK",
    SET_VRING_CALL: "SET_VRING_CALL",
    SET_VRING_ERR: "SET_VRING_ERR",
    GET_PROTOCOL_FEATURES: "GET_PROTOCOL_FEATURES",
    SET_PROTOCOL_FEATURES: "SET_PROTOCOL_FEATURES",
    GET_QUEUE_NUM: "GET_QUEUE_NUM",
    SET_VRING_ENABLE: "SET_VRING_ENABLE",
    SET_BACKEND_REQ_FD: "SET_BACKEND_REQ_FD",
    GET_CONFIG: "GET_CONFIG",
}

_VERSION = 1
_FLAG_REPLY = 1 << 2
_FLAG_NEED_REPLY = 1 << 3
_NO_FD = 1 << 8
_MAX_REGIONS = 8
_MAX_PAYLOAD = 4096

_HEADER = struct.Struct("<III")  # request, flags, payload size
_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")  # queue, value
_ADDRESSES = struct.Struct("<IIQQQQ")  # queue, flags, descriptors, used, available, log
_REGION = struct.Struct("<QQQQ")  # guest address, size, user address, offset in the file
_CONFIG = struct.Struct("<III")  # offset, size, flags
_FD = struct.Struct("<i")


class VhostUserError(VhostError):
    """The backend cannot be used or is gone; one line that says in what it failed."""


class VhostUserConnection:
    """A connected socket and the messages on it. Owns the descriptor.

    Every method raises `VhostUserError` when the backend is gone, refuses, answers nonsense, or takes longer than
    `timeout` seconds.
    """

    def __init__(self, fd: int, *, backend: str = "vhost-user backend", timeout: float = 10.0) -> None:
        self.backend = backend
        self._reply_ack = False
        try:
            self._socket = _socket.socket(fileno=fd)
        except OSError as error:
            raise VhostUserError(f"{backend}: descriptor {fd} is not a socket") from error
        self._socket.settimeout(timeout)

    @property
    def fd(self) -> int:
        """The socket, to be polled for its end."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; the backend ends its work."""
        self._socket.close()

    def negotiate(self, protocol_features: int) -> tuple[int, int]:
        """Open the conversation; returns the backend's device features and the protocol features agreed upon."""
        features = self.query(GET_FEATURES)
        protocol = 0
        if features & F_PROTOCOL_FEATURES:
            protocol = self.query(GET_PROTOCOL_FEATURES) & (protocol_features | PROTOCOL_F_REPLY_ACK)
            self.set_u64(SET_PROTOCOL_FEATURES, protocol)
            self._reply_ack = bool(protocol & PROTOCOL_F_REPLY_ACK)
        self.command(SET_OWNER)
        return features, protocol

    def query(self, request: int) -> int:
        """A request answered by a 64-bit number."""
        payload = self._call(request, b"", ())
        if len(payload) != _U64.size:
            raise self._error(request, f"answered with {len(payload)} bytes")
        value: int = _U64.unpack(payload)[0]
        return value

    def command(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without an answer; with REPLY_ACK the backend confirms it."""
        if not self._reply_ack:
            self._send(request, 0, payload, fds)
            return
        answer = self._call(request, payload, fds, _FLAG_NEED_REPLY)
        if len(answer) != _U64.size or _U64.unpack(answer)[0]:
            raise self._error(request, "was refused")

    def set_u64(self, request: int, value: int) -> None:
        """A request that carries a 64-bit number."""
        self.command(request, _U64.pack(value))

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Share guest RAM with the backend."""
        if not 1 <= len(regions) <= _MAX_REGIONS:
            raise self._error(SET_MEM_TABLE, f"takes 1 to {_MAX_REGIONS} regions of RAM, not {len(regions)}")
        table = struct.pack("<I4x", len(regions))
        for region in regions:
            table += _REGION.pack(region.gpa, region.size, region.gpa, region.fd_offset)
        self.command(SET_MEM_TABLE, table, [region.fd for region in regions])

    def set_state(self, request: int, index: int, value: int) -> None:
        """SET_VRING_NUM, SET_VRING_BASE or SET_VRING_ENABLE."""
        self.command(request, _STATE.pack(index, value))

    def set_addresses(self, index: int, addresses: QueueAddresses) -> None:
        """SET_VRING_ADDR: where the driver put the ring."""
        payload = _ADDRESSES.pack(index, 0, addresses.desc, addresses.device, addresses.driver, 0)
        self.command(SET_VRING_ADDR, payload)

    def set_eventfd(self, request: int, index: int, fd: int) -> None:
        """SET_VRING_KICK, _CALL or _ERR; -1 for no descriptor."""
        if fd < 0:
            self.set_u64(request, index | _NO_FD)
        else:
            self.command(request, _U64.pack(index), [fd])

    def get_base(self, index: int) -> int:
        """Stop a ring; returns where it can go on."""
        payload = self._call(GET_VRING_BASE, _STATE.pack(index, 0), ())
        if len(payload) != _STATE.size:
            raise self._error(GET_VRING_BASE, f"answered with {len(payload)} bytes")
        base: int = _STATE.unpack(payload)[1]
        return base

    def get_config(self, size: int) -> bytes:
        """The device configuration structure (protocol feature CONFIG)."""
        payload = self._call(GET_CONFIG, _CONFIG.pack(0, size, 0) + bytes(size), ())
        if len(payload) != _CONFIG.size + size:
            raise self._error(GET_CONFIG, "was refused")
        return payload[_CONFIG.size :]

    def ended(self) -> bool:
        """Whether the backend has closed its side."""
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _call(self, request: int, payload: bytes, fds: Sequence[int], flags: int = 0) -> bytes:
        self._send(request, flags, payload, fds)
        answered, answer_flags, size = _HEADER.unpack(self._receive(request, _HEADER.size))
        if answered != request or not answer_flags & _FLAG_REPLY or size > _MAX_PAYLOAD:
            raise self._error(request, f"got an answer to request {answered} of {size} bytes")
        return self._receive(request, size)

    def _send(self, request: int, flags: int, payload: bytes, fds: Sequence[int]) -> None:
        message = _HEADER.pack(request, _VERSION | flags, len(payload)) + payload
        ancillary = []
        if fds:
            ancillary.append((_socket.SOL_SOCKET, _socket.SCM_RIGHTS, b"".join(map(_FD.pack, fds))))
        try:
            sent = self._socket.sendmsg([message], ancillary, _socket.MSG_NOSIGNAL)
            if sent < len(message):
                self._socket.sendall(message[sent:], _socket.MSG_NOSIGNAL)
        except OSError as error:
            raise self._error(request, f"could not be sent: {error}") from error

    def _receive(self, request: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self._socket.recv(size - len(data))
            except OSError as error:
                raise self._error(request, f"got no answer: {error}") from error
            if not part:
                raise self._error(request, "got no answer: the backend closed the connection")
            data += part
        return data

    def _error(self, request: int, what: str) -> VhostUserError:
        return VhostUserError(f"{self.backend}: {_NAMES.get(request, request)} {what}")


class BackendRequests:
    """The backend's own requests, on a second socket. `changed` is called when its configuration did."""

    __slots__ = ("_changed", "_data", "_socket")

    def __init__(self, connection: VhostUserConnection, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._data = b""
        self._socket, theirs = _socket.socketpair(
            _socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        )
        theirs.setblocking(True)
        try:
            connection.command(SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        except VhostUserError:
            self._socket.close()
            raise
        finally:
            theirs.close()

    @property
    def fd(self) -> int:
        """The socket, to be polled for requests."""
        return self._socket.fileno()

    def read(self) -> bool:
        """Serve what has come; false when there will be nothing more."""
        try:
            data = self._socket.recv(_MAX_PAYLOAD)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        self._data += data
        while len(self._data) >= _HEADER.size:
            request, flags, size = _HEADER.unpack_from(self._data)
            if size > _MAX_PAYLOAD:
                return False
            end = _HEADER.size + size
            if len(self._data) < end:
                break
            self._data = self._data[end:]
            known = request == BACKEND_CONFIG_CHANGE_MSG
            if flags & _FLAG_NEED_REPLY:
                answer = _HEADER.pack(request, _VERSION | _FLAG_REPLY, _U64.size) + _U64.pack(not known)
                try:
                    self._socket.send(answer, _socket.MSG_NOSIGNAL)
                except OSError:
                    return False
            if known:
                self._changed()
        return True

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class VhostUserDevice(VhostDevice):
    """A virtio device served by a vhost-user backend.

    Arguments:
        fd: connected socket, owned by the device from now on.
        features: device-specific features worth offering if the backend has them.
        protocol_features: of the protocol, likewise.
        config_bytes: how much of the device configuration structure comes from the backend, with every change.
        backend: name for messages, say "virtiofsd".

    Raises `VhostUserError` when the backend does not answer as it should.
    """

    def __init__(
        self,
        name: str,
        fd: int,
        queue_sizes: Sequence[int],
        *,
        features: int = 0,
        protocol_features: int = 0,
        config_bytes: int = 0,
        backend: str = "vhost-user backend",
    ) -> None:
        self.connection = connection = VhostUserConnection(fd, backend=backend)
        if config_bytes:
            protocol_features |= PROTOCOL_F_CONFIG | PROTOCOL_F_BACKEND_REQ
        config = b""
        self._requests: BackendRequests | None = None
        try:
            self.backend_features, self.protocol_features = connection.negotiate(protocol_features)
            if config_bytes:
                if not self.protocol_features & PROTOCOL_F_CONFIG:
                    raise VhostUserError(
                        f"{backend} does not tell its configuration (protocol feature CONFIG)"
                    )
                config = connection.get_config(config_bytes)
                if self.protocol_features & PROTOCOL_F_BACKEND_REQ:
                    self._requests = BackendRequests(connection, self._backend_changed)
        except VhostUserError:
            connection.close()
            raise
        super().__init__(name, self.backend_features & (features | RING_FEATURES), queue_sizes)
        self.config = config
        self._alive = True
        if self._requests is not None:
            self.worker.watch(self._requests.fd, select.POLLIN, self._backend_request)

    @property
    def backend_alive(self) -> bool:
        """Whether the backend is still there."""
        return self._alive

    def set_up(self, features: int) -> None:
        """Share memory with the backend."""
        connection = self.connection
        if not self._alive:
            raise VhostUserError(f"{connection.backend} is gone")
        assert self.memory is not None
        connection.set_u64(SET_FEATURES, (features | F_PROTOCOL_FEATURES) & self.backend_features)
        connection.set_memory(self.memory.regions)
        self.worker.watch(connection.fd, select.POLLRDHUP, self._socket_event)

    def start_ring(self, queue: Queue, base: int) -> None:
        """Have the backend serve a ring."""
        if not self._alive:
            return
        connection, index = self.connection, queue.index
        connection.set_state(SET_VRING_NUM, index, queue.size)
        connection.set_state(SET_VRING_BASE, index, base)
        connection.set_addresses(index, queue.addresses)
        connection.set_eventfd(SET_VRING_CALL, index, -1 if queue.call_fd is None else queue.call_fd())
        connection.set_eventfd(SET_VRING_KICK, index, queue.kick_fd)
        if self.backend_features & F_PROTOCOL_FEATURES:
            connection.set_state(SET_VRING_ENABLE, index, 1)

    def stop_ring(self, index: int) -> int:
        """Have the backend leave a ring alone."""
        if self.backend_features & F_PROTOCOL_FEATURES:
            self.connection.set_state(SET_VRING_ENABLE, index, 0)
        return self.connection.get_base(index)

    def ended(self) -> bool:
        """Whether the backend is gone."""
        return not self._alive or self.connection.ended()

    def close(self) -> None:
        """Stop the rings and hang up."""
        super().close()
        self._alive = False
        self.connection.close()
        if self._requests is not None:
            self._requests.close()

    def refresh_config(self) -> None:
        """The backend's configuration is another one now."""
        self.config = self.connection.get_config(len(self.config))

    def lost(self, reason: str) -> None:
        """The backend is of no use any more: so is the device."""
        if self._alive:
            self._alive = False
            self._running.clear()
            self.worker.unwatch(self.connection.fd)
        super().lost(reason)

    def _backend_request(self, events: int) -> None:
        if self._requests is not None and not self._requests.read():
            self.worker.unwatch(self._requests.fd)

    def _backend_changed(self) -> None:
        if not self._alive:
            return
        try:
            self.refresh_config()
        except VhostUserError as error:
            self.lost(str(error))
            return
        self.config_changed()

    def _socket_event(self, events: int) -> None:
        if self.connection.ended():
            self.lost(f"{self.connection.backend} has ended")
