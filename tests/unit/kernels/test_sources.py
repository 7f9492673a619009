# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.kernels.sources import (
    Distribution,
    Source,
    complete_sets,
    distribution,
    nearest_first,
    newest_first,
    other_suites,
    own_sources,
    parse_sources,
    read_sources,
    to_deb822,
    ubuntu_series,
)

DEBIAN = Distribution("Debian", "bookworm")
UBUNTU = Distribution("Ubuntu", "noble")

ONE_LINE = """\
# a comment
deb http://mirror.test/debian bookworm main contrib # trailing words
deb [arch=amd64 signed-by=/k.gpg trusted=yes] http://mirror.test/debian bookworm-updates main
deb-src http://mirror.test/debian bookworm main
deb http://flat.test/ ./
deb [broken http://mirror.test/debian bookworm main
nonsense
"""

DEB822 = """\
# head
Types: deb deb-src
URIs: http://mirror.test/debian http://second.test/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: http://off.test/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb-src
URIs: http://mirror.test/debian
Suites: bookworm
Components: main
"""


def test_parse_one_line_keeps_binary_entries_and_options() -> None:
    first, second = parse_sources(ONE_LINE, deb822=False)
    assert first == Source(("http://mirror.test/debian",), ("bookworm",), ("main", "contrib"), {})
    assert second.options == {"signed-by": "/k.gpg", "trusted": "yes"}


def test_parse_deb822_keeps_enabled_binary_entries_and_inline_key() -> None:
    (only,) = parse_sources(DEB822, deb822=True)
    assert only.uris == ("http://mirror.test/debian", "http://second.test/debian")
    assert only.suites == ("bookworm", "bookworm-updates")
    assert "\n -----BEGIN PGP" in only.options["signed-by"]


def test_to_deb822_round_trip_keeps_the_inline_key() -> None:
    sources = parse_sources(DEB822, deb822=True) + parse_sources(ONE_LINE, deb822=False)
    assert parse_sources(to_deb822(sources, "amd64"), deb822=True) == sources


def test_read_sources_takes_both_formats_and_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://a.test/debian sid main\n")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "b.sources").write_text("Types: deb\nURIs: http://b.test\nSuites: sid\nComponents: main\n")
    (parts / "c.list").write_text("deb http://c.test/debian sid main\n")
    (parts / "d.list.save").write_text("deb http://d.test/debian sid main\n")
    found = read_sources(tmp_path / "sources.list", parts)
    assert [source.uris[0] for source in found] == [
        "http://a.test/debian",
        "http://b.test",
        "http://c.test/debian",
    ]


def test_read_sources_missing_files_is_empty(tmp_path: Path) -> None:
    assert read_sources(tmp_path / "none", tmp_path / "none.d") == []


def entry(uri: str, suite: str, *components: str) -> Source:
    return Source((uri,), (suite,), components or ("main",))


def test_own_sources_goes_by_origin_where_it_is_known() -> None:
    entries = [
        entry("http://mirror.test/debian", "bookworm"),
        entry("http://other.test/", "bookworm"),
        entry("http://odd.test/debian", "weird"),
    ]
    targets = [
        ("Debian", "http://mirror.test/debian/", "bookworm"),
        ("Other", "http://other.test/", "bookworm"),
        ("Debian", "http://odd.test/debian/", "weird"),
    ]
    assert own_sources(entries, DEBIAN, targets) == [entries[0], entries[2]]


def test_own_sources_goes_by_suite_before_the_first_update() -> None:
    entries = [
        entry("http://mirror.test/debian", "bookworm-updates"),
        entry("http://mirror.test/debian", "stable"),
        entry("http://docker.test/debian", "bookworm", "edge"),
        entry("http://cloud.test/apt", "cloud-sdk-bookworm"),
    ]
    assert own_sources(entries, DEBIAN, []) == entries[:2]


def test_other_suites_one_entry_per_mirror_without_the_security_one() -> None:
    entries = [
        Source(("http://mirror.test/debian",), ("bookworm",), ("main", "contrib"), {"signed-by": "/k.gpg"}),
        entry("http://mirror.test/debian", "bookworm-updates"),
        entry("http://security.test/debian-security", "bookworm-security"),
    ]
    (only,) = other_suites(entries, DEBIAN, ("experimental", "sid"))
    assert only == Source(
        ("http://mirror.test/debian",), ("experimental", "sid"), ("main",), {"signed-by": "/k.gpg"}
    )


def test_newest_first_debian() -> None:
    first, second = newest_first(DEBIAN)
    assert first == ("experimental", "sid")
    assert second[0] == "testing"
    assert "bookworm-backports" in second


def test_nearest_first_debian() -> None:
    rounds = nearest_first(DEBIAN)
    assert rounds[0] == ("bookworm", "bookworm-updates", "bookworm-backports")
    assert rounds[1] == ("stable",)
    assert "sid" in rounds[-1]


def test_newest_first_ubuntu_devel_then_later_series_then_own() -> None:
    series = ["jammy", "noble", "plucky", "questing"]
    rounds = newest_first(UBUNTU, series)
    assert rounds[0] == ("devel",)
    assert set(rounds[1]) == {"questing", "questing-updates", "plucky", "plucky-updates"}
    assert rounds[2] == ("noble", "noble-updates", "noble-security")
    assert nearest_first(UBUNTU, series)[0] == rounds[2]


def test_rounds_without_a_codename_are_not_empty_of_suites() -> None:
    for system in (Distribution("Debian", ""), Distribution("Ubuntu", "")):
        assert newest_first(system)[0]
        assert all(suite.strip("-") for suites in nearest_first(system) for suite in suites)


def test_ubuntu_series_reads_the_table() -> None:
    table = (
        "version,codename,series,created\n24.04 LTS,Noble Numbat,noble,2023-10-12\n25.04,Plucky,plucky,2024\n"
    )
    assert ubuntu_series(table) == ["noble", "plucky"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('ID=debian\nVERSION_CODENAME=bookworm\nPRETTY_NAME="Debian GNU/Linux 12"\n', DEBIAN),
        ("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\nUBUNTU_CODENAME=noble\n", UBUNTU),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_CODENAME=wilma\nUBUNTU_CODENAME=noble\n', UBUNTU),
        ("ID=fedora\n", None),
        ("", None),
    ],
)
def test_distribution(text: str, expected: Distribution | None) -> None:
    assert distribution(text) == expected


def test_complete_sets_nearest_release_first() -> None:
    assert complete_sets(DEBIAN)[0] == ("bookworm", "bookworm-updates", "bookworm-backports")
    assert complete_sets(DEBIAN)[-1] == ("sid",)
    sets = complete_sets(UBUNTU, ["jammy", "noble", "plucky"])
    assert sets == [
        ("noble", "noble-updates", "noble-security"),
        ("plucky", "plucky-updates"),
        ("devel",),
    ]
