# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.kernels import mirror
from rootvisor.kernels.sources import Distribution
from tests.unit.kernels.fakes import FakeApt, environment_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; returns its folder of kernels, which does not exist yet."""
    monkeypatch.setenv("ROOTVISOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def fake_apt(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    """A Debian system whose mirror offers what the test adds."""
    apt = FakeApt(tmp_path / "apt")
    sources = tmp_path / "sources.list"
    sources.write_text("deb http://mirror.test/debian bookworm main\n")
    monkeypatch.setenv("PATH", environment_path(apt.bin))
    monkeypatch.setattr(mirror, "_SOURCES_FILE", sources)
    monkeypatch.setattr(mirror, "_SOURCES_PARTS", tmp_path / "no such folder")
    monkeypatch.setattr(mirror, "system_distribution", lambda: Distribution("Debian", "bookworm"))
    return apt


class Stages:
    """A `Progress` that keeps the stages in their order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        assert total is None or 0 <= done <= total
        if not self.seen or self.seen[-1] != stage:
            self.seen.append(stage)


@pytest.fixture
def stages() -> Stages:
    return Stages()
