"""The `projecta` command. Each command imports what it needs itself: `--help` must be quick."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

OK, FAILED, USAGE, BROKEN, NOT_MEASURED, INTERRUPTED = 0, 1, 2, 3, 4, 130
RESULTS = "results"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="projecta")
def cli() -> None:
    """Measure commits, and look at what was measured."""


def _one_line(command: Callable[..., None]) -> Callable[..., None]:
    """What a user did wrong is told in one line."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError) as error:
            click.echo(error, err=True)
            sys.exit(USAGE)
        except KeyboardInterrupt:
            click.echo(
                "Interrupted: the commits measured so far are stored; the same command goes on from there.",
                err=True,
            )
            sys.exit(INTERRUPTED)

    return run


_machine = click.option(
    "--machine", metavar="NAME", help="Name of this machine in the results; the host's by default."
)


@cli.command()
@click.argument("range", required=False, metavar="[RANGE]")
@_machine
@click.option("-b", "--bench", "regex", metavar="REGEX", help="Only benchmarks whose name matches.")
@click.option(
    "--quick", is_flag=True, help="Run each benchmark once, to see that it works; nothing is stored."
)
@_one_line
def bench(range: str | None, machine: str | None, regex: str | None, quick: bool) -> None:
    """Measure commits, write the pages and the report.

    RANGE is a commit, a range A..B, or NEW (every commit without results); HEAD and the commit before it by
    default. What has a result already is not measured again.
    """
    import os
    import re

    from rich.console import Console

    from projecta.regress import runner

    console = Console()
    root = runner.find_root(Path.cwd())
    project = _project(root)
    name = runner.machine_name(machine)
    commits = runner.find_commits(root, range)
    if regex is not None:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(
                f"projecta bench: --bench must be a regular expression; got {regex!r}: {error}."
            ) from None
    changed = runner.uncommitted(root)
    if changed:
        shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        console.print(
            f"Not measured: uncommitted changes in {len(changed)} file(s): {shown}",
            markup=False,
            highlight=False,
        )
    if regex is None and os.environ.get("PROJECTA_FULL") != "1":
        console.print(
            "Left out: the suites named Full..., for large machines; PROJECTA_FULL=1 runs them.",
            highlight=False,
        )
    code = runner.measure(root, name, commits, regex, quick, console)
    if code not in (0, 2):
        raise ValueError(
            f"projecta bench: asv run must succeed; got exit code {code}. Its last lines stand above."
        )
    if not quick:
        runner.publish(root)
        console.print(
            f"Pages: {project.config.html_dir}/index.html (served by `asv preview`)", highlight=False
        )
        _report(root, name, Path(RESULTS))
    if code == 2:
        click.echo("Some benchmarks failed; what they printed stands above. The others are stored.", err=True)
        sys.exit(BROKEN)


@cli.command()
@_machine
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(RESULTS),
    show_default=True,
    help="Folder to write.",
)
@_one_line
def report(machine: str | None, out: Path) -> None:
    """Write CSV tables and plots of the newest commit measured, and print the tables."""
    from projecta.regress import runner

    _report(runner.find_root(Path.cwd()), machine, out)


@cli.command()
@_one_line
def publish() -> None:
    """Write the pages with the historical charts."""
    from projecta.regress import runner

    root = runner.find_root(Path.cwd())
    project = _project(root)
    if not project.machines():
        click.echo("projecta publish: no results yet. Run `projecta bench` first.", err=True)
        sys.exit(NOT_MEASURED)
    runner.publish(root)
    click.echo(f"Pages: {project.config.html_dir}/index.html (served by `asv preview`)")


def _project(root: Path) -> Any:
    from projecta.regress.store import Project

    return Project(root)


def _report(root: Path, machine: str | None, out: Path) -> None:
    from projecta.regress import report as tables
    from projecta.regress import runner

    project = _project(root)
    machines = project.machines()
    if machine is not None and machine not in machines:
        raise ValueError(
            f"projecta report: --machine must be one of {', '.join(machines) or 'none yet'}; got {machine!r}."
        )
    found = list(project.measurements(machine or machines[0])) if machines else []
    newest = tables.newest_commit(found, runner.history(root))
    if not newest:
        click.echo("projecta report: no results yet. Run `projecta bench` first.", err=True)
        sys.exit(NOT_MEASURED)
    click.echo(f"\nMachine {newest[0].machine}, commit {newest[0].commit[:8]}\n\n{tables.summary(newest)}\n")
    for path in tables.write_report(newest, root / out):
        click.echo(f"Wrote {path.relative_to(root) if path.is_relative_to(root) else path}")


def main() -> None:
    cli(prog_name="projecta")


if __name__ == "__main__":
    main()
