# SPDX-License-Identifier: Apache-2.0
"""passt: a network for one guest, without any privilege (passt(1)).

The guest sees the addresses and routes of the host by DHCP, and reaches the host's own services at the gateway's
address. On a host without a default route it sees 10.0.2.15/24, and the host at 10.0.2.2.
"""

from __future__ import annotations

import os

from ..files.program import output_of
from .process import FIRST_FD, Daemon, find_program
from .served import START_SECONDS, Served, await_features
from .sockets import PrivateFolder, connected_pair

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "passt"
PACKAGE = "passt"

GUEST_ADDRESS = "10.0.2.15"
PREFIX_BITS = 24
HOST_ADDRESS = "10.0.2.2"
_GATEWAY_MAC = "02:00:00:00:00:01"


class Passt(Served):
    """`vhost_user` tells which device the socket is for: `VhostUserNet` or `PasstNet`."""

    __slots__ = ("vhost_user",)

    def __init__(self, daemon: Daemon, connection: int, vhost_user: bool) -> None:
        super().__init__(daemon, connection)
        self.vhost_user = vhost_user


def start_passt(*, vhost_user: bool | None = None, options: Sequence[str] = ()) -> Passt:
    """Start passt and wait until it is ready.

    Arguments:
        vhost_user: whether it moves the packets itself, which releases from 2025 on can; `None`: if it can.
        options: more of its options, `["--tcp-ports", "8080:80"]` say.

    Raises `DaemonError`.
    """
    program = find_program(NAME, PACKAGE)
    if vhost_user is None:
        vhost_user = has_vhost_user(program)
    ours, theirs = connected_pair()
    try:
        # The name of the pipe must be known to a passt that has become user nobody; it cannot be guessed.
        with PrivateFolder(0o711) as folder:
            name = folder.name("pid")
            os.mkfifo(name, 0o600)
            os.chmod(name, 0o622)
            reader = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                daemon = Daemon(NAME, command(program, name, vhost_user, options), (theirs,))
                passt = Passt(daemon, ours, vhost_user)
                try:
                    # It writes its process id when it is ready to serve.
                    daemon.await_readable(reader, START_SECONDS)
                    if vhost_user:
                        await_features(daemon, ours, START_SECONDS)
                except BaseException:
                    ours = -1
                    passt.close()
                    raise
            finally:
                os.close(reader)
    except BaseException:
        if ours >= 0:
            os.close(ours)
        raise
    finally:
        os.close(theirs)
    return passt


def command(program: str, pid_file: str, vhost_user: bool, options: Sequence[str] = ()) -> list[str]:
    """The command line; the socket is descriptor 3."""
    argv = [program, "--foreground", "--quiet", "--one-off", "--pid", pid_file, "--fd", str(FIRST_FD)]
    if vhost_user:
        argv.append("--vhost-user")
    if not has_default_route() and not options:
        argv += ["--ipv4-only", "--interface", "lo", "--address", GUEST_ADDRESS]
        argv += ["--netmask", str(PREFIX_BITS), "--gateway", HOST_ADDRESS, "--mac-addr", _GATEWAY_MAC]
    return [*argv, *options]


def has_vhost_user(program: str) -> bool:
    """Whether this passt knows vhost-user."""
    result = output_of([program, "--help"])
    return result is not None and b"--vhost-user" in result[1]


def has_default_route() -> bool:
    """Whether passt finds an interface to take its addresses from (/proc/net/route, ipv6_route)."""
    for path, column in (("/proc/net/route", 1), ("/proc/net/ipv6_route", 0)):
        try:
            with open(path) as file:
                for line in file:
                    words = line.split()
                    if len(words) > 4 and _is_default(words, column):
                        return True
        except OSError:
            pass
    return False


def _is_default(words: list[str], column: int) -> bool:
    zero = set(words[column]) == {"0"}
    if column:
        return zero and words[7] == "00000000"
    # Without a gateway it is the unreachable default of every network namespace.
    return zero and words[1] == "00" and words[-1] != "lo"
