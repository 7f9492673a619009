# SPDX-License-Identifier: Apache-2.0
"""One port of a console device: the host's descriptors on one side, two virtqueues on the other."""

from __future__ import annotations

import select

from .queue import QueueError
from .stream import InputStream, OutputStream, advance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .queue import Chain, Queue
    from .worker import Worker

# Linux puts pages into the input queue: so many chains are filled by one read.
_CHAINS_PER_READ = 16
_BUFFERS_PER_READ = 256
# Linux spins until console output is taken, so output waits here rather than in the queue.
_BACKLOG_BYTES = 1 << 20
# A reset with output in the queue (a guest that powers off) keeps at most this much of it.
_SAVED_BYTES = 16 << 20
_CONSOLE_PATIENCE_MS = 1000


class Port:
    """What the embedder asks for, and the port's state while the device runs.

    Arguments:
        name: shown to the guest (/sys/class/virtio-ports/*/name); may be empty for a console.
        fd_in, fd_out: host descriptors for the guest's input and output; duplicated, never set non-blocking, and
            `None` for no input resp. for output that is dropped.
        is_console: an hvc console instead of a plain port.
        on_close: called once the guest has closed the port and all of its output is written.
        on_output_lost: called when nobody receives the output any more; from then on it is dropped.

    Callbacks run on the device's thread and must be quick.
    """

    def __init__(
        self,
        name: str,
        fd_in: int | None = None,
        fd_out: int | None = None,
        is_console: bool = False,
        *,
        on_close: Callable[[], None] | None = None,
        on_output_lost: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.is_console = is_console
        self.on_close = on_close
        self.on_output_lost = on_output_lost
        self.input_ended = False
        self.guest_open = False
        self.ready = False
        self.rx: Queue | None = None
        self.tx: Queue | None = None
        self._worker: Worker | None = None
        self._ended: Callable[[Port], None] | None = None
        self._input = None if fd_in is None else _open_input(fd_in)
        self._output = None if fd_out is None else _open_output(fd_out)
        self._held: Chain | None = None
        self._held_rest: list[memoryview] = []
        self._backlog = bytearray()
        self._closing = False

    @property
    def host_open(self) -> bool:
        """What the guest is told of the host's side: closed once the input has come to its end."""
        return not self.input_ended

    def attach(self, worker: Worker, ended: Callable[[Port], None]) -> None:
        """Connect to the device's thread; `ended` is called when the host's input ends."""
        self._worker = worker
        self._ended = ended

    def opened(self, is_open: bool) -> None:
        """The guest opened or closed the port."""
        self.guest_open = is_open
        if is_open:
            self._closing = False
            self.poll_input()
        else:
            self._unwatch_input()
            self._closing = True
            self._finish_close()

    def release(self, queue: Queue) -> None:
        """The device must not touch this queue any more."""
        if queue is self.rx:
            self._unwatch_input()
            self.rx = None
        elif queue is self.tx:
            self._save_output(queue)
            self.tx = None

    def detach_queues(self) -> None:
        """The device was reset."""
        self._unwatch_input()
        self.rx = self.tx = None
        self.guest_open = self.ready = False
        self._finish_close()

    def poll_input(self) -> None:
        """The guest may have room: wait for the host's input."""
        if self._input is None or self.rx is None or not self.guest_open or self.input_ended:
            return
        self.rx.quiet()
        assert self._worker is not None
        self._worker.watch(self._input.fd, select.POLLIN, self._input_ready)

    def pump_output(self, ready: bool = False) -> None:
        """Write what the guest has given; `ready` after POLLOUT."""
        queue = self.tx
        if queue is None:
            return
        while True:
            queue.quiet()
            done = False
            while True:
                chain = self._held or queue.pop()
                if chain is None:
                    break
                if self._held is None:
                    queue.counters.bytes += chain.readable_bytes()
                    self._held, self._held_rest = chain, chain.readable
                if not self._write_held(ready):
                    if done:
                        queue.notify()
                    return
                ready = False
                queue.push(chain, 0)
                self._held = None
                done = True
            more = queue.listen()
            if done:
                queue.notify()
            if not more:
                self._finish_close()
                return

    def settle(self) -> None:
        """Hold on to no request: the rest of its output waits here."""
        if self._held is None or self.tx is None:
            return
        if self._held_rest:
            for view in self._held_rest:
                self._backlog += view
            self._await_output()
        self.tx.push(self._held, 0)
        self.tx.notify()
        self._held, self._held_rest = None, []

    def save(self) -> list[object]:
        """What the driver did. Output that the host has not taken is still this port's to write."""
        return [self.ready, self.guest_open]

    def restore(self, saved: list[Any]) -> None:
        """As saved."""
        ready, guest_open = saved
        self.ready, self.guest_open = bool(ready), bool(guest_open)

    def drain(self) -> None:
        """Write out what is left, once the device's thread has ended.

        A port waits for its reader as long as a program in its place would; a console gives up after a second in which
        its terminal took nothing.
        """
        output = self._output
        if output is None:
            return
        poll = select.poll()
        poll.register(output.fd, select.POLLOUT)
        patience = _CONSOLE_PATIENCE_MS if self.is_console else None
        try:
            while self._backlog and poll.poll(patience):
                self._write_backlog()
        except OSError:
            self._output_lost()
        self._finish_close()

    def close(self) -> None:
        """Release the host's descriptors."""
        for stream in (self._input, self._output):
            if stream is not None:
                stream.close()
        self._input = self._output = None

    def _input_ready(self, events: int) -> None:
        queue, stream = self.rx, self._input
        if queue is None or stream is None or not self.guest_open:
            self._unwatch_input()
            return
        chains: list[Chain] = []
        buffers: list[memoryview] = []
        while len(chains) < _CHAINS_PER_READ and len(buffers) < _BUFFERS_PER_READ:
            chain = queue.pop()
            if chain is None:
                break
            chains.append(chain)
            buffers += chain.writable
        if not chains:
            if not queue.listen():
                self._unwatch_input()
            return
        count = stream.read_into(buffers[: _BUFFERS_PER_READ * 2]) if buffers else None
        used = 0
        rest = count or 0
        for chain in chains:
            room = chain.writable_bytes()
            if not rest and room:
                break
            written = min(room, rest)
            queue.push(chain, written)
            rest -= written
            used += 1
        for chain in reversed(chains[used:]):
            queue.unpop(chain)
        queue.notify()
        if count == 0:
            self._unwatch_input()
            self.input_ended = True
            if self._ended is not None:
                self._ended(self)

    def _write_held(self, ready: bool) -> bool:
        """Write the rest of the held chain; false when POLLOUT must be awaited."""
        output = self._output
        if output is None:
            return True
        if self._backlog:
            return self._keep()
        try:
            while self._held_rest:
                count = 0 if output.small and not ready else output.write(self._held_rest[:_BUFFERS_PER_READ])
                ready = False
                if count == 0:
                    if self.is_console and self._keep():
                        return True
                    self._await_output()
                    return False
                self._held_rest = advance(self._held_rest, count)
        except OSError:
            self._output_lost()
        return True

    def _keep(self) -> bool:
        """Put the rest of the held chain behind what waits already; false when too much does."""
        self._await_output()
        if len(self._backlog) >= _BACKLOG_BYTES:
            return False
        for view in self._held_rest:
            self._backlog += view
        self._held_rest = []
        return True

    def _save_output(self, queue: Queue) -> None:
        """The driver goes while its output waits for the host: Linux gave it away and believes it written."""
        if self._output is not None and (self._held is not None or queue.listen()):
            rest = self._held_rest
            try:
                while len(self._backlog) < _SAVED_BYTES:
                    for view in rest:
                        self._backlog += view
                    chain = queue.pop()
                    if chain is None:
                        break
                    rest = chain.readable
            except QueueError:
                pass
            if self._backlog:
                self._await_output()
        self._held = None
        self._held_rest = []

    def _await_output(self) -> None:
        assert self._worker is not None and self._output is not None
        self._worker.watch(self._output.fd, select.POLLOUT, self._output_ready)

    def _output_ready(self, events: int) -> None:
        if self._output is None or self._worker is None:
            return
        try:
            if self._backlog and self._write_backlog() and self._backlog:
                return
        except OSError:
            self._output_lost()
        if not self._backlog:
            if self._output is not None:
                self._worker.unwatch(self._output.fd)
            self.pump_output(ready=True)

    def _write_backlog(self) -> bool:
        """Write from the backlog; false when nothing went."""
        assert self._output is not None
        with memoryview(self._backlog) as view, view[: 1 << 16] as part:
            count = self._output.write([part])
        del self._backlog[:count]
        return count > 0

    def _output_lost(self) -> None:
        if self._output is not None:
            if self._worker is not None:
                self._worker.unwatch(self._output.fd)
            self._output.close()
            self._output = None
        self._backlog.clear()
        self._held_rest = []
        if self.on_output_lost is not None:
            self.on_output_lost()

    def _finish_close(self) -> None:
        """The guest closed the port: tell it once everything that it wrote before is out."""
        if not self._closing or self._held is not None or self._backlog:
            return
        self._closing = False
        if self.on_close is not None:
            self.on_close()

    def _unwatch_input(self) -> None:
        if self._input is not None and self._worker is not None:
            self._worker.unwatch(self._input.fd)


def _open_input(fd: int) -> InputStream | None:
    try:
        return InputStream(fd)
    except OSError:  # closed by whoever started us
        return None


def _open_output(fd: int) -> OutputStream | None:
    try:
        return OutputStream(fd)
    except OSError:
        return None
