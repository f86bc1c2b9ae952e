"""Commands that measure: bench, gate, calibrate."""

import sys
from pathlib import Path
from typing import Any

import click

from projecta.regress.cli.errors import BROKEN, NOT_MEASURED, RESULTS, machine_option, one_line, project_at
from projecta.regress.cli.results import write_pages, write_report


@click.command()
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

    from projecta.regress.bench import measure
    from projecta.regress.project.config import check_pattern, find_root, short_suites
    from projecta.regress.project.git import find_commits, uncommitted
    from projecta.regress.project.machine import machine_name, register_machine
    from projecta.regress.run.group import stopped_by_sigterm
    from projecta.regress.store.journal import Journal
    from projecta.regress.store.results import list_commits

    console = Console()
    root = find_root(Path.cwd())
    project = project_at(root)
    name = machine_name(machine)
    commits = find_commits(project.repository, range, list_commits(project, name))
    if regex is not None:
        check_pattern(regex)
    changed = uncommitted(root) if project.inside or project.repository == project.folder.resolve() else []
    if changed:
        shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        console.print(
            f"Not measured: uncommitted changes in {len(changed)} file(s): {shown}",
            markup=False,
            highlight=False,
        )
    wanted = short_suites(root) if regex is None else regex
    if wanted is not None and regex is None:
        console.print("Left out: suites for large machines; PROJECTA_FULL=1 runs them.", highlight=False)
    register_machine(name)
    try:
        with Journal(project) as journal, stopped_by_sigterm():
            broken = measure(project, journal, name, commits, wanted, quick, console)
        if not quick and _has_values(project):
            write_report(root, name, Path(RESULTS))
            console.print(write_pages(project), highlight=False)
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
    from projecta.regress.store.results import list_machines, read_measurements

    return any(m.measured for machine in list_machines(project) for m in read_measurements(project, machine))


_bench = click.option("-b", "--bench", "regex", metavar="REGEX", help="Only benchmarks whose name matches.")


_budget = click.option(
    "--budget", metavar="MINUTES", type=click.FloatRange(min=0), default=9.0, show_default=True,
    help="Time to measure; building is not counted.",
)  # fmt: skip


@click.command()
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

    from projecta.regress.gate import output, statistics

    design = statistics.Design(tolerance=tolerance, memory_tolerance=memory_tolerance)
    result, _ = _run_gate(machine, base, head, regex, design, budget)
    Console().print(output.table(result))
    click.echo(output.sentence(result))
    if as_json:
        output.write_json(result, as_json)
    if markdown:
        markdown.write_text(output.as_markdown(result))
    if plot:
        output.draw(result, plot)
    sys.exit(statistics.EXIT_CODES[result.verdict])


@click.command()
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

    from projecta.regress.gate import output, statistics

    design = statistics.Design(tolerance=tolerance)
    result, noise = _run_gate(machine, "HEAD", "HEAD", regex, design, budget, pairs)
    measured = [row for row in result.rows if row.case.timed and row.label in noise]
    broken = [row for row in result.rows if row.verdict == statistics.BROKEN]
    for row in broken:
        click.echo(f"BROKEN: {row.label}: {row.judgement.reason}", err=True)
    if not measured and not broken:
        click.echo("projecta calibrate: no timing was measured often enough (3 pairs).", err=True)
        sys.exit(NOT_MEASURED)
    if measured:
        Console().print(output.noise_table(measured, noise, result.design))
    if broken:
        sys.exit(BROKEN)


def _run_gate(
    machine: str | None, base: str, head: str, regex: str | None, design: Any, budget: float,
    pairs: int | None = None,
) -> tuple[Any, dict[str, tuple[str, float, int]]]:  # fmt: skip
    """What base and head gave against each other, and the noise that is known of this machine."""
    from dataclasses import replace

    from rich.console import Console

    from projecta.regress.gate import output
    from projecta.regress.gate.session import join_results, run_session
    from projecta.regress.project.config import check_pattern, find_root, gate_pattern
    from projecta.regress.project.git import find_commit
    from projecta.regress.project.machine import machine_name
    from projecta.regress.run.build import Build, BuildFailed, environment_labels
    from projecta.regress.run.group import stopped_by_sigterm
    from projecta.regress.store.journal import Journal

    console = Console(stderr=True)
    root = find_root(Path.cwd())
    project = project_at(root)
    name = machine_name(machine)
    before, after = (find_commit(project.repository, word) for word in (base, head))
    pattern = gate_pattern(root) if regex is None else check_pattern(regex)
    with Journal(project) as journal, stopped_by_sigterm():
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
                results.append(run_session(
                    builds, pattern, replace(design, error=design.error / len(labels)),
                    60 * budget / len(labels), journal, name,
                    lambda line: console.print(line, markup=False, highlight=False), pairs, label,
                ))  # fmt: skip
            result = join_results(results)
        except BuildFailed as error:
            click.echo(f"BROKEN: {error}", err=True)
            sys.exit(BROKEN)
        if pairs is None and regex is None:  # the project's own gate: its verdict stands on the site
            (project.results / name).mkdir(parents=True, exist_ok=True)
            output.write_json(result, project.results / name / output.LAST)
        return result, journal.noise(name)
