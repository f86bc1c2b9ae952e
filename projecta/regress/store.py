"""Reads what asv has stored; no other room opens asv's files."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from projecta._checks import Checker

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

    @property
    def measured(self) -> bool:
        return self.value is not None and math.isfinite(self.value)


class Project:
    """An asv project: the folder that holds asv.conf.json.

    Raises:
        ValueError: the folder has no readable asv.conf.json.
    """

    def __init__(self, folder: Path):
        from asv.config import Config
        from asv.util import UserError

        self.folder = folder
        path = folder / "asv.conf.json"
        check = Checker("projecta")
        check.that(
            path.is_file(),
            "the current folder",
            "hold an asv.conf.json",
            str(folder),
            "Run it at the top of an asv project.",
        )
        try:
            self.config = Config.load(str(path))
        except UserError as error:
            check.that(False, "asv.conf.json", "be readable", " ".join(str(error).split()))
        self.results = folder / self.config.results_dir

    def machines(self) -> list[str]:
        """Names of the machines that have results, the one used last first."""
        if not self.results.is_dir():
            return []
        found = [p for p in self.results.iterdir() if (p / "machine.json").is_file()]
        return [
            p.name
            for p in sorted(found, key=lambda p: max(f.stat().st_mtime for f in p.iterdir()), reverse=True)
        ]

    def commits(self, machine: str) -> set[str]:
        """The first eight digits of the commits that have results of a machine, by their files' names."""
        return {path.name[:8] for path in (self.results / machine).glob("????????-*.json")}

    def noise(self, machine: str) -> dict[str, float]:
        """By benchmark's label, the standard deviation of the logarithm of ratios of identical code."""
        try:
            found = json.loads((self.results / machine / NOISE).read_text())
        except (OSError, ValueError):
            return {}
        return {str(label): float(spread) for label, spread in found.items()}

    def measurements(self, machine: str) -> Iterator[Measurement]:
        """Every stored result of one machine."""
        from asv.benchmarks import Benchmarks
        from asv.results import iter_results_for_machine
        from asv.util import UserError

        try:
            benchmarks = Benchmarks.load(self.config)
        except UserError:
            return  # asv has not run here yet
        for result in iter_results_for_machine(str(self.results), machine):
            state = self._state(result)
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
                        benchmarks[name]["unit"], label, state,
                    )  # fmt: skip

    def _state(self, result: Any) -> dict[str, str]:
        """What one of asv's files was measured in, as it says and as was noted beside it."""
        facts = {key: value for key, value in result.params.items() if key != "machine"}
        path = (self.results / result._filename).with_suffix(STATE)  # machine/commit-environment
        with contextlib.suppress(OSError, ValueError):
            facts |= json.loads(path.read_text())
        return {str(key): str(value) for key, value in facts.items()}


def _plain(parameter: str) -> str:
    """asv stores the repr of a parameter: take the quotes off a string."""
    return parameter[1:-1] if parameter[:1] in "'\"" else parameter
