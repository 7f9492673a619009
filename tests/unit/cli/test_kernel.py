# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rootvisor import kernels

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own kernels do not count."""
    monkeypatch.setattr(kernels, "find", lambda _name: None)
    monkeypatch.setattr(kernels, "list_kernels", list)


def _kernel(tmp_path: Path) -> kernels.Kernel:
    return kernels.Kernel("mshv", "7.3.0", tmp_path / "bzImage", tmp_path / "vmlinux")


def test_list_of_an_empty_machine_names_what_could_be_there(rootvisor: Run) -> None:
    status, out, _ = rootvisor("kernel", "list", "--json")
    assert status == 0
    assert [(row["name"], row["cached"]) for row in json.loads(out)["kernels"]] == [
        ("mshv", False),
        ("stock", False),
    ]
    assert "not here" in rootvisor("kernel", "list")[1]


def test_path_of_a_missing_kernel_names_the_command_that_makes_it(rootvisor: Run) -> None:
    status, out, err = rootvisor("kernel", "path", "mshv")
    assert (status, out) == (125, "")
    assert "rootvisor kernel build mshv" in err


def test_path_prints_the_image(rootvisor: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find", lambda _name: _kernel(tmp_path))
    assert rootvisor("kernel", "path", "mshv")[1] == f"{tmp_path}/bzImage\n"
    assert rootvisor("kernel", "path", "--elf", "mshv")[1] == f"{tmp_path}/vmlinux\n"


def test_build_shows_progress_and_prints_the_image(
    rootvisor: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ensure(_name: str, progress: kernels.Progress, *, refresh: bool) -> kernels.Kernel:
        progress("building Linux 7.3", 1, 2)
        progress("building Linux 7.3", 2, 2)
        return _kernel(tmp_path)

    monkeypatch.setattr(kernels, "ensure", ensure)
    status, out, err = rootvisor("kernel", "build", "mshv")
    assert (status, out) == (0, f"{tmp_path}/bzImage\n")
    assert err == "rootvisor: building Linux 7.3\n"


def test_build_failure_is_one_line_with_the_mend(rootvisor: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def ensure(_name: str, _progress: kernels.Progress, *, refresh: bool) -> kernels.Kernel:
        raise kernels.KernelError("the mirror cannot be reached", "connect this machine")

    monkeypatch.setattr(kernels, "ensure", ensure)
    status, out, err = rootvisor("kernel", "build", "stock")
    assert (status, out) == (125, "")
    assert err == "rootvisor: the mirror cannot be reached; connect this machine\n"


def test_source_is_only_for_mshv(rootvisor: Run) -> None:
    assert rootvisor("kernel", "build", "stock", "--source", ".")[0] == 2


def test_source_that_is_no_tree_is_one_line(rootvisor: Run, tmp_path: Path) -> None:
    status, _, err = rootvisor("kernel", "build", "mshv", "--source", str(tmp_path))
    assert status == 125
    assert err.count("\n") == 1


def test_prune_says_what_went_and_how_much(
    rootvisor: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def prune_kernels(*, dry: bool) -> list[kernels.Removed]:
        asked.append(dry)
        return [kernels.Removed("mshv", "7.2.0", tmp_path, 40 << 20)]

    monkeypatch.setattr(kernels, "prune_kernels", prune_kernels)
    status, out, _ = rootvisor("kernel", "prune")
    assert (status, out.split()) == (0, ["mshv", "7.2.0", "40.0", "MiB", "40.0", "MiB", "freed"])
    assert "would be freed" in rootvisor("kernel", "prune", "--dry-run")[1]
    report = json.loads(rootvisor("kernel", "prune", "--dry-run", "--json")[1])
    assert report == {
        "removed": [{"name": "mshv", "version": "7.2.0", "path": str(tmp_path), "bytes": 40 << 20}],
        "bytes": 40 << 20,
        "dry_run": True,
    }
    assert asked == [False, True, True]


def test_prune_of_nothing_says_so(rootvisor: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "prune_kernels", lambda **_options: [])
    assert rootvisor("kernel", "prune")[1] == "nothing to remove\n"
