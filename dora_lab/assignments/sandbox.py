"""Starts the worker shut off: no network, its own processes and files only, limited memory, an empty home.

Three layers, each where the system has it. Landlock (`fence`, Linux): files outside the submission's folder can be
neither changed nor, but for Python and the system's libraries, read; nothing can be executed. Namespaces (Linux,
`unshare`): no network device to use, and ending the worker ends all that it started. Everywhere an audit hook (`guard`)
refuses the same in Python. Without Landlock only the hook is between submitted code and the files: native functions,
`torch.save` and `torch.from_file` among them, go past it. Who has no Landlock grades in a container.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dora_lab.assignments import fence, worker
from dora_lab.profiles import PROJECT

NAMESPACES = ("--net", "--pid", "--ipc", "--fork", "--kill-child")
LIBRARIES = ("/usr", "/lib", "/lib32", "/lib64", "/opt/conda")
FILES = (  # that Python, its libraries or the system's read; of /etc no more than that
    *("/dev/urandom", "/dev/zero", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
    *("/etc/fonts", "/etc/group", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/nsswitch.conf"),
    *("/etc/os-release", "/etc/passwd", "/etc/ssl/certs", "/etc/ssl/openssl.cnf"),
)


@functools.cache
def commands_around() -> tuple[str, ...]:
    """What goes before the worker's command here: it dies with who started it, and gets namespaces of its own, as root
    or as a user. Each is left out where it does not work.
    """
    before: tuple[str, ...] = ()
    die, unshare = shutil.which("setpriv"), shutil.which("unshare")
    if die and _works(die, "--pdeathsig", "KILL"):
        before = (die, "--pdeathsig", "KILL")
    for extra in ((), ("--map-root-user",)) if unshare else ():
        if _works(*before, unshare, *extra, *NAMESPACES):
            return (*before, unshare, *extra, *NAMESPACES)
    return before


def describe() -> str:
    """How submissions are shut off on this machine, in a line."""
    apart = "--net" in commands_around()
    files = f"Landlock {fence.version()}" if fence.version() else "the Python audit hook only, no Landlock here"
    network = "own network namespace" if apart else "the Python audit hook only, `unshare` is not allowed here"
    return f"files shut off by {files}; no network ({network})" + (", own process table" if apart else "")


def readable(uses_lab: bool, hidden: tuple[str, ...] = ()) -> list[str]:
    """Paths below which a submission may read: Python, the system's libraries, and this package if it uses the lab.

    What is `hidden`, and the project, is left out even where it lies below one of them.
    """
    closed = tuple(Path(path).resolve() for path in (PROJECT, *hidden))
    roots = {Path(path).resolve() for path in (*LIBRARIES, sys.prefix, sys.base_prefix)}
    paths = [part for root in sorted(roots) for part in _around(root, closed)] + [Path(path) for path in FILES]
    paths += [PROJECT / "dora_lab", PROJECT / "data"] if uses_lab else []
    return [str(path) for path in paths if path.exists()]


def start(folder: Path, memory_bytes: int, uses_lab: bool = False, hidden: tuple[str, ...] = ()) -> subprocess.Popen:
    """A worker in `folder`, its pipes open; it ends when the thread that started it does. uses_lab, hidden: as for
    `readable`.
    """
    environment = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ}
    environment |= dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME"), str(folder))
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    process = subprocess.Popen(
        [*commands_around(), sys.executable, "-I", "-B", worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    terms = {"folder": str(folder), "memory_bytes": memory_bytes, "uses_lab": uses_lab, "project": str(PROJECT)}
    terms["readable"] = readable(uses_lab, hidden)
    process.stdin.write(json.dumps(terms).encode() + b"\n")  # not as arguments, where submitted code would find it
    process.stdin.flush()
    return process


def _works(*command: str) -> bool:
    return subprocess.run([*command, "true"], capture_output=True).returncode == 0


def _around(root: Path, closed: tuple[Path, ...]) -> list[Path]:
    """`root`, or, where something closed lies below it, what else is in it, links aside."""
    if not any(path != root and path.is_relative_to(root) for path in closed):
        return [root]
    parts = [part for part in root.iterdir() if part not in closed and not part.is_symlink()]
    return [path for part in parts for path in _around(part, closed)]
