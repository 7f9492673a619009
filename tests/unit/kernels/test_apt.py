# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rootvisor.kernels import KernelError
from rootvisor.kernels.apt import Apt, Package, has_content, parse_packages
from rootvisor.kernels.kernel import OfflineError, no_progress
from rootvisor.kernels.sources import Source
from tests.unit.kernels.conftest import Stages
from tests.unit.kernels.fakes import FakeApt

SOURCES = [Source(("http://mirror.test/debian",), ("sid",), ("main",))]

SHOW = """\
Package: linux-source-7.3
Version: 7.3~rc7-1~exp1
Depends: binutils, xz-utils
Description: Linux kernel source
 with a second line: not a field
Filename: pool/main/l/linux/linux-source-7.3_7.3~rc7-1~exp1_all.deb
Size: 166042412
SHA256: 8bf8ca5e

Package: without-file
Version: 1

Package: odd-size
Version: 1
Filename: x
Size: many
SHA256: 00
"""


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(b"package content")
    return path


def test_parse_packages_keeps_what_can_be_downloaded() -> None:
    assert parse_packages(SHOW) == [
        Package("linux-source-7.3", "7.3~rc7-1~exp1", 166042412, "8bf8ca5e", "binutils, xz-utils")
    ]
    assert parse_packages("") == []


def test_apt_configuration_is_private(fake_apt: FakeApt, tmp_path: Path) -> None:
    Apt(tmp_path / "private", SOURCES)
    text = (tmp_path / "private" / "apt.conf").read_text()
    assert f'Dir::State::lists "{tmp_path}/private/state/lists/";' in text
    assert f'Dir::Etc::sourceparts "{tmp_path}/private/sources/";' in text
    assert "#clear APT::Update::Post-Invoke;" in text
    assert "Suites: sid" in (tmp_path / "private" / "sources" / "mirror.sources").read_text()


def test_apt_without_sources_reads_the_system_lists(fake_apt: FakeApt, tmp_path: Path) -> None:
    Apt(tmp_path / "private")
    text = (tmp_path / "private" / "apt.conf").read_text()
    assert 'Dir::State::lists "/var/lib/apt/lists/";' in text
    assert "sourceparts" not in text


def test_apt_missing_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="--kernel PATH"):
        Apt(tmp_path / "private")


def test_newest_sorts_by_version_and_matches_whole_names(
    fake_apt: FakeApt, content: Path, tmp_path: Path
) -> None:
    fake_apt.add("linux-source-7.2", "7.2.13-1", content)
    fake_apt.add("linux-source-7.3", "7.3~rc7-1~exp1", content)
    fake_apt.add("linux-source-7.3-extra", "9", content)
    found = Apt(tmp_path / "private", SOURCES).newest(r"linux-source-\d+\.\d+", "linux-source")
    assert [package.version for package in found] == ["7.3~rc7-1~exp1", "7.2.13-1"]


def test_newest_nothing_offered_is_empty(fake_apt: FakeApt, tmp_path: Path) -> None:
    assert Apt(tmp_path / "private", SOURCES).newest("linux-.*", "linux-") == []


def test_targets_origin_unknown_is_empty(fake_apt: FakeApt, tmp_path: Path) -> None:
    (fake_apt.root / "targets").write_text(
        "$(ORIGIN)|http://mirror.test/|sid\nDebian|http://m.test/|sid\nodd line\n"
    )
    assert Apt(tmp_path / "private", SOURCES).targets() == [
        ("", "http://mirror.test/", "sid"),
        ("Debian", "http://m.test/", "sid"),
    ]


def test_update_offline_without_lists(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.switch("offline")
    with pytest.raises(OfflineError, match="Temporary failure resolving") as caught:
        Apt(tmp_path / "private", SOURCES).update(no_progress, "lists")
    assert "connect this machine to the network" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_update_offline_with_older_lists_is_no_error(fake_apt: FakeApt, tmp_path: Path) -> None:
    apt = Apt(tmp_path / "private", SOURCES)
    apt.update(no_progress, "lists")
    fake_apt.switch("offline")
    apt.update(no_progress, "lists")


def test_update_mirror_without_the_suites(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.switch("nosuites")
    with pytest.raises(KernelError, match="does not have a Release file") as caught:
        Apt(tmp_path / "private", SOURCES).update(no_progress, "lists")
    assert not isinstance(caught.value, OfflineError)


def test_download_is_checked_and_not_repeated(
    fake_apt: FakeApt, content: Path, tmp_path: Path, stages: Stages
) -> None:
    package = fake_apt.add("linux-source-7.3", "1:7.3-1", content)
    apt = Apt(tmp_path / "private", SOURCES)
    first = apt.download(package, tmp_path, stages)
    assert first.name == "linux-source-7.3_1%3a7.3-1_amd64.deb"
    assert first.read_bytes() == b"package content"
    assert stages.seen == ["downloading linux-source-7.3 (0 MB)"]
    assert apt.download(package, tmp_path, stages) == first
    assert len([call for call in fake_apt.calls() if "download" in call]) == 1


def test_download_with_another_content_is_refused(fake_apt: FakeApt, content: Path, tmp_path: Path) -> None:
    package = fake_apt.add("linux-source-7.3", "1", content)
    (fake_apt.pool / "linux-source-7.3.deb").write_bytes(b"package CONTENT")
    with pytest.raises(KernelError, match="cannot fetch linux-source-7.3"):
        Apt(tmp_path / "private", SOURCES).download(package, tmp_path, no_progress)


def test_download_offline(fake_apt: FakeApt, content: Path, tmp_path: Path) -> None:
    package = fake_apt.add("linux-source-7.3", "1", content)
    fake_apt.switch("offline")
    with pytest.raises(OfflineError, match="cannot fetch linux-source-7.3: Could not connect"):
        Apt(tmp_path / "private", SOURCES).download(package, tmp_path, no_progress)


def test_download_disk_full(fake_apt: FakeApt, content: Path, tmp_path: Path) -> None:
    package = fake_apt.add("linux-source-7.3", "1", content)
    fake_apt.switch("full")
    with pytest.raises(KernelError, match="no space left .* free some space"):
        Apt(tmp_path / "private", SOURCES).download(package, tmp_path, no_progress)


def test_has_content(content: Path, tmp_path: Path) -> None:
    data = content.read_bytes()
    right = Package("x", "1", len(data), hashlib.sha256(data).hexdigest())
    assert has_content(content, right)
    assert not has_content(content, Package("x", "1", len(data) + 1, right.sha256))
    assert not has_content(content, Package("x", "1", len(data), "0"))
    assert not has_content(tmp_path / "missing", right)


def test_versions_come_with_their_suites(fake_apt: FakeApt, content: Path, tmp_path: Path) -> None:
    fake_apt.add("vmm", "2", content)
    apt = Apt(tmp_path / "private", SOURCES)
    assert apt.versions("vmm") == [("2", "sid")]
    assert apt.versions("unknown") == []


def test_closure_is_fetched_once_and_whole(
    fake_apt: FakeApt, content: Path, tmp_path: Path, stages: Stages
) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"a library")
    added = [fake_apt.add("library", "1:1", other), fake_apt.add("vmm", "2", content)]
    apt = Apt(tmp_path / "private", SOURCES)
    packages = apt.closure("vmm", "2", "sid")
    assert packages == added
    folder = tmp_path / "downloads"
    folder.mkdir()
    files = apt.download_all(packages, folder, stages, "downloading")
    assert [has_content(file, package) for file, package in zip(files, packages, strict=True)] == [True, True]
    downloads = [call for call in fake_apt.calls() if "download" in call]
    assert apt.download_all(packages, folder, stages, "downloading") == files
    assert downloads == ["apt-get download library=1:1 vmm=2"]
    assert [call for call in fake_apt.calls() if "download" in call] == downloads


def test_closure_offline_is_said(fake_apt: FakeApt, content: Path, tmp_path: Path, stages: Stages) -> None:
    package = fake_apt.add("vmm", "2", content)
    fake_apt.switch("offline")
    folder = tmp_path / "downloads"
    folder.mkdir()
    with pytest.raises(OfflineError, match="cannot fetch vmm"):
        Apt(tmp_path / "private", SOURCES).download_all([package], folder, stages, "downloading")
