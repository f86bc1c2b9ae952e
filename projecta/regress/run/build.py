"""Builds a commit by asv, and lists its benchmarks."""

import ast
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from projecta.regress.errors import cannot
from projecta.regress.project.commands import TREE
from projecta.regress.project.config import Project
from projecta.regress.run.case import Case, higher_is_better

WORKER = Path(__file__).with_name("worker.py")  # started in the environment of a commit


class BuildFailed(RuntimeError):
    """asv could not build or install a commit."""


class Build:
    """A commit installed in an asv environment, with the benchmarks of the working tree.

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
        self.environment = find_environments(project, self.config)[which]
        self.variables: dict[str, str] = {}

    @property
    def existing(self) -> bool:
        return not self.environment.can_install_project()

    def make(self) -> None:
        """Create the environment if it is missing, and install the commit.

        Raises:
            UsageError: the environment cannot be created, for example because its tool is missing.
            BuildFailed: the commit cannot be installed.
        """
        from asv.util import ProcessError, UserError

        try:
            with _asv_in(self.project.folder):
                self.environment.create()
        except (UserError, ProcessError, OSError) as error:
            _no_environment(self.config, _last_line(error))
        try:
            with _asv_in(self.project.folder):
                self.environment.install_project(self.config, self.repo, self.commit)
        except (UserError, ProcessError, OSError) as error:
            raise BuildFailed(f"{self.commit[:8]} does not build: {_last_line(error)}") from None
        self.variables = self._variables()
        if self.existing:
            reason = self.project.prepare(worktree(self.project, self.commit).resolve())
            if reason:
                raise BuildFailed(f"{self.commit[:8]} does not build: {reason}")
            self._check_that_it_is_the_commit()

    def _check_that_it_is_the_commit(self) -> None:
        """An installed copy must not stand in for the commit's files: it would compare with itself.

        The interpreter is asked where each module that the suites import comes from. One that the commit's
        files have too, or that the project's distribution installed, must come from the files.
        """
        tree = worktree(self.project, self.commit).resolve()
        names = sorted({*self.imports(), self.config.project.replace("-", "_")} - {self.folder.name})
        words = [self.python, "-c", _ORIGINS, normalised(self.config.project), *names]
        done = subprocess.run(words, capture_output=True, text=True, env=self.variables, cwd=tree.parent)
        for name, (origin, installed) in json.loads(done.stdout or "{}").items():
            here = Path(origin).resolve()
            if here.is_relative_to(tree) or here.is_relative_to(self.folder):
                continue
            if installed or any(_holds(root, name) for root in _roots(tree)):
                raise BuildFailed(
                    f"{self.commit[:8]}: {name} is imported from {origin}, not from the commit's files. Take "
                    "environment_type virtualenv in asv.conf.json."
                )

    def imports(self) -> set[str]:
        """The top-level modules that the suites import."""
        return imported(self.folder.rglob("*.py"))

    def _variables(self) -> dict[str, str]:
        own = os.environ | self.environment.env_vars | {"PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"}
        own.setdefault("PYTHONHASHSEED", "0")  # parameters from a set: in one order in all processes
        for name in ("PYTHONPATH", "ASV_PYTHONPATH"):
            own.pop(name, None)
        if self.existing:
            tree = worktree(self.project, self.commit)
            inside = tree / self.project.inside  # the project's folder, if it lies in the repository
            package = tree / (getattr(self.config, "repo_subdir", "") or "")
            roots = dict.fromkeys(root / src for root in (inside, package, tree) for src in ("src", ""))
            places = os.pathsep.join(str(place) for place in roots if place.is_dir())
            own |= {"PYTHONPATH": places, "ASV_PYTHONPATH": places, TREE: str(tree.resolve())}
        else:
            own["PATH"] = os.pathsep.join([str(Path(self.python).parent), own.get("PATH", "")])
        return own | {"ASV": "true", "ASV_PROJECT": self.config.project, "ASV_COMMIT": self.commit}

    @property
    def python(self) -> str:
        if self.existing:
            return getattr(self.environment, "_executable", sys.executable)
        return str(self.environment.find_executable("python"))

    @property
    def worker_arguments(self) -> list[str]:
        """What a worker process is started with, after its socket."""
        return ["asv", str(self.folder), str(int(self.forks))]

    @property
    def forks(self) -> bool:
        """Whether workers may fork from a process that has imported the suites."""
        return self.config.launch_method == "forkserver"

    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """asv's descriptions of benchmarks, timeouts included; BuildFailed if they cannot be imported."""
        from asv.benchmarks import Benchmarks
        from asv.util import ProcessError, UserError

        alone = copy(self.config)
        alone.branches = []  # where they cannot be imported, asv would install the tip of a branch instead
        before = dict(os.environ)
        os.environ.update(
            {k: v for k, v in self.variables.items() if k.endswith(("PYTHONPATH", "PYTHONHASHSEED"))}
        )
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
        directions = self._directions()
        for entry in (self.found._all_benchmarks, self.found):  # as asv keeps them, and as it gives them
            for name in directions.keys() & entry.keys():
                entry[name]["higher_is_better"] = directions[name]
        return {
            name: entry | {"timeout": entry.get("timeout") or usual} for name, entry in self.found.items()
        }

    def _directions(self) -> dict[str, bool]:
        """The benchmarks' `higher_is_better`, which asv does not report: an attribute, as `unit` is."""
        if not any(
            "higher_is_better" in path.read_text("utf-8", "replace") for path in self.folder.rglob("*.py")
        ):
            return {}
        words = [self.python, "-c", _DIRECTIONS, str(self.folder)]
        done = subprocess.run(
            words, capture_output=True, text=True, env=self.variables, cwd=self.folder.parent
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise BuildFailed(f"{self.commit[:8]}: higher_is_better cannot be read: {lines[-1]}")
        found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
        return found

    def contents(self) -> str:
        """A digest of all that the benchmarks can use besides themselves; "" if it cannot be told.

        Of files on the path of an interpreter that exists: the commit's tree. Otherwise `files` and the
        hashes in the records of packages from an index.
        """
        if self.existing:
            words = ["git", "-C", str(self.project.repository), "rev-parse", f"{self.commit}^{{tree}}"]
            done = subprocess.run(words, capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else ""
        files, rest = self._inventory
        known = sorted(f"{name} {digest}" for name, (_, digest) in files.items())
        return hashlib.sha256("\n".join([*known, rest]).encode()).hexdigest() if files else ""

    def files(self) -> dict[str, tuple[str, str]]:
        """Place and digest of each file that may differ between commits, by name; empty if unknown.

        Of an installed environment: what was installed from a local file, as the project is. Without a
        record, or in place from its sources, files can change unseen.
        """
        if not self.existing:
            return self._inventory[0]
        tree = worktree(self.project, self.commit).resolve()
        words = ["git", "-C", str(self.project.repository), "ls-tree", "-rz", "--full-tree", self.commit]
        listed = subprocess.run(words, capture_output=True, text=True).stdout.split("\0")
        entries = (line.partition("\t") for line in listed if line)
        return {path: (str(tree / path), entry) for entry, _, path in entries}

    @functools.cached_property
    def _inventory(self) -> tuple[dict[str, tuple[str, str]], str]:
        """`files`, and a digest of everything else that is installed."""
        done = self._ask(_FILES)
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"files": {}, "rest": ""}
        return {name: (place, digest) for name, (place, digest) in found["files"].items()}, found["rest"]

    def _ask(self, code: str) -> "subprocess.CompletedProcess[str]":
        """Run code in the environment, where no folder of the project is on the path."""
        words, place = [self.python, "-c", code], Path(self.python).parent
        return subprocess.run(words, capture_output=True, text=True, env=self.variables, cwd=place)

    def packages(self) -> dict[str, str]:
        """Versions of what is installed beside the project."""
        done = self._ask(_PACKAGES)
        built = self.project.folder / self.config.env_dir
        return other_packages(json.loads(done.stdout or "[]"), self.config.project, built)


def changed_places(base: Build, head: Build) -> dict[str, set[str]] | None:
    """Where the files lie that differ between two builds, by side; None if that is unknown.

    Also None if other files than Python's, texts and the record of a distribution differ: a compiled module
    or data may be read unseen. Likewise if no file differs: what does is not among them.
    """
    files = {"base": base.files(), "head": head.files()}
    names = {
        name for name in files["base"].keys() | files["head"].keys()
        if files["base"].get(name, ("", ""))[1] != files["head"].get(name, ("", ""))[1]
    }  # fmt: skip
    seen = all(name.endswith((".py", ".md", ".rst")) or ".dist-info/" in name for name in names)
    if not names or not seen or not all(files.values()):
        return None
    return {side: {own[name][0] for name in names if name in own} for side, own in files.items()}


# Run in the environment's interpreter.
_ORIGINS = """
import importlib.metadata as metadata, importlib.util, json, re, sys
project, *names = sys.argv[1:]
owners, found = metadata.packages_distributions(), {}
for name in names:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        continue
    places = [spec.origin] if spec and spec.origin else list(spec and spec.submodule_search_locations or ())
    if places and places[0] not in ("built-in", "frozen") and name not in sys.stdlib_module_names:
        ours = any(re.sub("[-_.]+", "-", owner).lower() == project for owner in owners.get(name, ()))
        found[name] = places[0], ours
print(json.dumps(found))
"""
_FILES = """
import hashlib, json, os, sys
from importlib.metadata import distributions
notes, files, rest = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}, {}, [sys.version]
for package in distributions():
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    in_place = origin.get("dir_info", {}).get("editable")
    if in_place or package.files is None or package.read_text("RECORD") is None:
        sys.exit(1)
    here = origin.get("url", "").startswith("file:")
    for file in package.files:
        if file.suffix == ".pyc" or (file.parent.suffix == ".dist-info" and file.name in notes):
            continue
        if here:  # scripts name the interpreter, which lies elsewhere in each environment
            place = os.path.realpath(file.locate())
            content = open(place, "rb").read().replace(sys.prefix.encode(), b"")
            files[str(file)] = place, hashlib.sha256(content).hexdigest()
        elif file.hash and file.parent.name != "bin":
            rest.append(f"{file} {file.hash.value}")
print(json.dumps({"files": files, "rest": "\\n".join(sorted(rest))}))
"""
_DIRECTIONS = """
import json, sys
from asv_runner._aux import update_sys_path
from asv_runner.discovery import disc_benchmarks
update_sys_path(sys.argv[1])
found = {}
for benchmark in disc_benchmarks(sys.argv[1], ignore_import_errors=True):
    declared = [s.higher_is_better for s in benchmark._attr_sources if hasattr(s, "higher_is_better")]
    if declared:
        found[benchmark.name] = bool(declared[0])
print(json.dumps(found))
"""
_PACKAGES = """
import json
from importlib.metadata import distributions
print(json.dumps([
    (d.metadata["Name"], d.version, json.loads(d.read_text("direct_url.json") or "{}").get("url", ""))
    for d in distributions() if d.metadata["Name"]
]))
"""


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it.

    >>> normalised("My_Lib.core")
    'my-lib-core'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def other_packages(installed: Iterable[Sequence[str]], project: str, built: Path) -> dict[str, str]:
    """Versions by name of the distributions that are not the project.

    The project is what was installed from asv's folder `built`, whatever its distribution is called, or bears
    the project's name.

    Args:
        installed: name, version and address of origin (or "") of each distribution.
    """
    found = {}
    for name, version, source in installed:
        local = Path(unquote(urlsplit(source).path)) if source.startswith("file:") else None
        ours = local is not None and local.resolve().is_relative_to(built.resolve())
        if not ours and normalised(name) != normalised(project):
            found[normalised(name)] = version
    return found


def imported(files: Iterable[Path]) -> set[str]:
    """The top-level modules that files import, wherever in their code."""
    found = set()
    for path in files:
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):  # asv says why it cannot be imported
            continue
        for node in nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


# Folders whose modules bear the names of packages, and are not they.
_NO_ROOTS = {
    "tests", "test", "docs", "doc", "examples", "benchmarks", "third_party", "vendor", "extern", "external"
}  # fmt: skip


def _roots(tree: Path) -> Iterator[Path]:
    """Folders of a repository that may hold packages: its top, and subfolders that are no package."""
    yield tree
    for folder in sorted(path for path in tree.iterdir() if path.is_dir()):
        if (
            folder.name not in _NO_ROOTS
            and not folder.name.startswith(".")
            and not (folder / "__init__.py").exists()
        ):
            yield folder
            yield from (
                path for path in sorted(folder.iterdir()) if path.is_dir() and path.name in ("src", "lib")
            )


def _holds(root: Path, name: str) -> bool:
    return (root / f"{name}.py").is_file() or (root / name / "__init__.py").is_file()


def builds_of(project: Project, commit: str) -> list[Build]:
    """A commit in every environment of the project's matrix."""
    count = len(find_environments(project, project.config))
    return [Build(project, commit, which=i) for i in range(count)]


def environment_labels(environments: Sequence[Any]) -> list[str]:
    """A label for each of asv's environments: what it differs in from the others.

    One environment has the label "".
    """
    facts = [{"python": env.python} | dict(env.requirements) | dict(env.env_vars) for env in environments]
    names = sorted({name for fact in facts for name in fact if len({str(f.get(name)) for f in facts}) > 1})
    return [", ".join(f"{name}={fact.get(name)}" for name in names) for fact in facts]


def find_environments(project: Project, config: Any) -> list[Any]:
    """asv's environments of the project's matrix."""
    from asv import environment
    from asv.console import log
    from asv.environment import EnvironmentUnavailable

    reasons: list[str] = []
    with _asv_in(project.folder):
        warning, log.warning = log.warning, lambda message, *rest, **options: reasons.append(str(message))
        try:
            found = list(environment.get_environments(config, None, verbose=True))
        except (EnvironmentUnavailable, RuntimeError) as error:  # the latter if there is no environment_type
            reasons.append(str(error))
            found = []
        finally:
            log.warning = warning
    if not found:
        _no_environment(config, " ".join(" ".join(reasons).split()) or "none")
    return found


# What asv's kinds of environment need, beside asv.
_TOOLS = {"uv": "uv", "conda": "conda", "mamba": "libmambapy", "rattler": "py-rattler"}


def _no_environment(config: Any, reason: str) -> NoReturn:
    kind = config.environment_type
    remedy = f"Install {_TOOLS[kind]}, or set" if kind in _TOOLS else "" if kind else "Set"
    remedy += remedy and ' environment_type to "virtualenv".'
    cannot("make an environment of asv.conf.json", reason.rstrip("."), remedy)


def _last_line(error: Exception) -> str:
    lines = str(getattr(error, "stderr", "") or error).strip().splitlines() or ["no reason given"]
    return lines[-1].strip()[:300]


def cases(benchmarks: dict[str, dict[str, Any]]) -> list[Case]:
    """Every combination of parameters of every benchmark."""
    # The timeout of each setup_cache: its own, or the longest of the benchmarks that share it, as in asv.
    limits: dict[str, float] = {}
    for entry in benchmarks.values():
        key, limit = entry.get("setup_cache_key"), entry.get("setup_cache_timeout") or entry["timeout"]
        if key is not None:
            limits[key] = max(float(limit), limits.get(key, 0.0))
    return [
        Case(
            name, i, params, entry["type"], entry["unit"], str(entry["version"]),
            float(entry["timeout"]), entry.get("setup_cache_key"),
            limits.get(entry.get("setup_cache_key") or "", 0.0), higher_is_better(entry),
        )
        for name, entry in sorted(benchmarks.items())
        for i, params in enumerate(itertools.product(*entry["params"]))
    ]  # fmt: skip


def worktree(project: Project, commit: str) -> Path:
    """Check the commit out into a folder that later builds reuse."""
    tree = project.results.parent.resolve() / "trees" / commit
    if not tree.is_dir():
        tree.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            (tree.parent / ".gitignore").write_text("*\n")
        fresh = tree.with_suffix(f".{os.getpid()}")
        _extract(project.repository, commit, fresh)
        with contextlib.suppress(OSError):  # another process was first
            fresh.rename(tree)
    return tree


def _extract(repository: Path, commit: str, folder: Path) -> None:
    """Write a commit's files into a folder, and those of its submodules, which must be checked out."""

    def git(*words: str) -> bytes:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True)
        if done.returncode:
            reason = done.stderr.decode().strip()
            raise BuildFailed(f"{commit[:8]} cannot be checked out: {reason}")
        return done.stdout

    with tarfile.open(fileobj=io.BytesIO(git("archive", f"{commit}:"))) as archive:
        # links as git makes them, wherever they lead; Python 3.11.0 to 3.11.3 knows no filters
        archive.extraction_filter = getattr(tarfile, "tar_filter", None)
        archive.extractall(folder)
    for line in git("ls-tree", "-rz", "--full-tree", commit).decode().split("\0"):
        kind, _, path = line.partition("\t")
        if kind.startswith("160000 "):
            if not (repository / path / ".git").exists():
                raise BuildFailed(
                    f"{commit[:8]} cannot be checked out: its submodule {path} is missing. Run git submodule "
                    "update --init --recursive."
                )
            _extract(repository / path, kind.split()[2], folder / path)


@contextlib.contextmanager
def _asv_in(folder: Path) -> Iterator[None]:
    """Where asv reads the paths of its configuration from; its own progress is not shown."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        yield
