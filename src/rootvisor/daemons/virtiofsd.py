# SPDX-License-Identifier: Apache-2.0
"""virtiofsd: a folder of the host for one guest (`rootvisor.files` knows how it is called and confined)."""

from __future__ import annotations

import os

from ..files import virtiofsd
from .process import FIRST_FD, DaemonError
from .served import Served, start_vhost_user


def start_virtiofsd(folder: str, *, readonly: bool = False) -> Served:
    """Serve `folder`. Raises `DaemonError`."""
    if not os.path.isdir(folder):
        raise DaemonError(f"cannot share {folder}: it is not a folder")
    try:
        server = virtiofsd.find()
    except virtiofsd.FileServerError as error:
        raise DaemonError(str(error)) from error
    argv = virtiofsd.command(server, os.path.abspath(folder), FIRST_FD, writable=not readonly)
    # Root's server of a folder that the guest may write to has nothing to give up before it starts.
    if readonly or os.geteuid():
        argv = virtiofsd.confined(server, argv, writable=not readonly)
    return start_vhost_user("virtiofsd", argv)
