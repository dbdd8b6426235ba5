"""Checkpoints that are whole or not used: the hash of every file is written last and checked before one is loaded."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dora_lab.files import sha256_of, write_text

SEAL = "whole.json"  # written last into a checkpoint: the hash of each of its files


def checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def seal(checkpoint: Path) -> None:
    """Write the hashes of all that lies in the checkpoint; from then on it is whole."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(checkpoint)): sha256_of(path) for path in files}
    write_text(checkpoint / SEAL, json.dumps(hashes, indent=1) + "\n")


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were sealed; what is damaged or half-written is deleted."""
    for checkpoint in checkpoints(folder):
        with contextlib.suppress(OSError, ValueError):  # no seal, or half of one
            hashes = json.loads((checkpoint / SEAL).read_text())
            if all(sha256_of(checkpoint / name) == digest for name, digest in hashes.items()):
                return checkpoint
        shutil.rmtree(checkpoint)
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever a writer raises for want of space or permission becomes an OSError that names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        raise OSError(
            f"cannot write {path} ({error}): free space there and run again; whole checkpoints stay"
        ) from error
