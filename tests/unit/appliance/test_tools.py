# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.appliance import ApplianceError, tools


def program(path: Path, output: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing but an empty folder of programs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "_VIRTIOFSD_PLACES", (str(tmp_path / "libexec-virtiofsd"),))
    return tmp_path


def test_require_tools_no_qemu_names_the_package(machine: Path) -> None:
    with pytest.raises(
        ApplianceError, match=r"qemu-system-x86_64 is missing; apt-get install qemu-system-x86"
    ):
        tools.require_tools()


def test_find_tools_nothing_there_lists_every_problem(machine: Path) -> None:
    found, problems = tools.find_tools()
    assert found is None
    assert [problem.what for problem in problems] == ["qemu-system-x86_64 is missing", "virtiofsd is missing"]


def test_find_tools_no_memory_is_a_problem(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "available_mib", lambda: 100)
    assert any("only 100 MiB" in problem.what for problem in tools.find_tools()[1])


def test_find_tools_rust_virtiofsd_is_told_by_its_version(machine: Path) -> None:
    program(machine / tools.QEMU, "")
    program(machine / "libexec-virtiofsd", "virtiofsd 1.13.0")
    found, problems = tools.find_tools()
    assert found is not None and not problems
    assert found.virtiofsd.rust and not found.virtiofsd.namespace


@pytest.mark.parametrize(
    ("uid", "works", "namespace"), [(0, False, False), (1000, True, True), (1000, False, None)]
)
def test_find_tools_c_virtiofsd_wants_root_or_a_namespace(
    machine: Path, monkeypatch: pytest.MonkeyPatch, uid: int, works: bool, namespace: bool | None
) -> None:
    program(machine / tools.QEMU, "")
    program(
        machine / "libexec-virtiofsd",
        "virtiofsd version 7.2.22\nCopyright (c) X\nusing FUSE kernel interface",
    )
    monkeypatch.setattr("os.geteuid", lambda: uid)
    monkeypatch.setattr(tools, "user_namespaces_work", lambda: works)
    found, problems = tools.find_tools()
    if namespace is None:
        assert found is None
        assert "as root" in problems[0].what
    else:
        assert found is not None
        assert found.virtiofsd.namespace is namespace
