"""Commands that show results: report, publish, preview, doctor."""

import sys
from pathlib import Path
from typing import Any

import click

from projecta._checks import fail
from projecta.regress.cli.errors import BROKEN, NOT_MEASURED, machine_option, one_line, project_at
from projecta.regress.errors import UsageError


@click.command()
@machine_option
@click.option(
    "--into", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
    help="Folder to write, for example results. Default: report, beside asv's results.",
)  # fmt: skip
@one_line
def report(machine: str | None, into: Path | None) -> None:
    """Print the tables of the newest commit measured, and write them as CSV and PNG.

    Example: projecta report --into results
    """
    from projecta.regress.project.config import find_root

    project = project_at(find_root(Path.cwd()))
    write_report(project, machine, into)


@click.command()
@one_line
def publish() -> None:
    """Write the pages: verdict, change points, tables and charts.

    Example: projecta publish && projecta preview
    """
    from projecta.regress.project.config import find_root
    from projecta.regress.store.results import list_machines

    project = project_at(find_root(Path.cwd()))
    if not list_machines(project):
        click.echo("projecta: cannot write the pages: no results yet. Run `projecta bench` first.", err=True)
        sys.exit(NOT_MEASURED)
    click.echo(write_pages(project))


@click.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
)
@one_line
def preview(port: int) -> None:
    """Serve the pages on this machine, until Ctrl-C.

    Example: projecta preview --port 8000
    """
    from projecta.regress.project.config import find_root
    from projecta.regress.site.publish import HISTORY, serve

    project = project_at(find_root(Path.cwd()))
    folder = project.folder / project.config.html_dir
    if not (folder / HISTORY).is_file():
        click.echo(
            "projecta: cannot serve the pages: there are none. Run `projecta publish` first.", err=True
        )
        sys.exit(NOT_MEASURED)
    with serve(folder, port) as server:
        click.echo(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)")
        server.serve_forever()


@click.command()
@click.option("--fix", is_flag=True, help="Repair what can be repaired, and set aside what cannot be read.")
@one_line
def doctor(fix: bool) -> None:
    """Look for damaged, orphaned and doubled results. Nothing is ever deleted.

    Exit codes: 0 no problem, or all repaired; 3 problems.

    Example: projecta doctor --fix
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
    click.echo("No problems." if not found else f"{fixable} repaired, {len(found) - fixable} left to you.")


def write_pages(project: Any) -> str:
    """Write the site; return where it is."""
    from projecta.regress.site.publish import publish as write_site

    write_site(project)
    return f"Pages: {project.config.html_dir}/index.html (`projecta preview` serves them)"


def write_report(project: Any, machine: str | None, into: Path | None = None) -> None:
    """Write the tables and charts of the newest commit, and print the tables."""
    from projecta.regress.project.git import list_history
    from projecta.regress.site import tables
    from projecta.regress.store.results import list_machines, read_measurements

    machines, root = list_machines(project), project.folder
    if machine is not None and machine not in machines:
        rule = f"be one of {', '.join(machines) or 'none yet'}"
        fail("projecta report", "--machine", rule, repr(machine), error=UsageError)
    found = list(read_measurements(project, machine or machines[0])) if machines else []
    newest = tables.newest_commit(found, list_history(project.repository))
    if not newest:
        click.echo("projecta: cannot report: no results yet. Run `projecta bench` first.", err=True)
        sys.exit(NOT_MEASURED)
    source, sections = tables.Source(newest, root), tables.load_sections(root)
    click.echo(f"\nMachine {newest[0].machine}, commit {newest[0].commit[:8]}\n")
    for title, rows in tables.summaries(source, sections):
        click.echo(f"{title}\n\n{tables.markdown(rows)}\n")
    folder = project.report if into is None else root / into
    if into is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
    written = tables.write_report(source, sections, folder)
    if written:
        shown = folder.relative_to(root) if folder.is_relative_to(root) else folder
        click.echo(f"Wrote {len(written)} tables and charts into {shown}")
