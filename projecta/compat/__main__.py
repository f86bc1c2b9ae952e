"""`python -m projecta.compat script.py ARGUMENTS`: run a script that imports mamba_ssm or causal_conv1d."""

import runpy
import sys
from pathlib import Path

from projecta import compat


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    sys.argv = sys.argv[1:]
    script = Path(sys.argv[0])
    if not script.is_file():
        sys.exit(f"projecta.compat: there is no file {script}.")
    sys.path[0] = str(script.resolve().parent)
    compat.install()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
