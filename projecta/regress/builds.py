"""Has asv build a commit, and says which benchmarks there are and how their processes start."""

import contextlib
import io
import itertools
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any

from projecta._checks import fail
from projecta.regress import runner
from projecta.regress.processes import Case, Fork, Spawn
from projecta.regress.store import Project


class BuildFailed(RuntimeError):
    """asv could not build or install a commit."""


class Build:
    """A commit, installed in an environment of asv's, and the benchmarks of the working tree in it.

    Each `slot` has an environment of its own: "" is that of `asv run`. In an environment that exists already
    nothing can be installed: the commit's files are put first on the path of its interpreter.
    """

    def __init__(self, project: Project, commit: str, slot: str = "", which: int = 0):
        from asv.repo import get_repo

        self.project, self.commit = project, commit
        self.config = copy(project.config)
        if slot:
            self.config.env_dir = f"{self.config.env_dir}-{slot}"
        self.folder = (project.folder / self.config.benchmark_dir).resolve()
        with _asv_in(project.folder):
            self.repo = get_repo(self.config)
        self.environment = _environments(project, self.config)[which]
        self.variables: dict[str, str] = {}

    @property
    def existing(self) -> bool:
        return not self.environment.can_install_project()

    def make(self) -> None:
        """Create the environment if it is missing, and install the commit; BuildFailed with the reason."""
        from asv.util import ProcessError, UserError

        try:
            with _asv_in(self.project.folder):
                self.environment.create()
                self.environment.install_project(self.config, self.repo, self.commit)
        except (UserError, ProcessError, OSError) as error:
            lines = str(getattr(error, "stderr", "") or error).strip().splitlines() or ["no reason given"]
            raise BuildFailed(f"{self.commit[:8]} does not build: {lines[-1].strip()[:300]}") from None
        self.variables = self._variables()
        if self.existing:
            self._check_that_it_is_the_commit()

    def _check_that_it_is_the_commit(self) -> None:
        """An installed copy must not stand in for the commit's files: it would compare with itself."""
        name = self.config.project.replace("-", "_")
        code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s and s.origin or '')"
        tree = _worktree(self.project, self.commit).resolve()
        done = subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, env=self.variables, cwd=tree.parent
        )
        origin = done.stdout.strip()
        if origin and not Path(origin).resolve().is_relative_to(tree):
            raise BuildFailed(
                f"{self.commit[:8]}: {name} is imported from {origin}, not from the commit's files. Take "
                "environment_type virtualenv in asv.conf.json."
            )

    def _variables(self) -> dict[str, str]:
        own = os.environ | self.environment.env_vars | {"PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"}
        for name in ("PYTHONPATH", "ASV_PYTHONPATH"):
            own.pop(name, None)
        if self.existing:
            tree = _worktree(self.project, self.commit)
            places = os.pathsep.join(str(place) for place in (tree / "src", tree) if place.is_dir())
            own |= {"PYTHONPATH": places, "ASV_PYTHONPATH": places}
        else:
            own["PATH"] = os.pathsep.join([str(Path(self.python).parent), own.get("PATH", "")])
        return own | {"ASV": "true", "ASV_PROJECT": self.config.project, "ASV_COMMIT": self.commit}

    @property
    def python(self) -> str:
        if self.existing:
            return getattr(self.environment, "_executable", sys.executable)
        return str(self.environment.find_executable("python"))

    @property
    def forks(self) -> bool:
        """Whether a process may be the fork of one that has imported the suites."""
        return self.config.launch_method == "forkserver"

    def launcher(self, settings: Mapping[str, Any] = MappingProxyType({})) -> Spawn:
        """What starts processes here; `settings` override a benchmark's own (asv's number, repeat...)."""
        from asv.runner import BENCHMARK_RUN_SCRIPT

        kind = Fork if self.forks else Spawn
        return kind([self.python, BENCHMARK_RUN_SCRIPT], self.folder, self.variables, settings)

    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """asv's descriptions of benchmarks, timeouts included; BuildFailed if they cannot be imported."""
        from asv.benchmarks import Benchmarks
        from asv.util import ProcessError, UserError

        alone = copy(self.config)
        alone.branches = []  # where they cannot be imported, asv would install the tip of a branch instead
        before = dict(os.environ)
        os.environ.update({k: v for k, v in self.variables.items() if k.endswith("PYTHONPATH")})
        try:
            with _asv_in(self.project.folder):
                self.found = Benchmarks.discover(
                    alone, self.repo, [self.environment], [self.commit], regex=None
                )
        except (UserError, ProcessError) as error:
            lines = str(error).strip().splitlines() or ["its benchmarks cannot be imported"]
            raise BuildFailed(f"{self.commit[:8]}: {lines[-1]}") from None
        finally:
            os.environ.clear()
            os.environ.update(before)
        usual = self.config.default_benchmark_timeout
        return {
            name: entry | {"timeout": entry.get("timeout") or usual} for name, entry in self.found.items()
        }

    def packages(self) -> dict[str, str]:
        """Versions of what is installed beside the project."""
        code = (
            "from importlib.metadata import distributions\n"
            "for d in distributions(): print(d.metadata['Name'].lower(), d.version, sep='==')"
        )
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, env=self.variables)
        pairs = (line.partition("==") for line in done.stdout.splitlines())
        return {name: version for name, _, version in pairs if name != self.config.project.lower()}


def builds_of(project: Project, commit: str) -> list[Build]:
    """A commit in every environment of the project's matrix."""
    count = len(_environments(project, project.config))
    return [Build(project, commit, which=i) for i in range(count)]


def _environments(project: Project, config: Any) -> list[Any]:
    from asv import environment

    with _asv_in(project.folder):
        found = list(environment.get_environments(config, None, verbose=False))
    if not found:
        fail("projecta", "asv.conf.json", "describe an environment that this machine can make", "none")
    return found


def cases(benchmarks: dict[str, dict[str, Any]]) -> list[Case]:
    """Every combination of parameters of every benchmark."""
    return [
        Case(
            name, i, params, entry["type"], entry["unit"], str(entry["version"]),
            float(entry["timeout"]), entry.get("setup_cache_key"),
        )
        for name, entry in sorted(benchmarks.items())
        for i, params in enumerate(itertools.product(*entry["params"]))
    ]  # fmt: skip


def _worktree(project: Project, commit: str) -> Path:
    """The commit's files, in a folder that is kept."""
    tree = project.results.parent.resolve() / "trees" / commit
    if not tree.is_dir():
        tree.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            (tree.parent / ".gitignore").write_text("*\n")
        fresh = tree.with_suffix(f".{os.getpid()}")
        top, inside = runner.git(
            project.folder, "rev-parse", "--show-toplevel", "--show-prefix"
        ).partition("\n")[::2]  # fmt: skip
        words = ["git", "-C", top, "archive", f"{commit}:{inside.rstrip('/')}"]  # of a subfolder, that alone
        done = subprocess.run(words, capture_output=True)
        if done.returncode:
            raise BuildFailed(f"{commit[:8]} cannot be checked out: {done.stderr.decode().strip()}")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(fresh, filter="data")
        with contextlib.suppress(OSError):  # another process was first
            fresh.rename(tree)
    return tree


@contextlib.contextmanager
def _asv_in(folder: Path) -> Iterator[None]:
    """Where asv reads the paths of its configuration from; its own progress is not shown."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        yield
