# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rootvisor import kernels
from rootvisor.kernels import Kernel, KernelError, mshv, prune_kernels
from rootvisor.kernels.cache import publishing, write_record


def made(cache: Path, name: str, version: str, **facts: str) -> Kernel:
    """A kernel in the cache."""
    folder = cache / f"{name}-{version}"
    with publishing(folder) as draft:
        (draft / "bzImage").write_bytes(bytes(10_000))
        write_record(draft, Kernel(name, version, draft / "bzImage"), **facts)
    return Kernel(name, version, folder / "bzImage")


@pytest.fixture
def four(cache: Path) -> dict[str, Kernel]:
    """Two of a name, one of an older configuration, one of the user's."""
    fragment = mshv.fragment_hash()
    return {
        "old": made(cache, "mshv", "7.2", fragment=fragment, source_version="7.2"),
        "new": made(cache, "mshv", "7.3", fragment=fragment, source_version="7.3"),
        "outdated": made(cache, "mshv", "7.4", fragment="other", source_version="7.4"),
        "own": made(cache, "local", "7.1"),
    }


def there(kernels_: dict[str, Kernel]) -> set[str]:
    return {name for name, kernel in kernels_.items() if kernel.image.exists()}


def test_prune_keeps_what_a_name_stands_for_and_what_is_the_users(four: dict[str, Kernel]) -> None:
    planned = prune_kernels(dry=True)
    assert there(four) == set(four)
    removed = prune_kernels()
    assert removed == planned
    assert sorted(one.version for one in removed) == ["7.2", "7.4"]
    assert all(one.size_bytes >= 10_000 for one in removed)
    assert there(four) == {"new", "own"}
    assert prune_kernels() == []


def test_prune_leaves_what_a_run_holds(four: dict[str, Kernel]) -> None:
    fd = kernels.hold(four["old"].image)
    assert fd is not None
    assert os.get_inheritable(fd)
    assert [one.version for one in prune_kernels()] == ["7.4"]
    os.close(fd)
    assert [one.version for one in prune_kernels()] == ["7.2"]


def test_prune_without_the_kernel_that_a_name_stands_for_removes_none(cache: Path) -> None:
    only = made(cache, "mshv", "7.4", fragment="other", source_version="7.4")
    assert prune_kernels() == []
    assert only.image.exists()


def test_hold_of_a_kernel_elsewhere_is_nothing(tmp_path: Path) -> None:
    assert kernels.hold(tmp_path / "bzImage") is None


def test_prune_drops_images_that_were_taken_out_long_ago(cache: Path) -> None:
    folder = cache / "extracted"
    folder.mkdir(parents=True)
    for name, age_s in (("fresh", 3600), ("old", 40 * 24 * 3600)):
        path = folder / f"{name}.elf"
        path.write_bytes(bytes(5000))
        os.utime(path, (time.time() - age_s,) * 2)
    assert [one.path.stem for one in prune_kernels()] == ["old"]
    assert [path.stem for path in folder.iterdir()] == ["fresh"]


def test_prune_of_somebody_elses_cache_says_what_to_do(
    four: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(KernelError, match=r"Permission denied.*ROOTVISOR_CACHE"):
        prune_kernels()
