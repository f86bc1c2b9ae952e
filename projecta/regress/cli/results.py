"""Commands that look at results: report, publish, preview, doctor."""

import sys
from pathlib import Path
from typing import Any

import click

from projecta._checks import fail
from projecta.regress.cli.errors import BROKEN, NOT_MEASURED, RESULTS, machine_option, one_line, project_at


@click.command()
@machine_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(RESULTS),
    show_default=True,
    help="Folder to write.",
)
@one_line
def report(machine: str | None, out: Path) -> None:
    """Write CSV tables and plots of the newest commit measured, and print the tables."""
    from projecta.regress.project.config import find_root

    write_report(find_root(Path.cwd()), machine, out)


@click.command()
@one_line
def publish() -> None:
    """Write the pages with the historical charts."""
    from projecta.regress.project.config import find_root
    from projecta.regress.store.results import list_machines

    root = find_root(Path.cwd())
    project = project_at(root)
    if not list_machines(project):
        click.echo("projecta publish: no results yet. Run `projecta bench` first.", err=True)
        sys.exit(NOT_MEASURED)
    click.echo(write_pages(project))


@click.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
)
@one_line
def preview(port: int) -> None:
    """Serve the pages on this machine, until Ctrl-C."""
    from projecta.regress.project.config import find_root
    from projecta.regress.site.publish import HISTORY, serve

    project = project_at(find_root(Path.cwd()))
    folder = project.folder / project.config.html_dir
    if not (folder / HISTORY).is_file():
        click.echo("projecta preview: no pages yet. Run `projecta publish` first.", err=True)
        sys.exit(NOT_MEASURED)
    with serve(folder, port) as server:
        click.echo(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)")
        server.serve_forever()


@click.command()
@click.option("--fix", is_flag=True, help="Put right, or aside, what can be.")
@one_line
def doctor(fix: bool) -> None:
    """Look for damaged, orphaned and doubled results. Nothing is ever deleted.

    Exit codes: 0 all is well, or was put right; 3 something is wrong.
    """
    from projecta.regress.project.config import find_root
    from projecta.regress.store.doctor import examine_results

    root = find_root(Path.cwd())
    found = examine_results(project_at(root), fix)
    for finding in found:
        place = finding.path.relative_to(root) if finding.path.is_relative_to(root) else finding.path
        does = "" if finding.fixable and not fix else "To do: " if not finding.fixable else "Done: "
        click.echo(f"{place}: {finding.problem}. {does}{finding.remedy[0].upper()}{finding.remedy[1:]}.")
    fixable = sum(finding.fixable for finding in found)
    if fixable and not fix:
        click.echo("`projecta doctor --fix` does so.")
        sys.exit(BROKEN)
    click.echo("No problems." if not found else f"{fixable} put right, {len(found) - fixable} left to you.")


def write_pages(project: Any) -> str:
    """Write the site; return where it is."""
    from projecta.regress.site.publish import publish as write_site

    write_site(project, project.folder / RESULTS)
    return f"Pages: {project.config.html_dir}/index.html (served by `projecta preview`)"


def write_report(root: Path, machine: str | None, out: Path) -> None:
    """Write the tables and plots of the newest commit, and print the tables."""
    from projecta.regress.project.git import list_history
    from projecta.regress.site import tables
    from projecta.regress.store.results import list_machines, read_measurements

    project = project_at(root)
    machines = list_machines(project)
    if machine is not None and machine not in machines:
        rule = f"be one of {', '.join(machines) or 'none yet'}"
        fail("projecta report", "--machine", rule, repr(machine))
    found = list(read_measurements(project, machine or machines[0])) if machines else []
    newest = tables.newest_commit(found, list_history(project.repository))
    if not newest:
        click.echo("projecta report: no results yet. Run `projecta bench` first.", err=True)
        sys.exit(NOT_MEASURED)
    click.echo(f"\nMachine {newest[0].machine}, commit {newest[0].commit[:8]}\n\n{tables.summary(newest)}\n")
    for path in tables.write_report(newest, root / out):
        click.echo(f"Wrote {path.relative_to(root) if path.is_relative_to(root) else path}")
