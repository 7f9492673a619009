# SPDX-License-Identifier: Apache-2.0
"""A file descriptor of the driver, and the hypercalls that it passes on."""

from __future__ import annotations

import os
from fcntl import ioctl

from rootvisor.tlfs import hypercalls

from . import abi
from .errors import MshvError, hypercall_error
from .memory import Memory


class Handle:
    """A file descriptor of the driver, and hypercalls through it. :class:`Mshv`, :class:`Partition` and
    :class:`~rootvisor.mshv.Vp` are handles; all methods may be called from several threads."""

    __slots__ = ("_scratch", "fd")

    def __init__(self, fd: int, scratch: list[Memory]) -> None:
        self.fd = fd
        self._scratch = scratch

    def ioctl(self, request: int, argument: int | bytes | bytearray = 0) -> int:
        """Makes an ioctl, again when a signal interrupted it; a bytearray gets what the kernel answers. MshvError."""
        if isinstance(argument, bytes):
            argument = bytearray(argument)
        while True:
            try:
                return ioctl(self.fd, request, argument)
            except InterruptedError:
                continue
            except OSError as error:
                raise MshvError(abi.NAMES.get(request, f"ioctl {request:#x}"), error.errno or 0) from error

    def hypercall(self, code: int, input: bytes, output_size: int = 0, reps: int = 0) -> bytes:
        """Passes a hypercall on to the hypervisor and returns ``output_size`` bytes of its output.

        The first eight bytes of ``input`` are the partition id, which the driver fills in: leave them 0. ``reps`` is
        the number of elements of a repeated call. Deposits are made as the hypervisor asks for them. The driver passes
        on only some calls; through :class:`Mshv` itself (the root as target) only the GET of properties.

        MshvError with ``status`` and ``reps``; ValueError when input or output are larger than a page.
        """
        if len(input) > abi.PAGE or not 0 <= output_size <= abi.PAGE:
            raise ValueError(f"input and output of a hypercall have at most {abi.PAGE} bytes each")
        pages = self._borrow()
        try:
            pages.view[: len(input)] = input
            argument = bytearray(
                abi.ROOT_HVCALL_ARGUMENT.pack(
                    code,
                    reps,
                    len(input),
                    output_size,
                    0,
                    pages.address,
                    pages.address + abi.PAGE if output_size else 0,
                )
            )
            try:
                ioctl(self.fd, abi.ROOT_HVCALL, argument)
            except OSError as error:
                _code, done, _in, _out, status, _in_ptr, _out_ptr = abi.ROOT_HVCALL_ARGUMENT.unpack(argument)
                raise hypercall_error(code, error.errno or 0, status, done if status else 0) from error
            return bytes(pages.view[abi.PAGE : abi.PAGE + output_size])
        finally:
            self._scratch.append(pages)

    def _borrow(self) -> Memory:
        """Two pages whose address is known: input and output of calls. Give them back to ``_scratch``."""
        try:
            return self._scratch.pop()  # one operation: no other thread gets the same
        except IndexError:
            return Memory(2 * abi.PAGE, name="calls")

    # --- properties -----------------------------------------------------------------------------------------------
    def get_property(self, code: int) -> int:
        """A partition property (``tlfs.partition_properties``): the root's through Mshv, else the child's."""
        data = hypercalls.GET_PARTITION_PROPERTY_INPUT.pack(0, code)
        return int.from_bytes(self.hypercall(hypercalls.GET_PARTITION_PROPERTY, data, 8), "little")

    def get_property_ex(self, code: int, argument: int = 0, size: int = 4072) -> bytes:
        """A property that is larger than 8 bytes: the first ``size`` (at most 4072) of them."""
        data = hypercalls.GET_PARTITION_PROPERTY_EX_INPUT.pack(0, code, argument)
        return self.hypercall(hypercalls.GET_PARTITION_PROPERTY_EX, data, size)

    def close(self) -> None:
        """Closes the file descriptor; closing twice is allowed."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
