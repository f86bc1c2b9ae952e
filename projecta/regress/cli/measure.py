"""Commands that measure: bench, gate, calibrate."""

import sys
from pathlib import Path
from typing import Any

import click

from projecta._checks import fail
from projecta.regress.cli.errors import (
    BROKEN,
    NOT_MEASURED,
    bench_option,
    machine_option,
    one_line,
    project_at,
)
from projecta.regress.cli.results import write_pages, write_report
from projecta.regress.errors import UsageError


@click.command()
@click.argument("range", required=False, metavar="[RANGE]")
@machine_option
@bench_option
@click.option("--quick", is_flag=True, help="Run each benchmark once to see that it works; store nothing.")
@one_line
def bench(range: str | None, machine: str | None, regex: str | None, quick: bool) -> None:
    """Measure commits, print the tables and write the pages.

    RANGE is a commit, a range A..B, or NEW (every commit since the last one with results). Default: HEAD and
    the commit before it. What has a result already is not measured again.

    Example: projecta bench v1.0..v1.1 --bench time_forward
    """
    from rich.console import Console

    from projecta.regress.bench import measure
    from projecta.regress.project.config import check_pattern, find_root, short_suites
    from projecta.regress.project.git import find_commits
    from projecta.regress.project.machine import machine_name, register_machine
    from projecta.regress.run.group import interruptible
    from projecta.regress.store.journal import Journal
    from projecta.regress.store.results import list_commits

    console = Console()
    root = find_root(Path.cwd())
    project = project_at(root)
    name = machine_name(machine)
    commits = find_commits(project.repository, range, list_commits(project, name))
    wanted = short_suites(root) if regex is None else check_pattern(regex)
    _warn(project, console)
    if wanted is not None and regex is None:
        console.print("Left out: suites for large machines. PROJECTA_FULL=1 runs them.", highlight=False)
    register_machine(name)
    try:
        with Journal(project) as journal, interruptible():
            broken = measure(project, journal, name, commits, wanted, quick, console)
        if not quick and _has_values(project):
            write_report(project, name)
            console.print(write_pages(project), highlight=False)
    except KeyboardInterrupt:
        if quick:
            raise
        kept = "what was measured is stored, and `projecta bench` goes on from there"
        raise KeyboardInterrupt(kept) from None
    if broken:
        others = " The others are stored." if not quick and _has_values(project) else ""
        click.echo(f"{broken} failed, with the reasons above.{others}", err=True)
        sys.exit(BROKEN)


def _warn(project: Any, console: Any) -> None:
    """Name the files that differ from HEAD and so are not measured."""
    from projecta.regress.project.git import uncommitted

    if not project.inside and project.repository != project.folder.resolve():
        return  # another repository is measured
    changed = uncommitted(project.folder)
    if changed:
        shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        line = f"Not measured: uncommitted changes in {len(changed)} file(s): {shown}"
        console.print(line, markup=False, highlight=False)


def _has_values(project: Any) -> bool:
    """Whether anything was measured on any machine: tables and pages can be made of it."""
    from projecta.regress.store.results import list_machines, read_measurements

    return any(m.measured for machine in list_machines(project) for m in read_measurements(project, machine))


_budget = click.option(
    "--budget", metavar="MINUTES", type=click.FloatRange(min=0), default=9.0, show_default=True,
    help="Time to measure; building is not counted.",
)  # fmt: skip
_file = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("base", required=False)
@click.argument("head", default="HEAD")
@machine_option
@bench_option
@_budget
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=0.03, show_default=True,
    help="Slow-down that still passes, as a share of the time.",
)  # fmt: skip
@click.option(
    "--memory-tolerance", type=click.FloatRange(min=0), default=0.005, show_default=True,
    help="Growth of any other metric that still passes, as a share.",
)  # fmt: skip
@click.option("--json", "as_json", type=_file, help="Write everything to this file, samples included.")
@click.option("--markdown", type=_file, help="Write a comment for a pull request to this file.")
@click.option("--plot", type=_file, help="Draw the pairs to this PNG file.")
@click.option("--always", is_flag=True, help="Measure even if both commits install identical files.")
@click.option(
    "--command", "commands", multiple=True, metavar="COMMAND",
    help="Judge this shell command, run in each commit's files, instead of asv suites. May be repeated.",
)  # fmt: skip
@click.option(
    "--pytest", "tests", multiple=True, metavar="PATH", type=click.Path(exists=True, path_type=Path),
    help="Judge the tests in this file or folder that use pytest-benchmark's fixture. May be repeated.",
)  # fmt: skip
@click.option(
    "--build", metavar="COMMAND", help="With --command, --pytest: what makes a commit's files ready, once."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True,
    metavar="SECONDS", help="With --command, --pytest: the longest that one run may take.",
)  # fmt: skip
@click.option(
    "--report", "show", is_flag=True,
    help="Measure nothing: show how often this machine's gates were wrong about code that did not change.",
)  # fmt: skip
@one_line
def gate(
    base: str | None, head: str, machine: str | None, regex: str | None, budget: float, tolerance: float,
    memory_tolerance: float, as_json: Path | None, markdown: Path | None, plot: Path | None, always: bool,
    commands: tuple[str, ...], tests: tuple[Path, ...], build: str | None, timeout: float, show: bool,
) -> None:  # fmt: skip
    """Say whether HEAD is slower or needs more memory than BASE.

    Exit codes: 0 PASS, 1 REGRESSED, 2 usage, 3 BROKEN, 4 NOT MEASURED, 5 INCONCLUSIVE.

    Example: projecta gate main HEAD --tolerance 0.05

    Example: projecta gate main HEAD --build make --command "./tool input.txt"

    Example: projecta gate main HEAD --pytest tests/benchmarks
    """
    from rich.console import Console

    from projecta.regress.gate import output, statistics

    project = _project_without_asv(commands, tests, build, timeout)
    if show:
        _show_rates(machine, project)
        return
    if base is None:
        fail("projecta gate", "BASE", "be given, without --report", "nothing", error=UsageError)
    for path in filter(None, (as_json, markdown, plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    design = statistics.Design(tolerance=tolerance, memory_tolerance=memory_tolerance)
    result, _ = _run_gate(machine, base, head, regex, design, budget, always=always, project=project)
    Console().print(output.table(result))
    click.echo(output.sentence(result))
    if as_json:
        output.write_json(result, as_json)
    if markdown:
        markdown.write_text(output.as_markdown(result))
    if plot:
        output.draw(result).savefig(plot, dpi=120, format="png")
    sys.exit(statistics.EXIT_CODES[result.verdict])


def _project_without_asv(
    commands: tuple[str, ...], tests: tuple[Path, ...], build: str | None, timeout: float
) -> Any:
    """The project of --command or --pytest; None without them."""
    from projecta.regress.project.commands import command_project, tests_project

    if commands and tests:
        fail("projecta gate", "--pytest", "not be given with --command", str(tests[0]), error=UsageError)
    if commands:
        return command_project(Path.cwd(), commands, build, timeout)
    if tests:
        return tests_project(Path.cwd(), tests, build, timeout)
    if build is not None:
        rule = "be given with --command or --pytest"
        fail("projecta gate", "--build", rule, repr(build), error=UsageError)
    return None


@click.command()
@machine_option
@bench_option
@_budget
@click.option(
    "--pairs", type=click.IntRange(min=3), default=12, show_default=True, help="Pairs of processes to run."
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0, min_open=True), default=0.03, show_default=True,
    help="Slow-down that the gate is to let pass, as a share of the time.",
)  # fmt: skip
@one_line
def calibrate(machine: str | None, regex: str | None, budget: float, pairs: int, tolerance: float) -> None:
    """Measure HEAD against itself: the noise of each benchmark on this machine.

    The gate uses it to choose how many pairs to run.

    Example: projecta calibrate --budget 20
    """
    from rich.console import Console

    from projecta.regress.gate import output, statistics

    design = statistics.Design(tolerance=tolerance)
    result, noise = _run_gate(machine, "HEAD", "HEAD", regex, design, budget, pairs)
    timed = [row for row in result.rows if row.case.timed and len(row.ratios) >= 3]
    measured = [row for row in timed if row.label in noise]
    broken = [row for row in result.rows if row.verdict == statistics.BROKEN]
    for row in broken:
        click.echo(f"BROKEN: {row.label}: {row.judgement.reason}", err=True)
    if not measured and not broken:
        reason = "no timing was measured in 3 pairs. Raise --budget, or widen --bench"
        click.echo(f"projecta: cannot calibrate: {reason}.", err=True)
        sys.exit(NOT_MEASURED)
    if measured:
        Console().print(output.noise_table(measured, noise, result.design))
    if broken:
        sys.exit(BROKEN)


def _show_rates(machine: str | None, project: Any) -> None:
    """The verdicts of this machine's gates so far."""
    from rich.console import Console

    from projecta.regress.gate import record
    from projecta.regress.project.config import find_root
    from projecta.regress.project.machine import machine_name
    from projecta.regress.store.journal import Journal

    with Journal(project_at(find_root(Path.cwd())) if project is None else project) as journal:
        Console().print(record.report(journal.gates(machine_name(machine))), highlight=False)


def _run_gate(
    machine: str | None, base: str, head: str, regex: str | None, design: Any, budget: float,
    pairs: int | None = None, always: bool = False, project: Any = None,
) -> tuple[Any, dict[str, tuple[str, float, int]]]:  # fmt: skip
    """Measure base and head in pairs; return the result, and the known noise of this machine."""
    from rich.console import Console

    from projecta.regress.gate import output, record
    from projecta.regress.gate.session import judge_environments
    from projecta.regress.project.config import check_pattern, find_root, gate_pattern
    from projecta.regress.project.git import find_commit
    from projecta.regress.project.machine import machine_name
    from projecta.regress.run.build import BuildFailed
    from projecta.regress.run.group import interruptible
    from projecta.regress.store.journal import Journal

    console = Console(stderr=True)

    def log(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    root = find_root(Path.cwd()) if project is None else project.folder
    project = project_at(root) if project is None else project
    name = machine_name(machine)
    commits = {side: find_commit(project.repository, word) for side, word in (("base", base), ("head", head))}
    pattern = gate_pattern(root) if regex is None else check_pattern(regex)
    with Journal(project) as journal, interruptible():
        try:
            result = judge_environments(
                project, commits, pattern, design, budget, journal, name, log, pairs, always
            )
        except BuildFailed as error:
            click.echo(f"BROKEN: {error}", err=True)
            sys.exit(BROKEN)
        if pairs is None:
            record.keep(journal, name, result)
        own = pairs is None and regex is None and commits["base"] != commits["head"]
        if own:  # the project's own gate: its verdict stands on the site
            (project.results / name).mkdir(parents=True, exist_ok=True)
            output.write_json(result, project.results / name / output.LAST)
        return result, journal.noise(name)
