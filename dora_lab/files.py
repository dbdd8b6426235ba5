"""Text files that are whole or not there, rows of JSON lines, and folders that can be written."""

import contextlib
import errno
import hashlib
import json
import os
import socket
from pathlib import Path


def prepare_folder(folder: Path, instead: str = "another folder as runs_dir") -> None:
    """Make the folder and see that it can be written. Raises OSError naming the path and what to give instead."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write to {folder} ({error.strerror}): free space there, or give {instead}"
        ) from error


def prepare_file(path: Path, instead: str = "another file as OUT") -> None:
    """See, before long work, that the file can be written at its end; makes its folder. Raises as `prepare_folder`."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"cannot write {path} (it is a folder): give {instead}")
    prepare_folder(path.parent, instead)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write by rename: the file is whole or not there, whoever else writes it at the same time.

    Raises OSError naming the path, with nothing else touched.
    """
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, f"cannot write {path} ({error.strerror}): free space there and run again") from error


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines, by rename."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict]:
    """Rows of a JSON lines file. Raises ValueError naming the file and line of a broken row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is damaged: delete {path.parent} and run again") from error
    return rows
