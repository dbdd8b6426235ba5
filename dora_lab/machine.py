"""What this machine is, as far as it will say: processor, memory, GPU, free disk, package versions.

Everything here answers on a bare laptop: what cannot be found out is None, and nothing raises.
"""

import contextlib
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "papermill", "jupyterlab", "ipywidgets")


@dataclass(frozen=True)
class Machine:
    """Sizes are bytes. `packages` maps a name to its version, None where it is not installed."""

    processor: str
    cores: int
    memory_bytes: int | None
    available_bytes: int | None
    gpus: tuple[tuple[str, int], ...]  # name, memory
    free_disk_bytes: int | None
    system: str
    python: str
    packages: dict[str, str | None]

    @property
    def missing(self) -> list[str]:
        """Packages of the environment that are not installed."""
        return [name for name, found in self.packages.items() if found is None]


def detect(folder: str | Path = ".") -> Machine:
    """The machine as it is now; free disk is that of `folder`, where runs are written."""
    total, available = memory()
    return Machine(
        processor=processor(),
        cores=cores(),
        memory_bytes=total,
        available_bytes=available,
        gpus=_gpus(),
        free_disk_bytes=_free_disk(Path(folder)),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
    )


def cores() -> int:
    """How many this process may use: taskset or a scheduler may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def runs_at_a_time(threads: int) -> int:
    """How many runs of so many threads the cores hold; one at least."""
    return max(1, cores() // threads)


def size(count: int | None) -> str:
    """`15.6 GB`, `420 MB` or `unknown`; a GB is 1000³ bytes."""
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


@dataclass(frozen=True)
class Opening:
    """What the first cell of a chapter says: its title, the time and memory it takes, and what it needs."""

    title: str
    time: str
    memory: str
    needs: str

    @property
    def memory_bytes(self) -> float:
        """The memory as a number; 0 where the cell gives none."""
        found = re.search(r"([\d.]+)\s*(GB|MB)", self.memory)
        return float(found[1]) * (1e9 if found[2] == "GB" else 1e6) if found else 0.0

    @property
    def needs_gpu(self) -> bool:
        """Whether the chapter cannot run without a GPU."""
        return bool(re.search(r"\bGPU\b", self.needs)) and not re.search(r"\bCPU\b", self.needs)


def read_opening(source: str) -> Opening:
    """Read `# Title … Takes TIME and MEMORY. … Needs: …` of a chapter's first cell; what is not there stays empty."""
    text = " ".join(source.split())
    taken = re.search(r"Takes (.+?) and ([^.]*?[\d.]+ ?[GM]B)", text)
    needs = re.search(r"Needs: (.+?)(?:\.(?: |$)|$)", text)
    return Opening(
        title=source.strip().partition("\n")[0].lstrip("# "),
        time=taken[1] if taken else "",
        memory=taken[2] if taken else "",
        needs=needs[1] if needs else "",
    )


def what_stops(machine: Machine, opening: Opening) -> str:
    """Why the chapter cannot run here, and what to do; empty if nothing is known to stop it."""
    if opening.needs_gpu and not machine.gpus:
        return "it needs a GPU: it shows recorded runs here"
    available = machine.available_bytes
    if available is not None and available < opening.memory_bytes:
        return f"it takes {opening.memory}, {size(available)} are free: close other programs"
    return ""


def processor() -> str:
    """The processor's name, else the kind of machine."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def memory() -> tuple[int | None, int | None]:
    """(all, available) in bytes, None where unknown; a container's own limit counts where it is the smaller."""
    total = available = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        available = next(int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:")
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = int((group / "memory.current").read_text())
        kept = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= next((int(row[1]) for row in kept if row[0] == "inactive_file"), 0)  # files read, let go when asked
        free = limit - used
        total = limit if total is None else min(total, limit)
        available = free if available is None else min(available, free)
    return total, available


def _gpus() -> tuple[tuple[str, int], ...]:
    try:
        import torch

        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception:  # no PyTorch, or a driver that does not fit: any error means that no GPU can be used
        return ()
    return tuple((one.name, one.total_memory) for one in properties)


def _free_disk(folder: Path) -> int | None:
    folder = folder.absolute()
    for path in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(path).free
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
