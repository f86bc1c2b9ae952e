"""The command `projecta`; it names the extra to install where a package is missing."""

import sys

USAGE = 2
PACKAGES = (
    "asv",
    "asv_runner",
    "click",
    "jinja2",
    "matplotlib",
    "numpy",
    "rich",
    "scipy",
    "virtualenv",
)  # of `gate`


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install for a package that cannot be imported, in one line; None if no extra has it."""
    package = (error.name or "").partition(".")[0]
    if package not in PACKAGES:
        return None
    return f'projecta: cannot run: {package} is not installed. Install it with: pip install "projecta[gate]"'


def main() -> None:
    try:
        from projecta.regress.cli import main as run
    except ModuleNotFoundError as error:
        line = missing_extra(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        sys.exit(USAGE)
    run()


if __name__ == "__main__":
    main()
