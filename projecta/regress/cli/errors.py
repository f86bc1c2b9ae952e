"""What every command shares: exit codes, the option for the machine, and how a user's mistake is told."""

import errno
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from projecta.regress.project.config import Project

OK, FAILED, USAGE, BROKEN, NOT_MEASURED, CRASHED, INTERRUPTED = 0, 1, 2, 3, 4, 70, 130  # docs/gate.md has all
RESULTS = "results"
machine_option = click.option(
    "--machine", metavar="NAME", help="Name of this machine in the results; the host's by default."
)


def one_line(command: Callable[..., None]) -> Callable[..., None]:
    """What a user can put right is told in one line; any other error is a crash, with its traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            said = _one_line_of(error)
            if said is None:
                raise
            click.echo(said, err=True)
            sys.exit(USAGE)
        except KeyboardInterrupt as error:
            click.echo(": ".join(("Interrupted", *map(str, error.args))) + ".", err=True)
            sys.exit(INTERRUPTED)

    return run


_WORLD = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EADDRINUSE)


def _one_line_of(error: Exception) -> str | None:
    """What to tell of an error that a user can put right: ours, asv's, or the system's."""
    asv = sys.modules.get("asv.util")  # it may not have been imported
    if getattr(error, "told", False) or (asv is not None and isinstance(error, asv.UserError)):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _WORLD:
        return f"projecta: {error.filename or 'the system'} must be free and writable; got {error.strerror}."
    return None


def project_at(root: Path) -> Any:
    """The asv project there; asv is imported only now."""

    return Project(root)
