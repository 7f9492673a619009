# SPDX-License-Identifier: Apache-2.0
"""From what the user asked for to what the machine is given: every check against the host happens here.

`prepare` starts nothing and leaves nothing behind, apart from a kernel that it may build into the cache. A
wrong command line ends with status 2, a host that lacks something with 125.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rootvisor.appliance.hardware import SCREEN_PORT, EmulatedDevice, display_id
from rootvisor.boot.multiboot import is_multiboot
from rootvisor.cli.description import CommandRequest, Disk, RunDescription, RunOptions
from rootvisor.cli.engine import EngineChoice, choose_engine
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.cli.hardware import place
from rootvisor.cli.kernel_choice import NAMES, choose_kernel
from rootvisor.cli.output import Progress, format_bytes

_LIVE_ENVIRONMENT = frozenset(
    {
        "DBUS_SESSION_BUS_ADDRESS",
        "DISPLAY",
        "GPG_AGENT_INFO",
        "LISTEN_FDS",
        "LISTEN_PID",
        "NOTIFY_SOCKET",
        "OLDPWD",
        "SSH_AGENT_PID",
        "SSH_AUTH_SOCK",
        "SSH_CLIENT",
        "SSH_CONNECTION",
        "SSH_TTY",
        "TMUX",
        "TMUX_PANE",
        "WAYLAND_DISPLAY",
        "XAUTHORITY",
        "XDG_RUNTIME_DIR",
        "XDG_SESSION_ID",
    }
)
"""Variables that name services and terminals of this machine; they mean nothing in the root partition."""

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
AGENT_INITRAMFS = "(assembled at start: busybox, the agent, kernel modules, the command)"


@dataclass(frozen=True, slots=True)
class Standard:
    """What the standard streams are: a terminal at both ends, or something else."""

    stdin_tty: bool
    stdout_tty: bool

    @classmethod
    def of_process(cls) -> Standard:
        """Those of this process."""
        return cls(_is_tty(0), _is_tty(1))

    @property
    def terminal(self) -> bool:
        """Whether a person sits at both ends."""
        return self.stdin_tty and self.stdout_tty


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run that can start: engine, what the machine is given, whether our agent runs in it, and what hardware the
    appliance has to emulate for it."""

    engine: EngineChoice
    description: RunDescription
    agent: bool
    debug: bool
    emulated: tuple[EmulatedDevice, ...] = ()
    screenshot: str | None = None


def prepare(
    options: RunOptions,
    *,
    progress: Progress,
    build: bool = True,
    standard: Standard | None = None,
    environment: Mapping[str, str] | None = None,
) -> RunPlan:
    """Check `options` against this machine and describe the run.

    With `build` false nothing is built: the kernel of a run that would build one first has an empty image
    path.
    """
    standard = standard if standard is not None else Standard.of_process()
    environment = environment if environment is not None else os.environ
    bare_metal = options.kernel is not None and options.kernel not in NAMES and is_multiboot(options.kernel)
    options = _for_role(options, bare_metal)
    rootfs, rootfs_path = _rootfs(options)
    _check_memory(options.memory_bytes)
    initrds = () if options.initrd in (None, "none") else (_readable_file("--initrd", options.initrd),)
    if options.initrd == "none" and not any(word.startswith("root=") for word in options.append.split()):
        raise usage_error(
            "--initrd none needs a root file system",
            "name its disk, for example: --append 'root=/dev/nvme0n1 rw'",
        )
    if options.initrd is not None and options.command:
        raise usage_error(
            "CMD needs Rootvisor's own initial ramdisk and cannot run with --initrd",
            "leave --initrd out, or start the command from your ramdisk's init",
        )
    if options.command is not None and "console" not in options.devices:
        raise usage_error("CMD needs the console device", "add console to --devices")
    disks = tuple(_disk(disk) for disk in options.disks)
    if disks and "disk" not in options.devices:
        raise usage_error("--disk needs the disk device", "add disk to --devices")
    trace = _writable_file("--trace", options.trace)
    report = _writable_file("--report", options.report)
    console_log = options.console_log
    if console_log not in (None, "stderr"):
        console_log = _writable_file("--console", console_log)
    engine = choose_engine(options.engine)
    hardware = place(options.hardware, engine.name)
    screenshot = _writable_file("--screenshot", options.screenshot)
    if screenshot is not None and display_id(hardware.emulated) is None:
        raise usage_error("--screenshot shows an emulated display", "add --device emulated:display")
    if screenshot is not None and options.command is None:
        raise usage_error("--screenshot is taken at the end of CMD", "give a command")
    file_server = None if rootfs_path is None else _file_server(rootfs_path, engine.name)
    kernel = choose_kernel(options.kernel, progress=progress, build=build, bare_metal=options.role == "guest")
    if build and engine.name == "appliance":  # which boots this one: it is fetched before anything is started
        choose_kernel("stock", progress=progress, build=True)
    description = RunDescription(
        kernel=kernel,
        initrds=initrds,
        append=options.append,
        vps=options.vps,
        memory_bytes=options.memory_bytes,
        rootfs=rootfs,
        rootfs_path=rootfs_path,
        command=None
        if options.initrd is not None or bare_metal
        else user_command(options.command, rootfs, standard, environment),
        tty=standard.terminal and not bare_metal,
        disks=disks,
        devices=_devices(options, rootfs, disks),
        scheduler=options.scheduler,
        trace=trace,
        timeout_s=options.timeout_s,
        console_log=console_log,
        on_reboot=options.on_reboot,
        report=report,
        watch_deposits=options.watch_deposits,
        child_timers=options.child_timers,
        verbose=options.verbose,
        file_server=file_server,
        role=options.role,
        assigned=hardware.addresses,
        hide=options.hide,
        display=hardware.display,
        screen_port=None if screenshot is None else SCREEN_PORT,
    )
    agent = options.initrd is None and not bare_metal
    return RunPlan(
        engine,
        description,
        agent=agent,
        debug=options.debug,
        emulated=hardware.emulated,
        screenshot=screenshot,
    )


def _for_role(options: RunOptions, bare_metal: bool) -> RunOptions:
    """The options as they apply to a guest without a root, and to one that is no Linux."""
    if options.role == "root":
        if options.hide:
            raise usage_error("--hide is about a guest", "add --as guest")
        return options
    if options.hardware:
        raise usage_error(
            "--device gives physical devices to a root partition", "leave it out, or --as guest"
        )
    if options.watch_deposits:
        raise usage_error("--watch-deposits is about a root partition", "leave it out, or --as guest")
    if options.child_timers:
        raise usage_error("--child-timers is about a root partition", "leave it out, or --as guest")
    if options.scheduler != "hypervisor":
        raise usage_error("--scheduler root is about a root partition", "leave it out, or --as guest")
    if not bare_metal:
        return options
    if options.command:
        raise usage_error(
            f"CMD needs Linux, and {options.kernel} is a multiboot kernel",
            "give its arguments with --append",
        )
    if options.disks:
        raise usage_error("--disk needs Linux, and a multiboot kernel is none", "leave it out")
    return replace(options, rootfs="none", devices=())


def _rootfs(options: RunOptions) -> tuple[str | None, str | None]:
    """`rootfs` and `rootfs_path` of the description."""
    if options.rootfs == "none" or "fs" not in options.devices:
        if options.rootfs not in ("host", "none"):
            raise usage_error("--rootfs DIR needs the fs device", "add fs to --devices")
        return None, None
    if options.rootfs == "host":
        return "host", "/"
    path = os.path.abspath(options.rootfs)
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise usage_error(f"--rootfs {options.rootfs}: not a folder", "give host, none or a folder")
    except OSError as error:
        raise usage_error(
            f"--rootfs {options.rootfs}: {_reason(error)}", "give host, none or a folder that is there"
        ) from error
    if not os.access(path, os.R_OK | os.X_OK):
        raise usage_error(f"--rootfs {options.rootfs}: permission denied", "give a folder that you can read")
    if path == "/":
        return "host", "/"
    return path, path


def _file_server(path: str, engine: str) -> tuple[str, ...]:
    """The command line of the root file system's server. In the appliance root runs it, and what it sees is read-only
    anyway."""
    from rootvisor.files import virtiofsd

    try:
        server = virtiofsd.find()
    except virtiofsd.FileServerError as error:
        raise UserError(error.what, f"{error.mend}, or use --rootfs none") from error
    if engine == "appliance":
        return tuple(virtiofsd.command(server, path, virtiofsd.SOCKET, root=True))
    return tuple(virtiofsd.confined(server, virtiofsd.command(server, path, virtiofsd.SOCKET)))


def _check_memory(memory_bytes: int) -> None:
    """Refuse a root partition larger than this machine."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory_bytes > total:
        raise usage_error(
            f"--memory: the root partition would have {format_bytes(memory_bytes)}, "
            f"this machine has {format_bytes(total)}",
            "give it less",
        )


def user_command(
    argv: tuple[str, ...] | None, rootfs: str | None, standard: Standard, environment: Mapping[str, str]
) -> CommandRequest:
    """What our agent runs: CMD, or a shell."""
    if not argv:
        shell = environment.get("SHELL") or "/bin/sh"
        argv = (shell if rootfs == "host" and os.access(shell, os.X_OK) else "/bin/sh",)
    env = {name: value for name, value in environment.items() if name not in _LIVE_ENVIRONMENT}
    env.setdefault("PATH", DEFAULT_PATH)
    cwd = _working_folder() if rootfs == "host" else "/"
    if rootfs != "host":
        kept = ("LANG", "TERM", "COLORTERM", "TZ")
        env = {name: value for name, value in env.items() if name in kept or name.startswith("LC_")}
        env |= {"PATH": DEFAULT_PATH, "HOME": "/root" if rootfs else "/"}
    env["PWD"] = cwd
    return CommandRequest(argv=tuple(argv), cwd=cwd, env=env, tty=standard.terminal)


def _working_folder() -> str:
    """The current folder, or the root of the file system when it was deleted meanwhile."""
    try:
        return os.getcwd()
    except OSError:
        return "/"


def _devices(options: RunOptions, rootfs: str | None, disks: tuple[Disk, ...]) -> tuple[str, ...]:
    """The devices that have something behind them."""
    absent = {name for name, used in (("fs", rootfs), ("disk", disks)) if not used}
    return tuple(name for name in options.devices if name not in absent)


def _disk(disk: Disk) -> Disk:
    """The disk with an absolute path, after a look at its file."""
    path = _readable_file("--disk", disk.path, block=True)
    if not disk.readonly and not os.access(path, os.W_OK):
        raise usage_error(f"--disk {disk.path}: permission denied", "make it writable, or add readonly=on")
    if os.path.isfile(path) and os.path.getsize(path) < 512:
        raise usage_error(
            f"--disk {disk.path}: too small for a disk",
            f"make it larger, for example: truncate -s 1G {disk.path}",
        )
    return Disk(path, disk.readonly)


def _readable_file(option: str, text: str, block: bool = False) -> str:
    """The absolute path of a file that the user named, after checking that it is there and readable."""
    path = os.path.abspath(text)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise usage_error(f"{option} {text}: {_reason(error)}", "give a file that is there") from error
    except ValueError as error:
        raise usage_error(f"{option} {text!r}: {error}") from error
    if not (stat.S_ISREG(mode) or (block and stat.S_ISBLK(mode))):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise usage_error(f"{option} {text}: {kind}", "give a file")
    if not os.access(path, os.R_OK):
        raise usage_error(f"{option} {text}: permission denied", "give a file that you can read")
    return path


def _writable_file(option: str, text: str | None) -> str | None:
    """The absolute path of a file that will be written; nothing is created yet."""
    if text is None:
        return None
    path = os.path.abspath(text)
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        raise usage_error(f"{option} {text}: is a folder", "give a file")
    if not os.path.isdir(folder):
        raise usage_error(f"{option} {text}: the folder {folder} is not there", "create it first")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise usage_error(f"{option} {text}: permission denied", "give a file that you can write")
    return path


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _is_tty(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def python_argv() -> list[str]:
    """The interpreter as inner processes use it: no site packages, no environment, UTF-8 (start-up time
    counts).
    """
    if not sys.executable:
        raise UserError("this Python does not know its own path", "start rootvisor by its full path")
    return [sys.executable, "-I", "-S", "-X", "utf8"]
