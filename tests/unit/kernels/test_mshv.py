# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.kernels import KernelError, build, ensure, find, list_kernels, mshv
from rootvisor.kernels.mshv import FRAGMENT, missing_options
from tests.unit.kernels.conftest import Stages
from tests.unit.kernels.fakes import FakeApt, make_deb, make_elf, make_tarball, source_files, write_tree


@pytest.fixture(autouse=True)
def tools_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mshv, "check_tools", lambda: None)


@pytest.fixture
def mirror_with_source(fake_apt: FakeApt, tmp_path: Path) -> FakeApt:
    add_source(fake_apt, tmp_path, "7.3")
    return fake_apt


def add_source(apt: FakeApt, folder: Path, series: str, **extra: bytes) -> None:
    tarball = make_tarball({**source_files(), **extra})
    name = f"linux-source-{series}"
    apt.add(name, f"{series}-1", make_deb(folder / f"{name}.deb", {f"usr/src/{name}.tar.xz": tarball}))


def work(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "work" / "linux-source-7.3_7.3-1").iterdir())


def test_ensure_builds_once_and_keeps_only_package_and_kernel(
    mirror_with_source: FakeApt, cache: Path
) -> None:
    assert find("mshv") is None
    kernel = ensure("mshv")
    assert (kernel.name, kernel.version, kernel.modules) == ("mshv", "7.3.0-mshv", None)
    assert kernel.origin == "built from linux-source-7.3 7.3-1"
    assert kernel.vmlinux is not None
    assert kernel.vmlinux.read_bytes() == make_elf()
    assert kernel.config is not None
    assert kernel.config.read_bytes() == FRAGMENT.read_bytes()
    assert work(cache) == ["build.log", "package.json", "source.deb"]
    mirror_with_source.switch("offline")
    assert ensure("mshv") == find("mshv") == kernel
    assert list_kernels() == [kernel]


def test_ensure_builds_offline_from_a_downloaded_package(mirror_with_source: FakeApt, cache: Path) -> None:
    kernel = ensure("mshv")
    kernel.image.unlink()
    mirror_with_source.switch("offline")
    assert find("mshv") is None
    assert ensure("mshv") == kernel


def test_build_asks_for_a_newer_source(mirror_with_source: FakeApt, tmp_path: Path, cache: Path) -> None:
    ensure("mshv")
    add_source(mirror_with_source, tmp_path, "7.4")
    assert ensure("mshv").origin.endswith("7.3-1")
    assert build().origin.endswith("7.4-1")
    assert ensure("mshv").origin.endswith("7.4-1")
    assert [path.name for path in (cache / "work").iterdir()] == ["linux-source-7.4_7.4-1"]


def test_build_nothing_newer_is_quick(mirror_with_source: FakeApt, stages: Stages) -> None:
    kernel = ensure("mshv")
    assert build(progress=stages) == kernel
    assert not [stage for stage in stages.seen if stage.startswith("building")]


def test_find_passes_over_kernels_of_another_configuration(
    mirror_with_source: FakeApt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = ensure("mshv")
    fragment = tmp_path / "other.config"
    fragment.write_text("CONFIG_MSHV_ROOT=y\nCONFIG_OTHER=y\n")
    monkeypatch.setattr(mshv, "FRAGMENT", fragment)
    assert find("mshv") is None
    new = ensure("mshv")
    assert new != old
    assert list_kernels() == [new]  # its predecessor is pruned


def test_ensure_interrupted_build_goes_on(mirror_with_source: FakeApt, cache: Path) -> None:
    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage.startswith("building") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure("mshv", interrupt)
    (objects,) = (cache / "work" / "linux-source-7.3_7.3-1").glob("objects-*")
    assert (objects / "a.o").exists()
    mirror_with_source.switch("offline")
    counts: list[int] = []
    steps: list[str] = []

    def note(stage: str, done: int, total: int | None) -> None:
        if stage.startswith("building"):
            counts.append(done)
            steps[:] = (objects / "steps").read_text().split()

    ensure("mshv", note)
    assert counts[0] >= 1, "what was compiled before counts"
    assert steps.count("configured") == 1
    assert steps.count("a") == 1


def test_ensure_build_failure_names_the_error_and_the_log(
    fake_apt: FakeApt, tmp_path: Path, cache: Path
) -> None:
    add_source(
        fake_apt,
        tmp_path,
        "7.3",
        broken=b"  CC      b.o\nb.c:3:1: error: unknown type name 'u65'\nmake: *** x\n",
    )
    with pytest.raises(
        KernelError, match=r"b\.c:3:1: error: unknown type name 'u65'; the whole output is in .*build\.log"
    ):
        ensure("mshv")
    assert not list(cache.glob("mshv-*"))
    assert "unknown type name" in (cache / "work" / "linux-source-7.3_7.3-1" / "build.log").read_text()


def test_ensure_disk_full_while_building(fake_apt: FakeApt, tmp_path: Path) -> None:
    add_source(fake_apt, tmp_path, "7.3", broken=b"as: b.o: No space left on device\n")
    with pytest.raises(KernelError, match="no space left .* free some space"):
        ensure("mshv")


def test_ensure_option_that_did_not_survive(
    mirror_with_source: FakeApt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mshv, "missing_options", lambda *_: ["CONFIG_SQUASHFS=y"])
    with pytest.raises(KernelError, match="does not take CONFIG_SQUASHFS=y of mshv.config"):
        ensure("mshv")


def test_build_tree_stays_as_it_is_and_keeps_its_objects(cache: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "linux", source_files())
    before = sorted(tree.rglob("*"))
    kernel = build(tree)
    assert (kernel.name, kernel.origin) == ("local", f"built from {tree}")
    assert sorted(tree.rglob("*")) == before
    assert find("mshv") is None
    assert build(tree) == kernel
    (steps,) = (cache / "work").glob("local-*/objects/steps")
    assert steps.read_text() == "configured\na\nb\n"
    assert list_kernels() == [kernel]


def test_build_tree_that_is_none(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="not a Linux source tree"):
        build(tmp_path)


def known(*names: str) -> set[str]:
    return {f"CONFIG_{name}" for name in names}


def test_missing_options_compares_values() -> None:
    fragment = 'CONFIG_A=y\nCONFIG_B=n\n# CONFIG_C is not set\nCONFIG_D=64\nCONFIG_E="text"\n'
    good = '# comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=64\nCONFIG_E="text"\n'
    assert missing_options(fragment, good, lambda _: True) == []
    bad = 'CONFIG_A=m\nCONFIG_B=y\nCONFIG_C=y\nCONFIG_D=8\nCONFIG_E=""\n'
    assert missing_options(fragment, bad, lambda _: True) == [
        "CONFIG_A=y",
        "CONFIG_B=n",
        "CONFIG_C=n",
        "CONFIG_D=64",
        'CONFIG_E="text"',
    ]


def test_missing_options_passes_over_what_this_linux_does_not_know() -> None:
    fragment = "CONFIG_NEW=y\nCONFIG_MSHV_ROOT=y\n"
    assert missing_options(fragment, "", known().__contains__) == ["CONFIG_MSHV_ROOT=y"]
    assert missing_options(fragment, "CONFIG_MSHV_ROOT=y\n", known("NEW").__contains__) == ["CONFIG_NEW=y"]


def test_fragment_hash_goes_by_the_options_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fragment = tmp_path / "fragment"
    monkeypatch.setattr(mshv, "FRAGMENT", fragment)
    hashes = []
    for text in (
        "CONFIG_A=y\nCONFIG_B=y\n",
        "# words\nCONFIG_B=y\n\nCONFIG_A=y\n",
        "CONFIG_A=y\nCONFIG_B=n\n",
    ):
        fragment.write_text(text)
        hashes.append(mshv.fragment_hash())
    assert hashes[0] == hashes[1] != hashes[2]


def test_fragment_names_each_option_once() -> None:
    names = [line.split("=")[0] for line in FRAGMENT.read_text().splitlines() if line.startswith("CONFIG_")]
    assert len(names) == len(set(names))
    assert "CONFIG_MSHV_ROOT" in names


def test_check_tools_names_every_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="gcc, binutils, flex, bison.*apt-get install make gcc"):
        mshv.check_tools()
