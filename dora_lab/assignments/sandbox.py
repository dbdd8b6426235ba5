"""Starts the worker shut off: no network, its own processes only, limited memory, an empty home.

Where the system lets us (Linux, `unshare`), the worker gets a network, a process table and System V memory of its own:
there is no network device to use, and ending it ends all that it started. Everywhere its audit hook refuses sockets,
processes, and files outside its folder (`worker._guard`). This is a fence against careless and hostile Python; who must
expect native exploits grades in a container.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dora_lab.assignments import worker
from dora_lab.profiles import PROJECT

NAMESPACES = ("--net", "--pid", "--ipc", "--fork", "--kill-child")
# Where answers can be read: the project, its history included, but for the environment that Python runs from.
ANSWERS = tuple(str(path) for path in PROJECT.iterdir() if not Path(sys.prefix).is_relative_to(path))


@functools.cache
def unshare_command() -> tuple[str, ...]:
    """The command that gives a process namespaces of its own here, as root or as a user; empty if none works."""
    program = shutil.which("unshare")
    for extra in ((), ("--map-root-user",)) if program else ():
        command = (program, *extra, *NAMESPACES)
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return ()


def describe() -> str:
    """How submissions are shut off on this machine, in a line."""
    if unshare_command():
        return "no network (own network namespace), own process table, Python audit hook"
    return "no network (Python audit hook only: `unshare` is not allowed here)"


def start(folder: Path, memory_bytes: int, uses_lab: bool, hidden: tuple[str, ...]) -> subprocess.Popen:
    """A worker in `folder`, its pipes open. uses_lab: it may import adapter libraries, this one too; hidden: folders
    that it may not read.
    """
    hidden = hidden if uses_lab else (*ANSWERS, *hidden)
    environment = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ}
    environment |= dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME"), str(folder))
    environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    code = [sys.executable, "-I", worker.__file__, str(folder), str(memory_bytes)]
    code += ["uses-lab" if uses_lab else "plain", *hidden]
    return subprocess.Popen(
        [*unshare_command(), *code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
