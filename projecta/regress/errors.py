"""`UsageError`, the exception for everything that the user can mend. Any other exception is a crash."""

from typing import NoReturn


class UsageError(ValueError):
    """An error that the user can mend: a command prints it in one line and exits with 2."""


def cannot(do: str, reason: object, remedy: str = "") -> NoReturn:
    """Raise a UsageError about the world: what cannot be done, why, and what helps.

    >>> cannot("write the journal", "the disk is full", "Free some space.")
    Traceback (most recent call last):
    projecta.regress.errors.UsageError: projecta: cannot write the journal: the disk is full. Free some space.
    """
    words = " ".join(str(reason).split()).rstrip(".")
    raise UsageError(f"projecta: cannot {do}: {words}." + (f" {remedy}" if remedy else ""))


# The packages of the extra `gate`.
PACKAGES = ("asv", "asv_runner", "click", "jinja2", "matplotlib", "numpy", "rich", "scipy", "virtualenv")


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install for a package that cannot be imported, in one line; None if no extra has it."""
    package = (error.name or "").partition(".")[0]
    if package not in PACKAGES:
        return None
    install = 'pip install "projecta[gate]"'
    return f"projecta: cannot run: {package} is not installed. Install it with: {install}"
