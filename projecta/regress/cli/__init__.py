"""The `projecta` command. Each command imports what it needs itself: `--help` must be quick."""

import sys

import click

from projecta.regress.cli.errors import CRASHED
from projecta.regress.cli.machine import fetch, keep, preflight
from projecta.regress.cli.measure import bench, calibrate, gate
from projecta.regress.cli.results import doctor, preview, publish, report


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="projecta")
def cli() -> None:
    """Measure commits, and look at what was measured."""


for command in (bench, gate, calibrate, report, publish, preview, doctor, preflight, fetch, keep):
    cli.add_command(command)


def main() -> None:
    try:
        cli(prog_name="projecta")
    except Exception:  # 1 would say REGRESSED
        import traceback

        traceback.print_exc()
        sys.exit(CRASHED)
