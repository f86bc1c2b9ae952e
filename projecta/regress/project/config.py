"""An asv project: its configuration, its repository, and its settings in pyproject.toml."""

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from projecta._checks import fail
from projecta.regress.errors import UsageError, cannot


def find_root(folder: Path) -> Path:
    """The folder of the asv project around `folder`: the nearest with an asv.conf.json, or git's top."""
    top, here = find_top(folder, "find the project"), folder.resolve()
    around = [place for place in (here, *here.parents) if place == top or top in place.parents]
    return next((place for place in around if (place / "asv.conf.json").is_file()), top)


def find_top(folder: Path, aim: str) -> Path:
    """git's top around `folder`; `aim` says what cannot be done if there is none."""
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--show-toplevel"], capture_output=True, text=True
    )
    if done.returncode:
        cannot(aim, f"{folder} is not inside a git repository", "Change to the project's folder.")
    return Path(done.stdout.strip())


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
        if not path.is_file():
            cannot(
                "read the project", f"{folder} holds no asv.conf.json", "Run it at the top of an asv project."
            )
        try:
            self.config = Config.load(str(path))
        except (UserError, ValueError) as error:
            cannot("read asv.conf.json", error)
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
                cannot("import a plugin of asv.conf.json", reason)

    def prepare(self, tree: Path) -> str:
        """Make a commit's files, which are run where they lie, ready; return the reason if that fails."""
        return ""

    @property
    def report(self) -> Path:
        """Where `projecta report` writes by default, beside asv's results; git ignores it."""
        return self.results.parent / "report"

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
            cannot("open the repository of asv.conf.json", f"{self.config.repo!r}: {lines[-1]}")

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


def check_pattern(regex: str) -> str:
    """Compile a regular expression; UsageError if it is none."""
    try:
        re.compile(regex)
    except re.error as error:
        fail("projecta", "--bench", "be a regular expression", f"{regex!r}: {error}", error=UsageError)
    return regex


def gate_pattern(root: Path) -> str | None:
    """Pattern of gated benchmarks: `gate` of [tool.projecta]; None for all."""
    regex = read_setting(root, "gate")
    return None if regex is None else check_pattern(regex)


def short_suites(root: Path) -> str | None:
    """Pattern of what is measured without PROJECTA_FULL=1: all but `long` of [tool.projecta]; None for all.

    Those suites would skip themselves: a skip must not pass for a result.
    """
    long = read_setting(root, "long")
    if long is None or os.environ.get("PROJECTA_FULL") == "1":
        return None
    return f"^(?!.*(?:{check_pattern(long)}))"


def read_setting(root: Path, name: str) -> str | None:
    """A setting of [tool.projecta] in pyproject.toml."""
    import tomllib

    path = root / "pyproject.toml"
    try:
        settings = (
            tomllib.loads(path.read_text()).get("tool", {}).get("projecta", {}) if path.is_file() else {}
        )
    except tomllib.TOMLDecodeError as error:
        cannot("read pyproject.toml", error)
    found: str | None = settings.get(name)
    return found


def asv_command(root: Path, *words: str) -> list[str]:
    """The command line of asv in this interpreter's environment."""
    return [sys.executable, "-m", "asv", *words, "--config", str(root / "asv.conf.json")]
