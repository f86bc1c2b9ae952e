"""The `projecta` command. Each command imports what it needs itself: `--help` must be quick."""

import click

from projecta.regress.cli.machine import preflight, pull, push
from projecta.regress.cli.measure import bench, calibrate, gate
from projecta.regress.cli.results import doctor, preview, publish, report


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="projecta")
def cli() -> None:
    """Measure the commits of an asv project, judge changes, and show the history.

    Example: projecta gate main HEAD
    """


for command in (bench, gate, calibrate, report, publish, preview, doctor, preflight, pull, push):
    cli.add_command(command)


def main() -> None:
    cli(prog_name="projecta")
