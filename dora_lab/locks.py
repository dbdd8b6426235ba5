"""One holder of a folder at a time, on one machine or on several that share a file system.

The kernel's lock (flock) ends with its process, however that ends. It holds on one machine, and between machines where
the file system passes it on; some do not. So the holder also keeps a lease, a file that it writes anew every `BEAT_S`
seconds: one that stays as it is for `STALE_S` is of a holder that was killed on another machine, and is taken over.
"""

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

BEAT_S = 10.0
STALE_S = 120.0  # NFS may show an old file for a minute
POLL_S = 0.5
SETTLE_S = 2.0  # for others that take over the same stale lease to show themselves
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # what a file system without flock answers


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder alone within the block; wait for whoever holds it. What a killed holder left does not block."""
    lease, own = folder / ".lease", f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    with (folder / ".lock").open("w") as file:
        _take(lease, own, _flock(file))
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(lease, own, ended), daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            if _holder(_read(lease)) == own:
                lease.unlink(missing_ok=True)


def _flock(file) -> bool:
    """Take the kernel's lock; False where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _take(lease: Path, own: str, flocked: bool) -> None:
    """Wait until the lease is nobody's and make it `own`."""
    seen, since = "", time.monotonic()
    while True:
        with contextlib.suppress(FileExistsError), lease.open("x") as file:
            file.write(own)
            return
        text = _read(lease)
        if flocked and text.split(" ")[0] == socket.gethostname():  # of this machine, which has given us its flock
            _write(lease, own)
            return
        if text != seen:
            seen, since = text, time.monotonic()
        elif time.monotonic() - since > STALE_S:
            _write(lease, own)
            time.sleep(SETTLE_S)
            if _holder(_read(lease)) == own:
                return
        time.sleep(POLL_S)


def _beat(lease: Path, own: str, ended: threading.Event) -> None:
    """Write the lease anew until the end, or until it is another's: this process was stopped for too long."""
    count = 0
    while not ended.wait(BEAT_S):
        if _holder(_read(lease)) != own:
            return
        count += 1
        with contextlib.suppress(OSError):
            _write(lease, f"{own} {count}")


def _holder(text: str) -> str:
    """The lease without the count of its beats."""
    return " ".join(text.split(" ")[:3])


def _read(lease: Path) -> str:
    """The lease, "" if there is none. Opening it makes NFS ask the server."""
    try:
        return lease.read_text()
    except FileNotFoundError:
        return ""


def _write(lease: Path, text: str) -> None:
    temporary = lease.with_name(f"{lease.name}-{uuid.uuid4().hex}")
    temporary.write_text(text)
    temporary.replace(lease)
