"""Reads what asv has stored: machines, commits, measurements."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from projecta.regress.project.config import Project
from projecta.regress.run.case import higher_is_better

# Beside asv's files, which are named .json: of a commit, driver, kernel, governor...; of a machine, noise.
STATE, NOISE = ".state", "last.noise"


@dataclass(frozen=True)
class Measurement:
    """One benchmark at one combination of parameters, on one machine and commit.

    `value` is in `unit`, or None if the benchmark failed, or nan if it was skipped.
    """

    machine: str
    environment: str
    commit: str
    date: int  # of the commit, milliseconds since 1970
    benchmark: str
    params: dict[str, str]
    value: float | None
    unit: str
    label: str = ""  # the benchmark and its parameters as asv writes them, and as gates name them
    state: Mapping[str, str] = field(default_factory=dict)  # what it was measured in: machine, versions
    higher_is_better: bool = False
    at: int = 0  # when it was measured, milliseconds since 1970; 0: unknown

    @property
    def measured(self) -> bool:
        return self.value is not None and math.isfinite(self.value)


def list_machines(project: Project) -> list[str]:
    """Names of the machines that have results, the one used last first."""
    if not project.results.is_dir():
        return []
    found = [p for p in project.results.iterdir() if (p / "machine.json").is_file()]
    return [
        p.name for p in sorted(found, key=lambda p: max(f.stat().st_mtime for f in p.iterdir()), reverse=True)
    ]


def list_commits(project: Project, machine: str) -> set[str]:
    """The first eight digits of the commits that have results of a machine, by their files' names."""
    return {path.name[:8] for path in (project.results / machine).glob("????????-*.json")}


def read_noise(project: Project, machine: str) -> dict[str, float]:
    """By benchmark's label, the standard deviation of the logarithm of ratios of identical code."""
    try:
        found = json.loads((project.results / machine / NOISE).read_text())
    except (OSError, ValueError):
        return {}
    return {str(label): float(spread) for label, spread in found.items()}


def read_measurements(project: Project, machine: str) -> Iterator[Measurement]:
    """Every stored result of one machine."""
    from asv.benchmarks import Benchmarks
    from asv.results import iter_results_for_machine
    from asv.util import UserError

    try:
        benchmarks = Benchmarks.load(project.config)
    except UserError:
        return  # asv has not run here yet
    for result in iter_results_for_machine(str(project.results), machine):
        state = _state(project, result)
        for name in result.get_all_result_keys():
            if name not in benchmarks or result.benchmark_version.get(name) != str(
                benchmarks[name]["version"]
            ):
                continue  # measured by another version of the benchmark: not comparable
            values = result.get_result_value(name, result.get_result_params(name))
            combinations = itertools.product(*result.get_result_params(name))
            for combination, value in itertools.zip_longest(combinations, values or []):
                params = dict(
                    zip(benchmarks[name]["param_names"], map(_plain, combination or ()), strict=False)
                )
                label = f"{name}({', '.join(combination)})" if combination else name
                yield Measurement(
                    machine, result.env_name, result.commit_hash, result.date, name, params, value,
                    benchmarks[name]["unit"], label, state, higher_is_better(benchmarks[name]),
                        result.started_at.get(name) or 0,
                )  # fmt: skip


def _state(project: Project, result: Any) -> dict[str, str]:
    """The state in which an asv file was measured."""
    facts = {key: value for key, value in result.params.items() if key != "machine"}
    path = (project.results / result._filename).with_suffix(STATE)  # machine/commit-environment
    with contextlib.suppress(OSError, ValueError):
        facts |= json.loads(path.read_text())
    return {str(key): str(value) for key, value in facts.items()}


def _plain(parameter: str) -> str:
    """asv stores the repr of a parameter: take the quotes off a string."""
    return parameter[1:-1] if parameter[:1] in "'\"" else parameter
