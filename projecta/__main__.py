"""The command `projecta`. If a package is missing, it names the extra to install."""

import sys

from projecta.regress.errors import missing_extra

USAGE = 2


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
