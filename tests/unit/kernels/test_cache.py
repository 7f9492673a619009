# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from rootvisor.kernels import Kernel, KernelError, cache_dir
from rootvisor.kernels.cache import (
    kernels_dir,
    locked,
    need_space,
    publishing,
    read_record,
    records,
    storing,
    write_record,
)
from rootvisor.kernels.kernel import DiskFullError, no_progress
from tests.unit.kernels.conftest import Stages


def test_cache_dir_order_of_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("ROOTVISOR_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == tmp_path
    monkeypatch.delenv("ROOTVISOR_CACHE")
    assert cache_dir() == Path("/xdg/rootvisor")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path("/home/someone/.cache/rootvisor")


def test_kernels_dir_that_cannot_be_made_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROOTVISOR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(KernelError, match="ROOTVISOR_CACHE"):
        kernels_dir()


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, DiskFullError, "no space left .* free some space"),
        (errno.EDQUOT, DiskFullError, "no space left"),
        (errno.EROFS, KernelError, "Read-only .* ROOTVISOR_CACHE"),
        (errno.EIO, KernelError, "Input/output"),
    ],
)
def test_storing_explains_what_the_file_system_refuses(
    number: int, kind: type[KernelError], words: str, cache: Path
) -> None:
    with pytest.raises(kind, match=words), storing():
        raise OSError(number, os.strerror(number))


def test_need_space_refuses_before_the_work(tmp_path: Path) -> None:
    need_space(tmp_path, 1, "nothing")
    with pytest.raises(KernelError, match="building needs 1099511627776 MiB"):
        need_space(tmp_path, 1 << 60, "building")


def test_publishing_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "kernel"
    with pytest.raises(KeyboardInterrupt), publishing(target) as draft:
        (draft / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with publishing(target) as draft:
            (draft / "file").write_text(text)
        assert (target / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["kernel"]


def published(folder: Path, name: str, version: str, **facts: str) -> Kernel:
    with publishing(folder) as draft:
        (draft / "bzImage").touch()
        write_record(draft, Kernel(name, version, draft / "bzImage", origin="test"), **facts)
    record = read_record(folder)
    assert record is not None
    return record[0]


def test_record_paths_follow_the_folder(cache: Path) -> None:
    kernel = published(cache / "one", "mshv", "7.3", fragment="abc")
    assert kernel.image == cache / "one" / "bzImage"
    (cache / "one").rename(cache / "two")
    assert records() == [
        (
            Kernel("mshv", "7.3", cache / "two" / "bzImage", origin="test"),
            {"name": "mshv", "version": "7.3", "origin": "test", "fragment": "abc", "image": "bzImage"},
        )
    ]


def test_record_with_a_file_gone_is_no_kernel(cache: Path) -> None:
    kernel = published(cache / "one", "mshv", "7.3")
    kernel.image.unlink()
    assert records() == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"name": 1, "version": 2, "origin": 3}', '{"image": 5}']
)
def test_record_that_is_damaged_is_no_kernel(cache: Path, text: str) -> None:
    (cache / "one").mkdir(parents=True)
    (cache / "one" / "kernel.json").write_text(text)
    assert records() == []


def test_records_without_a_cache_is_empty(cache: Path) -> None:
    assert records() == []
    assert not cache.exists()


def test_locked_second_waits_and_says_so(cache: Path) -> None:
    stages = Stages()
    order: list[str] = []
    waiting = threading.Event()

    def progress(stage: str, done: int, total: int | None) -> None:
        stages(stage, done, total)
        waiting.set()

    def second() -> None:
        with locked("mshv", progress, "building"):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked("mshv", no_progress, "building"):
        thread.start()
        assert waiting.wait(20)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]
    assert stages.seen == ["waiting for another rootvisor that is building"]


def test_locked_is_free_again_after_an_error(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked("mshv", no_progress, "building"):
        raise KeyboardInterrupt
    fd = os.open(cache / ".mshv.lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)
