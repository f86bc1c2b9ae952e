"""Exit codes of the commands, and the handling of exceptions."""

import errno
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from projecta.regress.errors import UsageError, missing_extra

OK, FAILED, USAGE, BROKEN, NOT_MEASURED, CRASHED, INTERRUPTED = 0, 1, 2, 3, 4, 70, 130  # docs/gate.md has all
ISSUES = "https://github.com/projecta/projecta/issues"
_WORLD = {  # what the system refuses, and what helps
    errno.EACCES: "Change its permissions.", errno.EPERM: "Change its permissions.",
    errno.EROFS: "Take a folder on another disk.", errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Free some space.", errno.EADDRINUSE: "Take another port: --port.",
}  # fmt: skip


def one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: errors that the user can mend end the command with one line and exit code 2.

    Any other exception is a crash: code 70, and the traceback in a file that the line names.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            line = _line_of(error)
            click.echo(line or _record_crash(error), err=True)
            sys.exit(USAGE if line else CRASHED)
        except KeyboardInterrupt as error:
            click.echo(": ".join(("Interrupted", *map(str, error.args))) + ".", err=True)
            sys.exit(INTERRUPTED)

    return run


def _line_of(error: Exception) -> str | None:
    """The line for an error that the user can mend; None for any other."""
    asv = sys.modules.get("asv.util")  # it may not have been imported
    if isinstance(error, UsageError) or (asv is not None and isinstance(error, asv.UserError)):
        return " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error)
    if isinstance(error, OSError) and error.errno in _WORLD:
        return (
            f"projecta: cannot use {error.filename or 'the system'}: {error.strerror}. {_WORLD[error.errno]}"
        )
    return None


def _record_crash(error: Exception) -> str:
    """Write the traceback to a file; return the line that names it."""
    with tempfile.NamedTemporaryFile("w", prefix="projecta-crash-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"projecta: crashed: {words}. The traceback is in {file.name}. Please report it: {ISSUES}"


def project_at(root: Path) -> Any:
    """The asv project of a folder; imports asv."""
    from projecta.regress.project.config import Project

    return Project(root)


machine_option = click.option(
    "--machine",
    metavar="NAME",
    help="This machine's name in the results, for example t4. Default: the host's.",
)
bench_option = click.option(
    "-b",
    "--bench",
    "regex",
    metavar="REGEX",
    help="Only benchmarks whose name matches, like 'scan.*cpu'.",
)
