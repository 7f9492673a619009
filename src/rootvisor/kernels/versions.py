# SPDX-License-Identifier: Apache-2.0
"""Order of package versions (Debian Policy 5.6.12) and the kernel series in package names."""

from __future__ import annotations

import re

VersionKey = tuple[int, tuple[tuple[tuple[int, ...], int], ...], tuple[tuple[tuple[int, ...], int], ...]]


def version_key(version: str) -> VersionKey:
    """Sorts package versions as `dpkg --compare-versions` does: epoch, upstream version, revision."""
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return (int(epoch) if epoch.isdigit() else 0, _part_key(upstream), _part_key(revision))


def kernel_series(text: str) -> tuple[int, int] | None:
    """Major and minor number of the first `X.Y` in a package name, kernel release or version; None without one."""
    match = re.search(r"(?<![\d.])(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _part_key(part: str) -> tuple[tuple[tuple[int, ...], int], ...]:
    # Runs of non-digits and digits take turns; the empty run that findall adds marks the end, which sorts after "~".
    return tuple(
        ((*(_order(character) for character in text), 0), int(digits or 0))
        for text, digits in re.findall(r"(\D*)(\d*)", part)
    )


def _order(character: str) -> int:
    if character == "~":
        return -1
    return ord(character) if character.isalpha() else ord(character) + 256
