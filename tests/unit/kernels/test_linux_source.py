# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.kernels import KernelError, linux_source
from rootvisor.kernels.kernel import OfflineError, no_progress
from rootvisor.kernels.linux_source import downloaded, newest, unpack
from tests.unit.kernels.conftest import Stages
from tests.unit.kernels.fakes import FakeApt, make_deb, make_tarball, source_files


def source_deb(folder: Path, suffix: str = "xz") -> Path:
    return make_deb(
        folder / f"source-{suffix}.deb",
        {
            f"usr/src/linux-source-7.3/linux-source-7.3.tar.{suffix}": make_tarball(
                source_files(), f"w:{suffix}"
            ),
            "usr/share/doc/linux-source-7.3/copyright": b"",
        },
        {f"usr/src/linux-source-7.3.tar.{suffix}": f"linux-source-7.3/linux-source-7.3.tar.{suffix}"},
    )


@pytest.mark.parametrize("suffix", ["xz", "bz2", "gz"])
def test_unpack_leaves_out_what_no_build_reads(
    fake_apt: FakeApt, tmp_path: Path, suffix: str, stages: Stages
) -> None:
    fake_apt.add("linux-source-7.3", "7.3-1", source_deb(tmp_path, suffix))
    tree = unpack(newest(stages), stages)
    files = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    left_out = {name for name, data in source_files().items() if data == b"left out"}
    assert files == source_files().keys() - left_out
    assert (tree / "scripts" / "run.sh").stat().st_mode & 0o100
    assert stages.seen == [
        "looking for kernels in experimental, sid",
        f"downloading linux-source-7.3 ({source_deb_mb(fake_apt)} MB)",
        "unpacking linux-source-7.3",
    ]


def source_deb_mb(fake_apt: FakeApt) -> str:
    return f"{(fake_apt.pool / 'linux-source-7.3.deb').stat().st_size / 1e6:.0f}"


def test_newest_takes_a_release_candidate_and_passes_over_old_series(
    fake_apt: FakeApt, tmp_path: Path
) -> None:
    deb = source_deb(tmp_path)
    fake_apt.add("linux-source-6.12", "9:6.12-1", deb)
    fake_apt.add("linux-source-7.2", "7.2.13-1", deb)
    fake_apt.add("linux-source-7.3", "7.3~rc7-1~exp1", deb)
    assert newest(no_progress).package.version == "7.3~rc7-1~exp1"


def test_newest_second_round_of_suites_when_the_first_has_none(
    fake_apt: FakeApt, tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KernelError, match=r"no linux-source >= 6\.15"):
        newest(stages)
    assert stages.seen[0] == "looking for kernels in experimental, sid"
    assert stages.seen[1].startswith(
        "looking for kernels in testing, bookworm, bookworm-updates, bookworm-backports"
    )


def test_newest_offline(fake_apt: FakeApt) -> None:
    fake_apt.switch("offline")
    with pytest.raises(OfflineError, match="connect this machine"):
        newest(no_progress)


def test_newest_mirror_without_other_suites(fake_apt: FakeApt) -> None:
    fake_apt.switch("nosuites")
    with pytest.raises(KernelError, match="does not have a Release file"):
        newest(no_progress)


def test_newest_no_space_is_refused_before_the_download(
    fake_apt: FakeApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_apt.add("linux-source-7.3", "7.3-1", source_deb(tmp_path))
    monkeypatch.setattr(linux_source, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(KernelError, match="building a kernel needs"):
        newest(no_progress)
    assert fake_apt.calls() == []


def test_downloaded_needs_a_whole_package(fake_apt: FakeApt, tmp_path: Path) -> None:
    assert downloaded() is None
    fake_apt.add("linux-source-7.3", "7.3-1", source_deb(tmp_path))
    source = newest(no_progress)
    assert downloaded() == source
    source.deb.write_bytes(source.deb.read_bytes()[:-1])
    assert downloaded() is None


def test_unpack_interrupted_starts_over_and_is_whole(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.add("linux-source-7.3", "7.3-1", source_deb(tmp_path))
    source = newest(no_progress)

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if total is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(source, interrupt)
    assert not source.tree.exists()
    assert (unpack(source, no_progress) / "Makefile").exists()


def test_unpack_package_without_source(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.add("linux-source-7.3", "7.3-1", make_deb(tmp_path / "empty.deb", {"usr/share/doc/x": b""}))
    with pytest.raises(KernelError, match="holds no kernel source"):
        unpack(newest(no_progress), no_progress)


def test_unpack_damaged_tarball(fake_apt: FakeApt, tmp_path: Path) -> None:
    deb = make_deb(tmp_path / "damaged.deb", {"usr/src/linux-source-7.3.tar.xz": b"no xz data at all"})
    fake_apt.add("linux-source-7.3", "7.3-1", deb)
    with pytest.raises(KernelError, match="tar cannot unpack"):
        unpack(newest(no_progress), no_progress)
