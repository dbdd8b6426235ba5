"""How a command ends that cannot go on: what was wrong in one line and exit status 2; interrupted, 130."""

import contextlib
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def told(*errors: type[Exception], kept: str | None = None) -> Iterator[None]:
    """Say a ValueError, an OSError or one of `errors` in one line, and end the command.

    kept: what an interrupted command keeps, where the same command goes on from there.
    """
    try:
        yield
    except (ValueError, OSError, *errors) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        if kept is None:
            raise
        typer.echo(f"interrupted: {kept}; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
