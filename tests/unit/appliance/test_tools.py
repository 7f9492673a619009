# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.appliance import ApplianceError, tools
from rootvisor.files import virtiofsd


def program(path: Path, output: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing but an empty folder of programs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(virtiofsd, "PLACES", (str(tmp_path / "libexec-virtiofsd"),))
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
