"""A process gives up what it must not do, before it runs code that nobody has read. Standard library only, no imports of ours.

Layers, each as far as the system has it; a layer that is missing is named by `lock_down`:

| layer | where | takes away |
|---|---|---|
| limits (setrlimit) | every Unix | memory, processor time, file size, open files, processes |
| system calls (seccomp) | Linux | processes and threads, programs, sockets, signals, modes and owners of files, tracing, mounts |
| files (Landlock) | Linux 5.13 and later | every file but Python's own (read) and one folder (read and write) |
| audit hook | everywhere | the same from Python's own functions, with an error that says so |

No layer needs root or namespaces. Where Landlock is missing, seccomp forbids to open any file for writing.
Sources: man 2 seccomp, man 7 landlock, Linux include/uapi/linux/{seccomp,filter,landlock}.h and the system call tables.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence

# name -> number on x86-64 and on arm64 (None: not there)
_FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    **{"fork": (57, None), "vfork": (58, None), "clone": (56, 220), "execve": (59, 221), "execveat": (322, 281)},
    **{"socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242)},
    **{"bind": (49, 200), "listen": (50, 201), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138)},
    **{
        "rt_tgsigqueueinfo": (297, 240),
        "pidfd_send_signal": (424, 424),
        "pidfd_open": (434, 434),
        "pidfd_getfd": (438, 438),
    },
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None)},
    **{"fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None)},
    **{
        "futimesat": (261, None),
        "utimensat": (280, 88),
        "setxattr": (188, 5),
        "lsetxattr": (189, 6),
        "fsetxattr": (190, 7),
    },
    **{
        "removexattr": (197, 14),
        "lremovexattr": (198, 15),
        "fremovexattr": (199, 16),
        "mknod": (133, None),
        "mknodat": (259, 33),
    },
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97)},
    **{
        "setns": (308, 268),
        "open_tree": (428, 428),
        "move_mount": (429, 429),
        "fsopen": (430, 430),
        "mount_setattr": (442, 442),
    },
    **{
        "setuid": (105, 146),
        "setgid": (106, 144),
        "setreuid": (113, 145),
        "setregid": (114, 143),
        "setresuid": (117, 147),
    },
    **{
        "setresgid": (119, 149),
        "setgroups": (116, 159),
        "capset": (126, 91),
        "setrlimit": (160, 164),
        "prlimit64": (302, 261),
    },
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "seccomp": (317, 277)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "memfd_create": (319, 279)},
    **{
        "memfd_secret": (447, 447),
        "shmget": (29, 194),
        "semget": (64, 190),
        "msgget": (68, 186),
        "mq_open": (240, 180),
    },
    **{"init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104)},
    **{"reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170)},
    **{
        "clock_settime": (227, 112),
        "adjtimex": (159, 171),
        "swapon": (167, 224),
        "swapoff": (168, 225),
        "acct": (163, 89),
    },
    **{
        "link": (86, None),
        "linkat": (265, 37),
        "symlink": (88, None),
        "symlinkat": (266, 36),
    },  # they outlive the child
    **{"quotactl": (179, 60), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "iopl": (172, None)},
    **{"ioperm": (173, None), "vmsplice": (278, 75), "setpriority": (141, 140), "sched_setscheduler": (144, 119)},
}
_WRITING: dict[str, tuple[int | None, int | None]] = {  # forbidden as well where there is no Landlock
    **{"creat": (85, None), "openat2": (437, 437), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None)},
    **{
        "renameat": (264, 38),
        "renameat2": (316, 276),
        "mkdir": (83, None),
        "mkdirat": (258, 34),
        "rmdir": (84, None),
        "truncate": (76, 45),
    },
}
_OPENING: dict[str, tuple[int | None, int | None]] = {"open": (2, None), "openat": (257, 56)}  # flags: argument 1, 2
# What a Jupyter kernel needs of the above: threads, and sockets of the file system that it listens on and its client comes to.
# The rest stays forbidden: to connect to anything, and to send to an address.
_KERNEL = ("clone", "socket", "socketpair", "accept", "accept4", "bind", "listen", "sendto")
# Landlock does not guard modes and times, which shutil.copy sets; zmq sets priorities of threads. A kernel is told that it was done, and nothing is done.
_PRETENDED = (
    "sched_setscheduler",
    "chmod",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "utime",
    "utimes",
    "futimesat",
    "utimensat",
)
_CLONE_THREAD, _AF_UNIX = 0x10000, 1  # linux/sched.h, linux/socket.h
_CLONE3 = 435
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH of linux/audit.h
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_SET, _JUMP_IF_GE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06

FILES, SYSTEM_CALLS, LIMITS, AUDIT = (
    "files (Landlock)",
    "system calls (seccomp)",
    "limits (setrlimit)",
    "Python's audit hook",
)


def lock_down(
    folder: str, readable: Sequence[str], *, memory: int, seconds: int, file_size: int, kernel: bool = False
) -> list[str]:
    """Give up all but reading `readable` and writing in `folder`; return the layers in force. It cannot be undone.

    Args:
        memory: bytes of address space; `seconds` of processor time; `file_size` in bytes, for each file.
        kernel: keep what a Jupyter kernel needs: threads, ctypes, and sockets in `folder` to be reached by.
    """
    layers = []
    if _limit(memory=memory, seconds=seconds, file_size=file_size, kernel=kernel):
        layers.append(LIMITS)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(38, 1, 0, 0, 0) == 0:  # PR_SET_NO_NEW_PRIVS: else only root may do what follows
            files = _restrict_files(libc, folder, readable)
            layers += [FILES] if files else []
            layers += [SYSTEM_CALLS] if _forbid_system_calls(libc, writing=files, kernel=kernel) else []
    _add_audit_hook(folder, readable, kernel=kernel, files=not kernel or FILES not in layers)
    return [*layers, AUDIT]


def _limit(*, memory: int, seconds: int, file_size: int, kernel: bool = False) -> bool:
    try:
        import resource
    except ImportError:  # Windows
        return False
    wanted = {"AS": memory, "CPU": seconds, "FSIZE": file_size, "NOFILE": 64, "CORE": 0, "NPROC": 0}
    if kernel:
        del wanted["NPROC"]  # it counts threads, too
        wanted["NOFILE"] = 512
    for name, value in wanted.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is not None:
            hard = resource.getrlimit(number)[1]
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(number, (most, most))
            except (ValueError, OSError):  # macOS has RLIMIT_AS and refuses it
                continue
    return True


def _restrict_files(libc: ctypes.CDLL, folder: str, readable: Sequence[str]) -> bool:
    """Landlock: reading below `readable`, all below `folder`, nothing elsewhere."""
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return False
    handled = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    ruleset = libc.syscall(create, struct.pack("Q", handled), 8, 0)
    if ruleset < 0:
        return False
    read_a_file, read = 1 << 2, 1 << 0 | 1 << 2 | 1 << 3
    for path in (*readable, folder):
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        access = handled & ~(1 << 13) if path == folder else read if os.path.isdir(path) else read_a_file  # noqa: PTH112
        access |= 1 << 1 if path == "/dev/null" else 0  # to write
        libc.syscall(add, ruleset, 1, struct.pack("=Qi", access, opened), 0)
        os.close(opened)
    done = libc.syscall(restrict, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _forbid_system_calls(libc: ctypes.CDLL, *, writing: bool, kernel: bool = False) -> bool:
    """A filter in classic BPF, of instructions (code, jump if true, jump if false, value)."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    column, architecture = _ARCHITECTURES[platform.machine()]
    names = _FORBIDDEN if writing else {**_FORBIDDEN, **_WRITING}
    kept = _KERNEL if kernel else ()
    numbers = {pair[column]: name for name, pair in names.items() if name not in kept and pair[column] is not None}
    openings = (
        []
        if writing
        else [(pair[column], at) for at, pair in enumerate(_OPENING.values(), 1) if pair[column] is not None]
    )
    program = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_JUMP_IF_GE, 0, 1, 0x40000000),  # x86-64's second table, x32
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_JUMP_IF_EQUAL, 0, 1, _CLONE3),  # its flags lie in memory, where a filter cannot look: libc then takes clone
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    for number, name in numbers.items():
        answer = 0 if kernel and name in _PRETENDED else _EPERM
        program += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | answer)]
    for number, argument in openings:
        flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        program += [
            (_JUMP_IF_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, 16 + 8 * argument),
            (_JUMP_IF_SET, 0, 1, flags),
            (_RETURN, 0, 0, _ERRNO | _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    if kernel:
        program += [
            (_JUMP_IF_EQUAL, 0, 4, _FORBIDDEN["clone"][column]),  # a thread, not a process
            (_LOAD, 0, 0, 16),
            (_JUMP_IF_SET, 1, 0, _CLONE_THREAD),
            (_RETURN, 0, 0, _ERRNO | _EPERM),
            (_RETURN, 0, 0, _ALLOW),
            (_JUMP_IF_EQUAL, 1, 0, _FORBIDDEN["socket"][column]),  # none but those of the file system
            (_JUMP_IF_EQUAL, 0, 4, _FORBIDDEN["socketpair"][column]),
            (_LOAD, 0, 0, 16),
            (_JUMP_IF_EQUAL, 1, 0, _AF_UNIX),
            (_RETURN, 0, 0, _ERRNO | _EPERM),
            (_RETURN, 0, 0, _ALLOW),
            (_JUMP_IF_EQUAL, 0, 6, _FORBIDDEN["sendto"][column]),  # without an address: both halves of argument 4
            (_LOAD, 0, 0, 16 + 8 * 4),
            (_JUMP_IF_EQUAL, 0, 2, 0),
            (_LOAD, 0, 0, 16 + 8 * 4 + 4),
            (_JUMP_IF_EQUAL, 1, 0, 0),
            (_RETURN, 0, 0, _ERRNO | _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    program.append((_RETURN, 0, 0, _ALLOW))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters))
    return libc.prctl(22, 2, header, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


_FORBIDDEN_EVENTS = {
    **dict.fromkeys(("socket", "subprocess", "ctypes", "ftplib", "smtplib", "urllib", "http", "webbrowser"), True),
    **{
        f"os.{name}": True
        for name in ("system", "exec", "fork", "forkpty", "posix_spawn", "spawn", "startfile", "kill", "killpg")
    },
    **{f"os.{name}": True for name in ("chmod", "chown", "utime", "setxattr", "chflags", "link", "symlink")},
    **{"pty.spawn": True, "signal.pthread_kill": True, "resource.setrlimit": True, "resource.prlimit": True},
}


_KERNEL_EVENTS = {  # in place of "socket" and "ctypes"
    **dict.fromkeys(("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"), True),
    **{name: True for name in _FORBIDDEN_EVENTS if name not in ("socket", "ctypes", "subprocess", "urllib", "http")},
    "subprocess.Popen": True,
}
for _name in ("os.chmod", "os.utime"):  # guarded as writes are
    del _KERNEL_EVENTS[_name]


def _add_audit_hook(folder: str, readable: Sequence[str], *, kernel: bool = False, files: bool = True) -> None:
    """Python's own functions refuse, with a reason. It alone would not hold back code that wants out.

    Args:
        files: guard files as well.
    """
    real = os.path.realpath
    inside, allowed = real(folder) + os.sep, [real(path) for path in readable]
    forbidden = _KERNEL_EVENTS if kernel else _FORBIDDEN_EVENTS
    fspath, fsdecode, separator = os.fspath, os.fsdecode, os.sep
    two_paths = ("os.rename", "shutil.move", "shutil.copyfile")
    one_path = (
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.truncate",
        "os.listdir",
        "os.scandir",
        "os.chdir",
        "shutil.rmtree",
        "os.chmod",
        "os.utime",
    )
    write_flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def check(path: object, *, writes: bool) -> None:
        if path is None or isinstance(path, int):
            return
        whole = real(fsdecode(fspath(path)))  # type: ignore[call-overload]
        if (whole + separator).startswith(inside):
            return
        if writes or not any(whole == one or whole.startswith(one + separator) for one in allowed):
            raise PermissionError(f"not allowed here: {'to write' if writes else 'to read'} outside the working folder")

    def hook(event: str, arguments: tuple) -> None:  # type: ignore[type-arg]
        if not files and (event == "open" or event in one_path or event in two_paths):
            return
        if event == "open":
            path, _mode, flags = arguments
            check(path, writes=bool(isinstance(flags, int) and flags & write_flags))
        elif event in forbidden or (not kernel and event.partition(".")[0] in forbidden):
            raise PermissionError(f"not allowed here: {event}")
        elif event in one_path:
            check(arguments[0], writes=event not in ("os.listdir", "os.scandir", "os.chdir"))
        elif event in two_paths:
            check(arguments[0], writes=True)
            check(arguments[1], writes=True)

    sys.addaudithook(hook)
