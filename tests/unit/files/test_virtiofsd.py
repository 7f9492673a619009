# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.files import virtiofsd
from rootvisor.files.virtiofsd import FileServerError, Virtiofsd

C_SERVER = Virtiofsd("/usr/lib/qemu/virtiofsd", rust=False, namespace=False)
RUST_SERVER = Virtiofsd("/usr/libexec/virtiofsd", rust=True, namespace=False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place where a virtiofsd may be."""
    path = tmp_path / "virtiofsd-place"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(virtiofsd, "PLACES", (str(path),))
    return path


def program(path: Path, output: str, status: int = 0) -> None:
    path.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    path.chmod(0o755)


def test_find_nothing_there_names_the_package(place: Path) -> None:
    with pytest.raises(FileServerError, match="virtiofsd is missing; apt-get install"):
        virtiofsd.find()


def test_find_rust_is_told_by_its_version(place: Path) -> None:
    program(place, "virtiofsd 1.13.0")
    assert virtiofsd.find() == Virtiofsd(str(place), rust=True, namespace=False)


@pytest.mark.parametrize(
    ("uid", "works", "namespace"), [(0, False, False), (1000, True, True), (1000, False, None)]
)
@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("virtiofsd version 7.2.22\nCopyright (c) X\nusing FUSE kernel interface", 0),
        ("setgroups() failed with error=1:Operation not permitted", 1),
    ],
)
def test_find_c_wants_root_or_a_namespace(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    uid: int,
    works: bool,
    namespace: bool | None,
    words: str,
    status: int,
) -> None:
    program(place, words, status)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    monkeypatch.setattr(virtiofsd, "user_namespaces_work", lambda: works)
    if namespace is None:
        with pytest.raises(FileServerError, match="as root"):
            virtiofsd.find()
    else:
        assert virtiofsd.find() == Virtiofsd(str(place), rust=False, namespace=namespace)


def test_virtiofsd_c_and_rust_take_their_own_options() -> None:
    c_command = virtiofsd.command(C_SERVER, "/", 5, writable=False, root=True)
    rust_command = virtiofsd.command(RUST_SERVER, "/", 5, writable=False, root=True)
    assert "cache=always" in c_command and "--cache=always" in rust_command
    assert "--fd=5" in c_command and "--fd=5" in rust_command


def test_virtiofsd_writable_folder_is_looked_at_anew() -> None:
    assert "cache=auto" in virtiofsd.command(C_SERVER, "/x", 5, writable=True, root=True)
    assert "--cache=auto" in virtiofsd.command(RUST_SERVER, "/x", 5, writable=True, root=True)


def test_virtiofsd_ordinary_user_needs_no_privilege() -> None:
    command = virtiofsd.command(RUST_SERVER, "/", 5, writable=False, root=False)
    assert "--sandbox=none" in command and "--rlimit-nofile=0" in command


def test_confined_c_server_of_an_ordinary_user_enters_a_namespace() -> None:
    argv = virtiofsd.confined(Virtiofsd("/x", rust=False, namespace=True), ["/x", "--fd=5"])
    assert argv[-3:] == ["read-only,namespace", "/x", "--fd=5"]
    assert virtiofsd.confined(RUST_SERVER, ["/x"], writable=True)[-2:] == ["-", "/x"]
