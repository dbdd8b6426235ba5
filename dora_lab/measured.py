"""The file of a measurement: whole at its end, and until then a partial one beside it, from which it goes on."""

import json
from collections.abc import Callable
from pathlib import Path

from dora_lab.files import prepare_file, write_text


def write_measured(measure: Callable[[Path], dict], out: Path) -> None:
    """Write what `measure(partial)` returns to `out`. partial: where it keeps its finished rows until then.

    Raises OSError, before anything is measured, if `out` cannot be written.
    """
    prepare_file(out)
    partial = out.with_suffix(".partial")
    write(measure(partial), out)
    partial.unlink(missing_ok=True)


def finished_rows(partial: Path | None, now: dict) -> list[dict]:
    """Rows of an interrupted measurement that was made as this one is: all but the rows and the date is the same."""
    try:
        before = json.loads(partial.read_text()) if partial else {}
        return before["rows"] if _terms(before) == _terms(now) else []
    except (OSError, json.JSONDecodeError, KeyError):
        return []


def write(found: dict, path: Path) -> None:
    """Write a measurement as JSON, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")


def _terms(found: dict) -> dict:
    return {**found, "rows": None, "environment": {**found["environment"], "date": None}}
