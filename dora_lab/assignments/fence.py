"""The kernel's fence around submitted code: Landlock, Linux 5.13 and later, without root or installed programs.

A ruleset handles every right over files that the kernel knows, and grants reading below some paths and writing in the
submission's own folder; nothing can be executed, and no device, link or pipe made. It holds against native code too,
PyTorch's own file functions among it, which Python's audit hook (`guard`) never hears of. It says nothing of modes,
owners and times of files (`guard` refuses those), and of the network it knows TCP alone.

It stands alone (standard library) because `worker` loads it by its path.
"""

import ctypes
import os
import struct
import sys

# https://docs.kernel.org/userspace-api/landlock.html; the numbers of the calls are the same on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION = 1  # flag of CREATE_RULESET: tell the interface's version, make nothing
PATH_BENEATH = 1
NO_NEW_PRIVILEGES = 38  # of prctl
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_DIR, MAKE_FILE, REFER, TRUNCATE = 1 << 7, 1 << 8, 1 << 13, 1 << 14
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # rights that a rule for a single file may grant
KNOWN = {1: 13, 2: 14, 3: 15, 4: 15}  # version of the interface -> how many rights over files it has; 16 from 5 on
READ = READ_FILE | READ_DIR
OWN = READ | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_FILE | REFER
TCP = 0b11  # bind, connect: handled and never granted, from version 4 on
SCOPES = 0b11  # abstract sockets and signals to processes outside, from version 6 on


def version() -> int:
    """The version of the kernel's Landlock; 0 where there is none, or a container forbids it."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION))


def restrict(folder: str, readable: list[str]) -> None:
    """Shut this process, and all it will ever start, in for good: it reads below `readable` and writes in `folder`.

    Paths that are not there are left out. Raises OSError where the kernel refuses, RuntimeError if the process has
    other threads, which would stay outside.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("the fence holds for one thread and what it starts: put it up before there are others")
    libc = ctypes.CDLL(None, use_errno=True)
    abi = version()
    handled = (1 << KNOWN.get(abi, 16)) - 1
    attributes = struct.pack("=QQQ", handled, TCP, SCOPES)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _call(libc, CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    try:
        grants = [(path, READ) for path in readable] + [(folder, OWN), (os.devnull, READ_FILE | WRITE_FILE | TRUNCATE)]
        for path, rights in grants:
            _grant(libc, ruleset, path, rights & handled)
        if libc.prctl(NO_NEW_PRIVILEGES, *map(ctypes.c_ulong, (1, 0, 0, 0))):
            raise OSError(ctypes.get_errno(), "no_new_privs")
        _call(libc, RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _grant(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not there, or not to be read in any case
        return
    try:
        rights &= rights if os.path.isdir(path) else OF_FILES
        _call(libc, ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    finally:
        os.close(place)


def _call(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock (call {number}): {os.strerror(ctypes.get_errno())}")
    return result
