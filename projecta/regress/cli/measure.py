"""The `projecta` command. Each command imports what it needs itself: `--help` must be quick."""

import sys
from pathlib import Path
from typing import Any

import click

from projecta._checks import fail
from projecta.regress.command import (
    BROKEN,
    CRASHED,
    NOT_MEASURED,
    RESULTS,
    machine_option,
    one_line,
    project_at,
)
from projecta.regress.command_runner import fetch, keep, preflight


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="projecta")
def cli() -> None:
    """Measure commits, and look at what was measured."""


@cli.command()
@click.argument("range", required=False, metavar="[RANGE]")
@machine_option
@click.option("-b", "--bench", "regex", metavar="REGEX", help="Only benchmarks whose name matches.")
@click.option(
    "--quick", is_flag=True, help="Run each benchmark once, to see that it works; nothing is stored."
)
@one_line
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
    project = project_at(root)
    name = runner.machine_name(machine)
    commits = runner.find_commits(project.repository, range, project.commits(name))
    if regex is not None:
        runner.pattern(regex)
    changed = (
        runner.uncommitted(root) if project.inside or project.repository == project.folder.resolve() else []
    )
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
    try:
        with Journal(project) as journal, runner.stopped_by_sigterm():
            broken = measure(project, journal, name, commits, wanted, quick, console)
        if not quick and _has_values(project):
            _report(root, name, Path(RESULTS))
            console.print(_publish(project), highlight=False)
    except KeyboardInterrupt:
        if quick:
            raise
        raise KeyboardInterrupt(
            "what was measured so far is stored; `projecta bench` goes on from there"
        ) from None
    if broken:
        others = " The others are stored." if not quick and _has_values(project) else ""
        click.echo(f"{broken} failed; why stands above.{others}", err=True)
        sys.exit(BROKEN)


def _has_values(project: Any) -> bool:
    """Whether anything was measured on any machine: tables and pages can be made of it."""
    return any(m.measured for machine in project.machines() for m in project.measurements(machine))


_bench = click.option("-b", "--bench", "regex", metavar="REGEX", help="Only benchmarks whose name matches.")
_budget = click.option(
    "--budget", metavar="MINUTES", type=click.FloatRange(min=0), default=9.0, show_default=True,
    help="Time to measure; building is not counted.",
)  # fmt: skip


@cli.command()
@click.argument("base")
@click.argument("head", default="HEAD")
@machine_option
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
@one_line
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
@machine_option
@_bench
@_budget
@click.option(
    "--pairs", type=click.IntRange(min=3), default=12, show_default=True, help="Of processes to run."
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0, min_open=True), default=0.03, show_default=True,
    help="Of the gate that this is for.",
)  # fmt: skip
@one_line
def calibrate(machine: str | None, regex: str | None, budget: float, pairs: int, tolerance: float) -> None:
    """Measure HEAD against itself: how noisy each benchmark is here, and what a gate can see of it."""
    from rich.console import Console

    from projecta.regress import gate as statistics
    from projecta.regress import show

    design = statistics.Design(tolerance=tolerance)
    result, noise = _contest(machine, "HEAD", "HEAD", regex, design, budget, pairs)
    measured = [row for row in result.rows if row.case.timed and row.label in noise]
    broken = [row for row in result.rows if row.verdict == statistics.BROKEN]
    for row in broken:
        click.echo(f"BROKEN: {row.label}: {row.judgement.reason}", err=True)
    if not measured and not broken:
        click.echo("projecta calibrate: no timing was measured often enough (3 pairs).", err=True)
        sys.exit(NOT_MEASURED)
    if measured:
        Console().print(show.noise_table(measured, noise, result.design))
    if broken:
        sys.exit(BROKEN)


@cli.command()
@click.option("--fix", is_flag=True, help="Put right, or aside, what can be.")
@one_line
def doctor(fix: bool) -> None:
    """Look for damaged, orphaned and doubled results. Nothing is ever deleted.

    Exit codes: 0 all is well, or was put right; 3 something is wrong.
    """
    from projecta.regress import doctor as ward
    from projecta.regress import runner

    root = runner.find_root(Path.cwd())
    found = ward.examine(project_at(root), fix)
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
    from projecta.regress import runner

    _report(runner.find_root(Path.cwd()), machine, out)


@cli.command()
@one_line
def publish() -> None:
    """Write the pages with the historical charts."""
    from projecta.regress import runner

    root = runner.find_root(Path.cwd())
    project = project_at(root)
    if not project.machines():
        click.echo("projecta publish: no results yet. Run `projecta bench` first.", err=True)
        sys.exit(NOT_MEASURED)
    click.echo(_publish(project))


@cli.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
)
@one_line
def preview(port: int) -> None:
    """Serve the pages on this machine, until Ctrl-C."""
    from projecta.regress import runner, site

    project = project_at(runner.find_root(Path.cwd()))
    folder = project.folder / project.config.html_dir
    if not (folder / site.HISTORY).is_file():
        click.echo("projecta preview: no pages yet. Run `projecta publish` first.", err=True)
        sys.exit(NOT_MEASURED)
    with site.serve(folder, port) as server:
        click.echo(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)")
        server.serve_forever()


def _contest(
    machine: str | None, base: str, head: str, regex: str | None, design: Any, budget: float,
    pairs: int | None = None,
) -> tuple[Any, dict[str, tuple[str, float, int]]]:  # fmt: skip
    """What base and head gave against each other, and the noise that is known of this machine."""
    from dataclasses import replace

    from rich.console import Console

    from projecta.regress import runner, show
    from projecta.regress.builds import Build, BuildFailed, environment_labels
    from projecta.regress.contest import contest, joined
    from projecta.regress.journal import Journal

    console = Console(stderr=True)
    root = runner.find_root(Path.cwd())
    project = project_at(root)
    name = runner.machine_name(machine)
    before, after = (runner.find_commit(project.repository, word) for word in (base, head))
    pattern = runner.gate_pattern(root) if regex is None else runner.pattern(regex)
    with Journal(project) as journal, runner.stopped_by_sigterm():
        labels, results = environment_labels(project), []
        try:
            for i, label in enumerate(labels):  # they share the time and the rate of error
                if label:
                    console.print(
                        f"environment {i + 1} of {len(labels)}: {label}", markup=False, highlight=False
                    )
                builds = {
                    "base": Build(project, before, "base", which=i), "head": Build(project, after, which=i)
                }  # fmt: skip
                results.append(contest(
                    builds, pattern, replace(design, error=design.error / len(labels)),
                    60 * budget / len(labels), journal, name,
                    lambda line: console.print(line, markup=False, highlight=False), pairs, label,
                ))  # fmt: skip
            result = joined(results)
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


def _report(root: Path, machine: str | None, out: Path) -> None:
    from projecta.regress import report as tables
    from projecta.regress import runner

    project = project_at(root)
    machines = project.machines()
    if machine is not None and machine not in machines:
        rule = f"be one of {', '.join(machines) or 'none yet'}"
        fail("projecta report", "--machine", rule, repr(machine))
    found = list(project.measurements(machine or machines[0])) if machines else []
    newest = tables.newest_commit(found, runner.history(project.repository))
    if not newest:
        click.echo("projecta report: no results yet. Run `projecta bench` first.", err=True)
        sys.exit(NOT_MEASURED)
    click.echo(f"\nMachine {newest[0].machine}, commit {newest[0].commit[:8]}\n\n{tables.summary(newest)}\n")
    for path in tables.write_report(newest, root / out):
        click.echo(f"Wrote {path.relative_to(root) if path.is_relative_to(root) else path}")


for command in (preflight, fetch, keep):
    cli.add_command(command)


def main() -> None:
    try:
        cli(prog_name="projecta")
    except Exception:  # 1 would say REGRESSED
        import traceback

        traceback.print_exc()
        sys.exit(CRASHED)


if __name__ == "__main__":
    main()
