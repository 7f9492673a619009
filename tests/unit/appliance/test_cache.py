# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rootvisor.appliance import cache
from rootvisor.appliance.errors import ApplianceError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROOTVISOR_CACHE", str(tmp_path))
    return tmp_path / "appliance"


def test_what_is_stored_is_loaded_and_others_may_read_it(folder: Path) -> None:
    assert cache.load("initrd") is None
    cache.store("initrd", b"one")
    cache.store("initrd", b"two")
    assert cache.load("initrd") == b"two"
    assert [(path.name, path.stat().st_mode & 0o777) for path in folder.iterdir()] == [("initrd", 0o644)]


def test_store_drops_what_nobody_has_loaded_for_a_month(folder: Path) -> None:
    month_ago = time.time() - 31 * 24 * 3600
    for name in ("old", "used"):
        cache.store(name, b"")
        os.utime(folder / name, (month_ago, month_ago))
    assert cache.load("used") == b""
    cache.store("new", b"")
    assert sorted(path.name for path in folder.iterdir()) == ["new", "used"]


def test_cache_that_cannot_be_written_is_one_line_with_the_mend(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.raises(
        ApplianceError, match="cannot write the cache .*; make room there or set ROOTVISOR_CACHE"
    ):
        cache.store("initrd", b"one")
