"""How a command ends that cannot go on: what was wrong and exit status 2; interrupted, 128 + the signal's number."""

import contextlib
import signal
from collections.abc import Iterator

import typer

from dora_lab.children import Terminated


@contextlib.contextmanager
def told(*errors: type[Exception], kept: str | None = None) -> Iterator[None]:
    """Say a ValueError, an OSError or one of `errors` in one line, and end the command.

    kept: what a command keeps that is interrupted, where the same command goes on from there, or ended by one of
    `errors`.
    """
    try:
        yield
    except (ValueError, OSError, *errors) as error:
        typer.echo(f"error: {error}", err=True)
        if kept and isinstance(error, errors):
            typer.echo(kept, err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        if kept is None:
            raise
        typer.echo(f"interrupted: {kept}; the same command goes on from here", err=True)
        raise typer.Exit(128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT)) from None
