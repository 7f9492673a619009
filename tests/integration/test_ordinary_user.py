# SPDX-License-Identifier: Apache-2.0
"""``rootvisor run`` by somebody who is not root, in the appliance. Run as root, the tests become nobody."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootvisor import kernels
from rootvisor.appliance import check
from rootvisor.files.confine import user_namespaces_work

PROJECT = Path(__file__).resolve().parents[2]
NOBODY = 65534
TIMEOUT_S = 180


def for_everybody(path: Path) -> bool:
    """Whether others than root can read what is at ``path``."""
    return all(place.stat().st_mode & 0o005 == 0o005 for place in (path, *path.resolve().parents))


pytestmark = [
    pytest.mark.boot,
    pytest.mark.skipif(bool(check()), reason="the appliance cannot run here"),
    pytest.mark.skipif(not user_namespaces_work(), reason="no user namespaces here"),
    pytest.mark.skipif(
        os.geteuid() == 0
        and not (for_everybody(PROJECT / "src" / "rootvisor") and for_everybody(Path(sys.executable))),
        reason="this tree or its interpreter is not for everybody",
    ),
]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home folder of the user's own, with both kernels in its cache."""
    with tempfile.TemporaryDirectory(prefix="rootvisor-home-") as name:
        home = Path(name)
        if os.geteuid() == 0:
            for kernel in ("stock", "mshv"):
                folder = kernels.ensure(kernel).image.parent
                place = home / ".cache" / "rootvisor" / "kernels" / folder.name
                shutil.copytree(folder, place, symlinks=True)
            for path in (home, *home.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        yield home


def rootvisor(home: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The command as that user, who has a supplementary group as users have."""
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONPATH": str(PROJECT / "src")}
    user = {}
    if os.geteuid() == 0:
        environment["HOME"] = str(home)
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": [NOBODY]}
    else:
        environment |= {name: os.environ[name] for name in ("HOME", "ROOTVISOR_CACHE") if name in os.environ}
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        [sys.executable, "-m", "rootvisor", *arguments],
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT_S,
        cwd="/",
        env=environment,
        check=False,
        **user,  # type: ignore[call-overload, unused-ignore]
    )
    return done


SCRIPT = """
cat
ls -l /dev/mshv | cut -c 1
head -c 4 /usr/bin/env | tail -c 3
echo >>/usr/of-nobody && echo more >>/etc/passwd && tail -n 1 /etc/passwd
touch /tmp/of-nobody && stat -c %u /usr/bin /tmp/of-nobody
cat /etc/shadow || echo secret
exit 7
"""


def test_run_reads_files_of_root_and_writes_into_memory(home: Path) -> None:
    done = rootvisor(
        home, "run", "--engine", "appliance", "--kernel", "mshv", "--", "sh", "-c", SCRIPT, stdin=b"in\n"
    )
    assert done.returncode == 7, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert lines[:3] == ["in", "c", "ELFmore"]
    assert lines[4] == "0"
    assert lines[-1] == "secret"
    assert not os.path.exists("/usr/of-nobody")


def test_kvm_without_permission_is_one_line(home: Path) -> None:
    if not os.path.exists("/dev/kvm") or os.stat("/dev/kvm").st_mode & stat.S_IWOTH:
        pytest.skip("/dev/kvm is absent, or for everybody")
    done = rootvisor(home, "run", "--engine", "kvm", "--", "true")
    if os.geteuid() != 0 and done.returncode == 0:
        pytest.skip("this user may use /dev/kvm")
    text = done.stderr.decode()
    assert done.returncode == 125
    assert len(text.splitlines()) == 1
    assert "cannot open /dev/kvm: permission denied" in text
    assert "usermod -aG kvm" in text
