"""Python's fence around submitted code: an audit hook that refuses what a solution never needs, and says why.

It is the second layer. What it sees are Python's own doors: native code has others, PyTorch's file functions among
them, and Python that sets out to can take a hook apart. Where the kernel has Landlock, `fence` holds without it; where
it has none, this is all there is.

It stands alone (standard library) because `worker` loads it by its path, with builtins of its own.
"""

import os
import sys

# Audit events, https://docs.python.org/3/library/audit_events.html
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill")
FORBIDDEN += ("ctypes.", "pty.", "signal.", "ftplib.", "http.", "urllib.", "smtplib.", "sqlite3.", "webbrowser.")
FORBIDDEN += ("os.link", "os.symlink", "gc.get_")  # links lead out of the folder; gc finds this hook
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "shutil.")
MARKS = ("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr")  # Landlock does not know these
PLACES = (str, bytes, os.PathLike)


def install(folder: str, readable: list[str], blocked: tuple[str, ...]) -> None:
    """Refuse, for good: processes, sockets, signals, native code, importing `blocked`, reading elsewhere than below
    `readable` and in `folder`, changing anything outside `folder`. An audit hook cannot be taken out again from Python.
    """
    realpath, isdir, isabs, decoded = os.path.realpath, os.path.isdir, os.path.isabs, os.fsdecode
    inside = realpath(folder) + os.sep
    open_to = (inside, *(realpath(path) + os.sep for path in (*readable, os.devnull)))

    def climbs(path: object) -> bool:
        """Whether it is relative and goes up: from a folder that the event may not tell (dir_fd)."""
        return not isabs(decoded(path)) and ".." in decoded(path).split(os.sep)

    def outside(path: object) -> bool:
        return climbs(path) or not (realpath(decoded(path)) + os.sep).startswith(inside)

    def check_open(path: object, mode: str | None, flags: int | None) -> None:
        if not isinstance(path, PLACES):  # a file descriptor: it was opened before
            return
        place = realpath(decoded(path))
        writes = any(c in (mode or "") for c in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes and outside(path) and place != os.devnull:
            raise PermissionError(f"a submission may write only in its own folder, not to {path}")
        if not (place + os.sep).startswith(open_to):
            raise PermissionError(f"a submission may not read {path}")
        if mode is None and (climbs(path) or isdir(place) and outside(path)):  # os.open, whose event tells no dir_fd
            raise PermissionError(f"a submission may not open the folder {path}, nor a file by way of another folder")

    def hook(event: str, arguments: tuple) -> None:
        if event == "import":
            name, file = arguments[0], arguments[1]
            if name.partition(".")[0] in blocked:
                raise ImportError(f"{name} may not be imported in a submission: write it in plain PyTorch")
            if file is not None and not outside(file):
                raise ImportError(f"a submission may not bring native code along ({name})")
        elif event == "open":
            check_open(*arguments[:3])
        elif event in ("os.listdir", "os.scandir"):
            check_open(arguments[0], "", 0)
        elif event.startswith(FORBIDDEN):
            raise PermissionError(f"a submission may not use {event}")
        elif event.startswith((*CHANGES, *MARKS)):
            places = [argument for argument in arguments if isinstance(argument, PLACES)]
            if any(outside(place) for place in places) or not places and event.startswith(MARKS):
                raise PermissionError(f"a submission may change only files in its own folder ({event})")

    sys.addaudithook(hook)
