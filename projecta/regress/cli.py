"""The `projecta` command. Each command imports what it needs itself: `--help` must be quick."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

OK, FAILED, USAGE, BROKEN, NOT_MEASURED, CRASHED, INTERRUPTED = 0, 1, 2, 3, 4, 70, 130
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
                "Interrupted: what was measured so far is stored; `projecta bench` goes on from there.",
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
    from rich.console import Console

    from projecta.regress import runner
    from projecta.regress.bench import measure
    from projecta.regress.journal import Journal

    console = Console()
    root = runner.find_root(Path.cwd())
    project = _project(root)
    name = runner.machine_name(machine)
    commits = runner.find_commits(root, range, project.commits(name))
    if regex is not None:
        runner.pattern(regex)
    changed = runner.uncommitted(root)
    if changed:
        shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        console.print(
            f"Not measured: uncommitted changes in {len(changed)} file(s): {shown}",
            markup=False,
            highlight=False,
        )
    wanted = runner.short_suites(root) if regex is None else regex
    if wanted is not None and regex is None:
        console.print("Left out: suites for large machines; PROJECTA_FULL=1 runs them.", highlight=False)
    runner.know_machine(name)
    with Journal(project) as journal, runner.stopped_by_sigterm():
        broken = measure(project, journal, name, commits, wanted, quick, console)
    if not quick and project.machines():
        _report(root, name, Path(RESULTS))
        console.print(_publish(project), highlight=False)
    if broken:
        click.echo(f"{broken} failed; why stands above. The others are stored.", err=True)
        sys.exit(BROKEN)


_bench = click.option("-b", "--bench", "regex", metavar="REGEX", help="Only benchmarks whose name matches.")
_budget = click.option(
    "--budget", metavar="MINUTES", type=click.FloatRange(min=0), default=9.0, show_default=True,
    help="Time to measure; building is not counted.",
)  # fmt: skip


@cli.command()
@click.argument("base")
@click.argument("head", default="HEAD")
@_machine
@_bench
@_budget
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=0.03, show_default=True,
    help="How much slower a timing may be, as a share.",
)  # fmt: skip
@click.option(
    "--memory-tolerance", type=click.FloatRange(min=0), default=0.005, show_default=True,
    help="How much larger any other metric may be.",
)  # fmt: skip
@click.option(
    "--json", "as_json", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here."
)
@click.option(
    "--markdown",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a comment for a pull request here.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the pairs here (PNG).")
@_one_line
def gate(
    base: str, head: str, machine: str | None, regex: str | None, budget: float, tolerance: float,
    memory_tolerance: float, as_json: Path | None, markdown: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Say whether HEAD is slower or hungrier than BASE.

    Exit codes: 0 PASS, 1 REGRESSED, 2 usage, 3 BROKEN, 4 NOT MEASURED, 5 INCONCLUSIVE.
    """
    from rich.console import Console

    from projecta.regress import gate as statistics
    from projecta.regress import show

    design = statistics.Design(tolerance=tolerance, memory_tolerance=memory_tolerance)
    result, _ = _contest(machine, base, head, regex, design, budget)
    Console().print(show.table(result))
    click.echo(show.sentence(result))
    if as_json:
        show.write_json(result, as_json)
    if markdown:
        markdown.write_text(show.as_markdown(result))
    if plot:
        show.draw(result, plot)
    sys.exit(statistics.EXIT_CODES[result.verdict])


@cli.command()
@_machine
@_bench
@_budget
@click.option(
    "--pairs", type=click.IntRange(min=3), default=12, show_default=True, help="Of processes to run."
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0, min_open=True), default=0.03, show_default=True,
    help="Of the gate that this is for.",
)  # fmt: skip
@_one_line
def calibrate(machine: str | None, regex: str | None, budget: float, pairs: int, tolerance: float) -> None:
    """Measure HEAD against itself: how noisy each benchmark is here, and what a gate can see of it."""
    from rich.console import Console

    from projecta.regress import gate as statistics
    from projecta.regress import show

    design = statistics.Design(tolerance=tolerance)
    result, noise = _contest(machine, "HEAD", "HEAD", regex, design, budget, pairs)
    measured = [row for row in result.rows if row.case.timed and row.case.label in noise]
    if not measured:
        click.echo("projecta calibrate: no timing was measured often enough (3 pairs).", err=True)
        sys.exit(NOT_MEASURED)
    Console().print(show.noise_table(measured, noise, result.design))


@cli.command()
@click.option("--fix", is_flag=True, help="Put right, or aside, what can be.")
@_one_line
def doctor(fix: bool) -> None:
    """Look for damaged, orphaned and doubled results. Nothing is ever deleted.

    Exit codes: 0 all is well, or was put right; 3 something is wrong.
    """
    from projecta.regress import doctor as ward
    from projecta.regress import runner

    root = runner.find_root(Path.cwd())
    found = ward.examine(_project(root), fix)
    for finding in found:
        place = finding.path.relative_to(root) if finding.path.is_relative_to(root) else finding.path
        does = "" if finding.fixable and not fix else "To do: " if not finding.fixable else "Done: "
        click.echo(f"{place}: {finding.problem}. {does}{finding.remedy[0].upper()}{finding.remedy[1:]}.")
    fixable = sum(finding.fixable for finding in found)
    if fixable and not fix:
        click.echo("`projecta doctor --fix` does so.")
        sys.exit(BROKEN)
    click.echo("No problems." if not found else f"{fixable} put right, {len(found) - fixable} left to you.")


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
    click.echo(_publish(project))


@cli.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
)
@_one_line
def preview(port: int) -> None:
    """Serve the pages on this machine, until Ctrl-C."""
    from projecta.regress import runner, site

    project = _project(runner.find_root(Path.cwd()))
    folder = project.folder / project.config.html_dir
    if not (folder / site.HISTORY).is_file():
        click.echo("projecta preview: no pages yet. Run `projecta publish` first.", err=True)
        sys.exit(NOT_MEASURED)
    with site.serve(folder, port) as server:
        click.echo(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)")
        server.serve_forever()


@cli.command()
@click.option("--gpu", is_flag=True, help="Refuse a machine without a GPU.")
@click.option(
    "--load", type=click.FloatRange(min=0), metavar="SHARE",
    help="Most runnable processes per processor.",
)  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0), metavar="C", help="Most that a GPU may have.")
@click.option(
    "--free", type=click.FloatRange(min=0, max=1), metavar="SHARE", help="Least free share of GPU memory."
)
@click.option("--disk", type=click.FloatRange(min=0), metavar="GIB", help="Least free room on the disk.")
@click.option(
    "--wait", metavar="SECONDS", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Time for the machine to cool down, or to come free.",
)  # fmt: skip
@click.option(
    "--json", "as_json", type=click.Path(dir_okay=False, path_type=Path), help="Write what was found here."
)
@_one_line
def preflight(gpu: bool, wait: float, as_json: Path | None, **limits: float | None) -> None:
    """Say whether this machine is fit to measure on, and lock the GPU's clocks if that is permitted.

    Exit codes: 0 it is; 3 it is not: busy, hot, or short of memory or disk.
    """
    from projecta.regress import preflight as pilot

    wanted = pilot.Limits(**{name: value for name, value in limits.items() if value is not None})
    found, problems = pilot.examine(Path.cwd(), wanted, gpu, wait)
    click.echo("\n".join(found.lines()))
    if as_json:
        pilot.write_json(found, problems, as_json)
    if problems:
        click.echo("\n".join(problems), err=True)
        sys.exit(BROKEN)


_remote = click.option(
    "--remote", default="origin", show_default=True, help="Name or address of the repository with the branch."
)
_branch = click.option("--branch", default="results", show_default=True, help="Where the results are.")


@cli.command()
@_machine
@_remote
@_branch
@click.option(
    "--base", "base_file", type=click.Path(dir_okay=False, path_type=Path),
    help="Write here which commit a gate of HEAD compares with: the newest one measured before it.",
)  # fmt: skip
@_one_line
def fetch(machine: str | None, remote: str, branch: str, base_file: Path | None) -> None:
    """Bring the results that all machines have kept into this folder's."""
    from projecta.regress import branch as shelf
    from projecta.regress import runner

    root = runner.find_root(Path.cwd())
    project, name = _project(root), runner.machine_name(machine)
    changed = shelf.fetch(project, name, shelf.Remote(root, remote, branch))
    click.echo(f"{len(changed)} file(s) of results are new here.")
    if base_file:
        base_file.parent.mkdir(parents=True, exist_ok=True)
        base_file.write_text(shelf.base_of(project, name) + "\n")


@cli.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@_machine
@_remote
@_branch
@_one_line
def keep(folders: tuple[Path, ...], machine: str | None, remote: str, branch: str) -> None:
    """Commit results to their branch and push it; what is there already stays.

    FOLDERS are laid out as asv's results are, and hold what machines bring. Without any: this machine's own
    results. PROJECTA_TOKEN may hold what a remote wants to know.
    """
    from projecta.regress import branch as shelf
    from projecta.regress import runner

    root = runner.find_root(Path.cwd())
    project = _project(root)
    name = runner.machine_name(machine) if machine is not None or not folders else None
    sources = [(folder, name) for folder in folders or (project.results,)]
    commit, count = shelf.keep(project, sources, shelf.Remote(root, remote, branch))
    if not count:
        click.echo(f"projecta keep: no results of {name or 'any machine'} yet: nothing to keep.", err=True)
        sys.exit(NOT_MEASURED)
    click.echo(f"{count} file(s) are on branch {branch}, commit {commit[:8]}.")


def _contest(
    machine: str | None, base: str, head: str, regex: str | None, design: Any, budget: float,
    pairs: int | None = None,
) -> tuple[Any, dict[str, tuple[str, float, int]]]:  # fmt: skip
    """What base and head gave against each other, and the noise that is known of this machine."""
    from rich.console import Console

    from projecta.regress import runner, show
    from projecta.regress.builds import Build, BuildFailed
    from projecta.regress.contest import contest
    from projecta.regress.journal import Journal

    console = Console(stderr=True)
    root = runner.find_root(Path.cwd())
    project = _project(root)
    name = runner.machine_name(machine)
    before, after = (runner.find_commit(root, word) for word in (base, head))
    pattern = runner.gate_pattern(root) if regex is None else runner.pattern(regex)
    with Journal(project) as journal, runner.stopped_by_sigterm():
        try:
            result = contest(
                {"base": Build(project, before, "base"), "head": Build(project, after)}, pattern, design,
                60 * budget, journal, name, lambda line: console.print(line, markup=False, highlight=False),
                pairs,
            )  # fmt: skip
        except BuildFailed as error:
            click.echo(f"BROKEN: {error}", err=True)
            sys.exit(BROKEN)
        if pairs is None and regex is None:  # the project's own gate: its verdict stands on the site
            (project.results / name).mkdir(parents=True, exist_ok=True)
            show.write_json(result, project.results / name / show.LAST)
        return result, journal.noise(name)


def _publish(project: Any) -> str:
    """Write the site; where it is."""
    from projecta.regress import site

    site.publish(project, project.folder / RESULTS)
    return f"Pages: {project.config.html_dir}/index.html (served by `projecta preview`)"


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
    try:
        cli(prog_name="projecta")
    except Exception:  # 1 would say REGRESSED
        import traceback

        traceback.print_exc()
        sys.exit(CRASHED)


if __name__ == "__main__":
    main()
