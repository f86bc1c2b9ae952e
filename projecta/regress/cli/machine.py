"""Commands for a machine that measures: preflight, and results pulled from and pushed to their branch."""

import sys
from pathlib import Path

import click

from projecta.regress.cli.errors import BROKEN, NOT_MEASURED, machine_option, one_line, project_at


@click.command()
@click.option("--gpu", is_flag=True, help="Refuse a machine without a GPU.")
@click.option("--lock", is_flag=True, help="Lock the GPU's clock, if that is permitted.")
@click.option(
    "--load", type=click.FloatRange(min=0), metavar="SHARE",
    help="Highest load: runnable processes per processor.",
)  # fmt: skip
@click.option(
    "--temperature", type=click.FloatRange(min=0), metavar="C", help="Highest temperature of a GPU."
)
@click.option(
    "--free", type=click.FloatRange(min=0, max=1), metavar="SHARE", help="Lowest free share of GPU memory."
)
@click.option("--disk", type=click.FloatRange(min=0), metavar="GIB", help="Lowest free space on the disk.")
@click.option(
    "--wait", metavar="SECONDS", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Time for the machine to cool down, or to become free.",
)  # fmt: skip
@click.option(
    "--json",
    "as_json",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the findings to this file.",
)
@one_line
def preflight(gpu: bool, lock: bool, wait: float, as_json: Path | None, **limits: float | None) -> None:
    """Say whether this machine is fit to measure on.

    Exit codes: 0 it is; 3 it is busy, hot, or short of memory or disk.

    Example: projecta preflight --gpu --wait 300
    """
    from projecta.regress.project import preflight as checks

    wanted = checks.Limits(**{name: value for name, value in limits.items() if value is not None})
    found, problems = checks.examine_machine(Path.cwd(), wanted, gpu, lock, wait)
    click.echo("\n".join(found.lines()))
    if as_json:
        checks.write_json(found, problems, as_json)
    if problems:
        click.echo("\n".join(problems), err=True)
        sys.exit(BROKEN)


_remote = click.option(
    "--remote", default="origin", show_default=True, help="Name or address of the repository with the branch."
)
_branch = click.option("--branch", default="results", show_default=True, help="Branch of the results.")


@click.command()
@machine_option
@_remote
@_branch
@click.option(
    "--base", "base_file", type=click.Path(dir_okay=False, path_type=Path),
    help="Write the commit that a gate of HEAD compares with: the newest one measured before it.",
)  # fmt: skip
@one_line
def pull(machine: str | None, remote: str, branch: str, base_file: Path | None) -> None:
    """Fetch the results of all machines from their branch, into this project's results.

    Example: projecta pull --base .asv/base
    """
    from projecta.regress.project.config import find_root
    from projecta.regress.project.machine import machine_name
    from projecta.regress.store import branch as results_branch

    root = find_root(Path.cwd())
    project, name = project_at(root), machine_name(machine)
    changed = results_branch.pull(project, name, results_branch.Remote(root, remote, branch))
    click.echo(f"Fetched {len(changed)} new file(s) of results.")
    if base_file:
        base_file.parent.mkdir(parents=True, exist_ok=True)
        base_file.write_text(results_branch.base_of(project, name) + "\n")


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@machine_option
@_remote
@_branch
@one_line
def push(folders: tuple[Path, ...], machine: str | None, remote: str, branch: str) -> None:
    """Commit results to their branch and push it. What is on the branch stays.

    FOLDERS are laid out as asv's results are, one folder for each machine. Default: this machine's own
    results. The variable PROJECTA_TOKEN may hold a token for the remote.

    Example: projecta push --machine t4
    """
    from projecta.regress.project.config import find_root
    from projecta.regress.project.machine import machine_name
    from projecta.regress.store import branch as results_branch

    root = find_root(Path.cwd())
    project = project_at(root)
    name = machine_name(machine) if machine is not None or not folders else None
    sources = [(folder, name) for folder in folders or (project.results,)]
    commit, count = results_branch.push(project, sources, results_branch.Remote(root, remote, branch))
    if not count:
        click.echo(f"projecta: cannot push: no results of {name or 'any machine'} yet.", err=True)
        sys.exit(NOT_MEASURED)
    click.echo(f"{count} file(s) are on branch {branch}, commit {commit[:8]}.")
