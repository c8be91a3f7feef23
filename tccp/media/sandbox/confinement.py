"""Confines the child process: from then on the kernel lets it compute, use what it has open, and nothing else.

seccomp with a list of the system calls that decoding needs. All others fail: opening files and asking about them,
sockets, new processes and programs, signals to other processes, memory that can be executed. The filter is made by
libseccomp, which knows the numbers of the calls on each architecture; every Debian has it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

_LIBRARY = "libseccomp.so.2"
_KILL_PROCESS, _ALLOW = 0x80000000, 0x7FFF0000
_ON_OTHER_ARCHITECTURE, _ALL_THREADS = 2, 4  # attributes of a filter
_EQUAL, _MASKED_EQUAL = 4, 7
_CLONE_THREAD = 0x10000
_PROT_EXEC = 4
_FIONBIO = 0x5421  # sets whether a socket waits
_PR_SET_NAME, _PR_SET_VMA = 15, 0x53564D41  # names of threads and of pieces of memory

_ALLOWED = (
    # what is open: the connection to the parent, the granted file, this process's own memory figures
    *("read", "pread64", "readv", "preadv", "lseek", "write", "close", "recvmsg", "sendmsg", "poll", "ppoll"),
    # memory
    *("brk", "munmap", "mremap", "madvise"),
    # threads and locks
    *("futex", "futex_waitv", "set_robust_list", "rseq", "membarrier", "exit", "sched_yield", "sched_getaffinity"),
    *("sched_getparam", "sched_getscheduler", "sched_get_priority_max", "sched_get_priority_min", "getcpu"),
    # signals to itself, and its end
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "exit_group"),
    # time, random numbers, and questions about itself
    *("clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "getrandom"),
    *("getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getrusage", "times", "uname"),
    "sysinfo",
)


class _Comparison(ctypes.Structure):
    """A condition on an argument of a system call."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def _conditional() -> tuple[tuple[str, tuple[tuple[int, int, int, int], ...]], ...]:
    """Calls that are allowed with certain arguments: (name, conditions that must all hold)."""
    not_executable = (2, _MASKED_EQUAL, _PROT_EXEC, 0)
    return (
        ("mmap", (not_executable,)),
        ("mprotect", (not_executable,)),
        ("clone", ((0, _MASKED_EQUAL, _CLONE_THREAD, _CLONE_THREAD),)),
        ("tgkill", ((0, _EQUAL, os.getpid(), 0),)),  # abort() in this process
        ("ioctl", ((1, _EQUAL, _FIONBIO, 0),)),
        ("fcntl", ((1, _EQUAL, fcntl.F_DUPFD_CLOEXEC, 0),)),  # Python copies the descriptor of mapped memory
        ("prctl", ((0, _EQUAL, _PR_SET_NAME, 0),)),
        ("prctl", ((0, _EQUAL, _PR_SET_VMA, 0),)),
        ("prlimit64", ((0, _EQUAL, 0, 0), (2, _EQUAL, 0, 0))),  # only reads the process's own limits
    )


def confine() -> str | None:
    """Confines all threads of this process, for good. Returns why if this machine cannot; the process is unchanged."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return f"{_LIBRARY} is missing (Debian's package libseccomp2)"
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Comparison),
    ]
    library.seccomp_load.argtypes = library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_release.restype = None
    rules = ctypes.c_void_p(library.seccomp_init(_fail_with(errno.EPERM)))
    if not rules.value:
        return "libseccomp could not start"
    try:
        _check(library.seccomp_attr_set(rules, _ON_OTHER_ARCHITECTURE, _KILL_PROCESS))
        _check(library.seccomp_attr_set(rules, _ALL_THREADS, 1))

        def add(action: int, name: str, *conditions: tuple[int, int, int, int]) -> None:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number >= 0:  # otherwise this architecture or this libseccomp does not know it
                given = (_Comparison * len(conditions))(*(_Comparison(*one) for one in conditions))
                _check(library.seccomp_rule_add_array(rules, action, number, len(conditions), given))

        for name in _ALLOWED:
            add(_ALLOW, name)
        for name, conditions in _conditional():
            add(_ALLOW, name, *conditions)
        add(_fail_with(errno.ENOSYS), "clone3")  # its arguments cannot be checked; the C library then uses clone
        _check(library.seccomp_load(rules))
    except OSError as error:
        return f"the kernel refuses seccomp ({error.strerror})"
    finally:
        library.seccomp_release(rules)
    return None


def _fail_with(code: int) -> int:
    return 0x00050000 | code


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
