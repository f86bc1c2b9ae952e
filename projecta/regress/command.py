"""What every command shares: exit codes, the option for the machine, and how a user's mistake is told."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

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
            if not getattr(error, "told", False) and not _is_asvs(error):
                raise
            click.echo(" ".join(str(error).split()), err=True)
            sys.exit(USAGE)
        except KeyboardInterrupt as error:
            click.echo(": ".join(("Interrupted", *map(str, error.args))) + ".", err=True)
            sys.exit(INTERRUPTED)

    return run


def _is_asvs(error: Exception) -> bool:
    """Whether asv says of a file or an argument that it is wrong. (asv may not have been imported.)"""
    asv = sys.modules.get("asv.util")
    return asv is not None and isinstance(error, asv.UserError)


def project_at(root: Path) -> Any:
    """The asv project there; asv is imported only now."""
    from projecta.regress.store import Project

    return Project(root)
