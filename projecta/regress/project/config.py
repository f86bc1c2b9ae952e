"""Reads what asv has stored, and merges asv's files of a commit: a value is known by benchmark, version and
parameters, never by its place."""

import contextlib
import functools
import io
import itertools
import json
import math
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from projecta._checks import Checker, fail

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
        except (UserError, ValueError) as error:
            check.that(False, "asv.conf.json", "be readable", " ".join(str(error).split()))
        self.results = folder / self.config.results_dir
        self._load_plugins()

    def _load_plugins(self) -> None:
        """asv's plugins of the configuration: environments, repositories."""
        from asv.plugin_manager import plugin_manager

        for name in self.config.plugins:
            try:
                with contextlib.chdir(self.folder):
                    plugin_manager.import_plugin(name)
            except Exception as error:
                reason = f"{name!r}: {type(error).__name__}: {error}"
                fail("projecta", "plugins of asv.conf.json", "be importable", reason)

    @functools.cached_property
    def repository(self) -> Path:
        """The git repository whose commits are measured: asv.conf.json's `repo`, or asv's mirror of it."""
        from asv.repo import get_repo
        from asv.util import ProcessError, UserError

        try:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()):
                return Path(get_repo(self.config)._path).resolve()
        except (UserError, ProcessError, OSError) as error:
            lines = str(getattr(error, "stderr", "") or error).strip().splitlines() or ["no reason given"]
            fail(
                "projecta",
                "repo of asv.conf.json",
                "be a git repository",
                f"{self.config.repo!r}: {lines[-1]}",
            )

    @functools.cached_property
    def inside(self) -> str:
        """Where in the repository the project's folder lies; "" if it is its top, or elsewhere."""
        top = subprocess.run(
            ["git", "-C", str(self.repository), "rev-parse", "--show-toplevel"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        folder = self.folder.resolve()
        return str(folder.relative_to(top)) if top and folder.is_relative_to(top) else ""

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
                        benchmarks[name]["unit"], label, state, higher_is_better(benchmarks[name]),
                    )  # fmt: skip

    def _state(self, result: Any) -> dict[str, str]:
        """What one of asv's files was measured in, as it says and as was noted beside it."""
        facts = {key: value for key, value in result.params.items() if key != "machine"}
        path = (self.results / result._filename).with_suffix(STATE)  # machine/commit-environment
        with contextlib.suppress(OSError, ValueError):
            facts |= json.loads(path.read_text())
        return {str(key): str(value) for key, value in facts.items()}


RATES = ("/s", "hz")  # how units end of which more is better


def higher_is_better(entry: Mapping[str, Any]) -> bool:
    """The direction of a benchmark: as its `higher_is_better` says, or by its unit.

    >>> higher_is_better({"unit": "images/s"}), higher_is_better({"unit": "unit", "higher_is_better": True})
    (True, True)
    """
    said = entry.get("higher_is_better")
    return str(entry["unit"]).lower().endswith(RATES) if said is None else bool(said)


Combination = tuple[str, ...]  # of parameters, each as asv writes it


def merge_results(
    old: Mapping[str, Any], new: Mapping[str, Any],
    believed: Callable[[str, Combination], bool] = lambda name, combination: True,
) -> dict[str, Any]:  # fmt: skip
    """asv's file of a commit with the values of two: all of the new one, and what only the old one has.

    Of a benchmark whose version differs the new row stands. `believed` may refuse values of the old one.
    """
    rows, before, after = dict(new["results"]), old["result_columns"], new["result_columns"]
    for name, row in old["results"].items():
        known = dict(zip(before, row, strict=False))
        mine = None if name not in rows else dict(zip(after, rows[name], strict=False))
        if mine is None:
            merged: dict[str, Any] | None = known
        elif str(known.get("version")) != str(mine.get("version")):
            continue
        else:
            merged = _merge_row(name, known, mine, believed)
        if merged is not None:
            rows[name] = [merged.get(column) for column in after]
            while rows[name] and rows[name][-1] is None:  # as asv writes it
                rows[name].pop()
    spent = [part["durations"] for part in (old, new) if "durations" in part]
    durations = {"durations": {k: v for part in spent for k, v in part.items()}} if spent else {}
    return {**new, "results": rows, **durations}


def _merge_row(
    name: str, old: dict[str, Any], new: dict[str, Any], believed: Callable[[str, Combination], bool]
) -> dict[str, Any] | None:
    """A benchmark's columns with all combinations of both; None if the old one adds nothing."""
    axes, added = (list(row.get("params") or []) for row in (new, old))
    if len(axes) != len(added):
        return None
    mine, theirs = _by_combination(new), _by_combination(old)
    extra = {
        combination: values for combination, values in theirs.items()
        if _is_missing(mine.get(combination, {}).get("result")) and not _is_missing(values.get("result"))
        and believed(name, combination)
    }  # fmt: skip
    if not extra:
        return None
    both = [
        [*axis, *(value for value in more if value not in axis and any(c[i] == value for c in extra))]
        for i, (axis, more) in enumerate(zip(axes, added, strict=True))
    ]
    combinations = list(itertools.product(*both))
    found = mine | extra
    merged = new | {"params": both}
    for column in {key for values in found.values() for key in values}:
        each = [found.get(combination, {}).get(column) for combination in combinations]
        merged[column] = None if all(value is None for value in each) else each
    return merged


def _is_missing(value: Any) -> bool:
    """Whether it is none: asv writes null for what failed, nan for what was skipped or not selected."""
    return value is None or value != value


def _by_combination(row: Mapping[str, Any]) -> dict[Combination, dict[str, Any]]:
    """The columns that have a value for each combination, by combination."""
    combinations = list(itertools.product(*(row.get("params") or [])))
    columns = {
        column: values for column, values in row.items()
        if (column in ("result", "samples") or column.startswith("stats_")) and isinstance(values, list)
    }  # fmt: skip
    return {
        combination: {column: values[i] for column, values in columns.items() if i < len(values)}
        for i, combination in enumerate(combinations)
    }


def _plain(parameter: str) -> str:
    """asv stores the repr of a parameter: take the quotes off a string."""
    return parameter[1:-1] if parameter[:1] in "'\"" else parameter
