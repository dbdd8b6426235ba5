"""Papermill, as the cells of a grid start it: with GPUs of its own, and without two seconds that no notebook needs.

`python -m dora_lab.worker` takes papermill's arguments. `DORA_LAB_GPUS` says how many GPUs the notebook is to have, and
that it is a cell of a grid: one run, after which its kernel ends.
"""

import atexit
import contextlib
import fcntl
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WANTED = "DORA_LAB_GPUS"
POLL_S = 1.0


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none where there is no driver."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


@contextlib.contextmanager
def own_gpus(wanted: int) -> Iterator[None]:
    """Within the block, let `wanted` of the visible GPUs be this process's alone; wait until so many are free.

    Each is held by the kernel's lock on a file of this machine, which ends with the process. Where no more are visible
    than are wanted, as in a Slurm job, there is nothing to choose.
    """
    visible = visible_gpus()
    if not wanted or len(visible) <= wanted:
        yield
        return
    with contextlib.ExitStack() as held:
        while len(names := _free(visible, wanted, held)) < wanted:
            held.close()
            time.sleep(POLL_S)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
        yield


def _free(visible: list[str], wanted: int, held: contextlib.ExitStack) -> list[str]:
    """The first GPUs that nobody holds, at most `wanted`; their locks go to `held`."""
    names: list[str] = []
    for name in visible:
        path = Path(tempfile.gettempdir()) / f"dora-lab-{os.getuid()}-gpu-{name.replace('/', '-')}"
        file = held.enter_context(path.open("w"))
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            names.append(name)
        if len(names) == wanted:
            break
    return names


def main() -> None:
    # Jupyter has jsonschema check the syntax of international addresses; building that grammar takes two seconds.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    atexit.register(gc.freeze)  # at exit nothing is searched for cycles any more
    from papermill.__main__ import papermill

    with own_gpus(int(os.environ.get(WANTED, "0"))):
        papermill()


if __name__ == "__main__":
    main()
