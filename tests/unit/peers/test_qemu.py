# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from rootvisor.peers import qemu
from rootvisor.peers.errors import PeerError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no program anywhere."""
    monkeypatch.setenv("ROOTVISOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "cache"


def program(path: Path, version: str, accelerators: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--version) echo 'QEMU emulator version {version} (Debian)' ;;\n"
        f"-accel) printf 'Accelerators supported in QEMU binary:\\n{accelerators}\\n' ;;\nesac\n"
    )
    path.chmod(0o755)
    return path


def cached(cache: Path, version: str) -> Path:
    folder = cache / "peers" / f"qemu-{version}"
    path = program(folder / qemu.PROGRAM, version, "kvm\\nmshv")
    (folder / "peer.json").write_text(json.dumps({"version": version, "origin": "a package"}))
    return path


def test_candidates_newest_fitting_first() -> None:
    offered = [
        ("1:10.0.13+ds-0", "trixie"),
        ("1:11.1.3+ds-1", "sid"),
        ("1:10.2.0+ds-1", "testing"),
        ("odd", "sid"),
    ]
    assert qemu.candidates(offered) == [("1:11.1.3+ds-1", "sid"), ("1:10.2.0+ds-1", "testing")]


def test_find_nothing_is_none() -> None:
    assert qemu.find() is None


def test_find_takes_the_newest_of_the_cache(cache: Path) -> None:
    cached(cache, "10.2.1")
    newest = cached(cache, "11.1.3")
    found = qemu.find()
    assert found is not None
    assert (found.version, found.program) == ("11.1.3", newest)


def test_find_skips_a_damaged_record(cache: Path) -> None:
    folder = cached(cache, "11.1.3").parent
    (folder / "peer.json").write_text("{")
    assert qemu.find() is None


def test_find_installed_needs_version_and_accelerator(tmp_path: Path) -> None:
    path = program(tmp_path / "bin" / qemu.PROGRAM, "7.2.22", "kvm")
    assert qemu.find() is None
    program(path, "11.1.3", "kvm\\ntcg")
    assert qemu.find() is None
    program(path, "11.1.3", "kvm\\nmshv")
    found = qemu.find()
    assert found is not None
    assert found.origin == "installed on this machine"


def test_ensure_without_apt_says_what_to_do() -> None:
    with pytest.raises(
        PeerError, match=r"no apt to fetch QEMU with; put a qemu-system-x86_64 >= 10\.2 into PATH"
    ):
        qemu.ensure()


def test_ensure_takes_the_cache_without_apt(cache: Path) -> None:
    path = cached(cache, "11.1.3")
    assert qemu.ensure().program == path
