# SPDX-License-Identifier: Apache-2.0
"""Runs as `python -I -S start.py WORDS PROGRAM [ARGUMENT]...`: confine this process, then become the file server.

WORDS, with commas between them: `read-only` (of the host's mounts), `namespace` (the program insists on being root);
or `-`. An ordinary user's server gets a library that spares it from a flag which it may not use (see `preload`).
"""

from __future__ import annotations

import contextlib
import os
import sys

sys.path.insert(0, __file__.rsplit("/", 3)[0])

from rootvisor.files import confine, preload


def main() -> int:
    """Gives a status only where the program cannot be run."""
    words = sys.argv[1].split(",")
    root = os.geteuid() == 0
    try:
        confine.raise_open_files_limit()
        if "namespace" in words:
            confine.enter_user_namespace()
            confine.hide_groups()
        elif not root:
            with contextlib.suppress(OSError):  # the program can do without
                confine.enter_user_namespace()
        if "read-only" in words:
            with contextlib.suppress(OSError):  # the guest mounts it read-only as well
                confine.make_host_read_only()
        if not root:
            os.environ["LD_PRELOAD"] = preload.library()
        os.execv(sys.argv[2], sys.argv[2:])
    except OSError as error:
        print(f"cannot serve files: {error.strerror or error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
