# SPDX-License-Identifier: Apache-2.0
"""Programs started as file servers are, by whoever runs the tests; and as an ordinary user where that is root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rootvisor.files import virtiofsd
from rootvisor.files.confine import user_namespaces_work
from rootvisor.files.virtiofsd import Virtiofsd

NOBODY = 65534
LOOK = """
import os, resource
print(os.geteuid(), os.getgroups())
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
print(soft == hard)
try:
    open("/dev/shm/rootvisor-test-of-read-only", "w")
except OSError as error:
    print(error.strerror)
else:
    print("written")
    os.unlink("/dev/shm/rootvisor-test-of-read-only")
"""


def run(*, namespace: bool = False, writable: bool = False, user: int | None = None) -> list[str]:
    """What LOOK says, started as a server of that kind."""
    server = Virtiofsd("", rust=not namespace, namespace=namespace)
    argv = virtiofsd.confined(server, [sys.executable, "-I", "-S", "-c", LOOK], writable=writable)
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [user],
    )
    return done.stdout.splitlines()


def start_is_readable() -> bool:
    """Whether everybody can read the interpreter and this tree, as an ordinary user's server has to."""
    return all(
        path.stat().st_mode & 0o005 == 0o005
        for path in (*Path(virtiofsd.__file__).resolve().parents, *Path(sys.executable).resolve().parents)
    )


ordinary = pytest.mark.skipif(
    not user_namespaces_work() or (os.geteuid() == 0 and not start_is_readable()),
    reason="no user namespaces here, or this tree is not for everybody",
)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@ordinary
def test_ordinary_user_is_root_without_groups_in_a_namespace_and_writes_nowhere() -> None:
    assert run(namespace=True, user=NOBODY) == ["0 []", "True", "Read-only file system"]


@ordinary
def test_writable_share_can_be_written() -> None:
    assert run(writable=True)[1:] == ["True", "written"]


def test_program_that_is_not_there_is_one_line() -> None:
    argv = virtiofsd.confined(Virtiofsd("", rust=True, namespace=False), ["/nothing/there"])
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "cannot serve files: No such file or directory\n")
