"""One machine as GitHub: a bare repository, runners, artifacts and Pages in a folder. It runs workflows.

What a step says in `run` runs as it is written. An action is replaced by what it does to folders.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WITHOUT_GPU = {"nox -s preflight -- --gpu": "nox -s preflight -- --load 1000"}  # what cannot be done here
# A runner of our own keeps its environments. Results are taken from it: the branch has to bring them.
STAYS = (".nox", ".asv/env", ".asv/env-base")
IDENTITY = ("-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost")
_WORDS = re.compile(r"\s*('(?:[^']|'')*'|&&|\|\||==|!=|[!()]|-?\d+(?:\.\d+)?|[A-Za-z_][\w.-]*)")
_STATUS = re.compile(r"\b(always|success|failure|cancelled)\(")

Status = Callable[[str], bool]  # always, cancelled, failure, success


@dataclass(frozen=True)
class Event:
    """What happened at the stand-in: as the `github` context names it."""

    name: str
    sha: str
    ref: str = "refs/heads/main"
    payload: dict[str, Any] = field(default_factory=dict)
    workflow: str = ""  # that has completed, of a workflow_run

    @property
    def branch(self) -> str:
        return self.ref.removeprefix("refs/heads/")


@dataclass
class Job:
    """A job with one choice of its matrix."""

    name: str
    steps: list[dict[str, Any]]
    data: dict[str, Any]
    matrix: dict[str, Any]


def git(folder: Path, *words: str, **variables: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *IDENTITY, *words], check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | variables,
    )  # fmt: skip
    return done.stdout.strip()


def evaluate(expression: str, context: dict[str, Any], status: Status = lambda name: True) -> Any:
    """The value of a workflow's expression; what is not there is empty.

    >>> evaluate("inputs.range || 'NEW'", {})
    'NEW'
    """
    python, place, text = [], 0, expression.strip()
    while place < len(text):
        found = _WORDS.match(text, place)
        if not found:
            raise ValueError(f"rehearse: an expression must be one that it knows; got {expression!r}.")
        word, place = found[1], found.end()
        if word in ("&&", "||", "!"):
            python.append({"&&": " and ", "||": " or ", "!": " not "}[word])
        elif word[0] == "'":
            python.append(repr(word[1:-1].replace("''", "'")))
        elif word in ("true", "false", "null"):
            python.append({"true": "True", "false": "False", "null": "None"}[word])
        elif text[place : place + 1] == "(" and word[0].isalpha():
            if not _STATUS.match(word + "("):
                raise ValueError(f"rehearse: a function must be one that it knows; got {word}.")
            python.append(f"status({word!r}, ")
            place += 1
        elif word[0].isalpha() or word[0] == "_":
            python.append(f"value({word!r})")
        else:
            python.append(word)
    names = {"value": lambda name: lookup(context, name), "status": status, "__builtins__": {}}
    return eval("".join(python), names)


def status_after(*results: str) -> Status:
    """What the words of an `if` say after these results."""
    bad = any(result != "success" for result in results)
    return lambda word: {"always": True, "cancelled": False, "failure": bad, "success": not bad}[word]


def lookup(context: dict[str, Any], name: str) -> Any:
    found: Any = context
    for word in name.split("."):
        found = found.get(word, "") if isinstance(found, dict) else ""
    return found


def fill(value: Any, context: dict[str, Any]) -> str:
    """A value of the workflow with its expressions filled in."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda match: str(evaluate(match[1], context)), str(value))


def condition(text: Any, context: dict[str, Any], status: Status) -> bool:
    """Whether an `if` holds; without a word on the status, what went before must have succeeded."""
    words = re.sub(r"^\$\{\{(.*)\}\}$", r"\1", str(text).strip())
    if not _STATUS.search(words):
        words = f"success() && ({words})"
    return bool(evaluate(words, context, status))


def jobs_of(data: dict[str, Any]) -> Iterator[tuple[str, list[Job]]]:
    """The jobs, each after those that it needs, with all choices of its matrix."""
    left = dict(data["jobs"])
    while left:
        ready = [name for name, job in left.items() if not set(needs(job)) & set(left)]
        if not ready:
            raise ValueError(f"rehearse: jobs must not need each other; got {', '.join(left)}.")
        for name in ready:
            job = left.pop(name)
            axes = job.get("strategy", {}).get("matrix", {})
            choices = [dict(zip(axes, choice, strict=True)) for choice in product(*axes.values())]
            yield name, [Job(name, job["steps"], job, choice) for choice in choices]


def needs(job: dict[str, Any]) -> list[str]:
    named = job.get("needs", [])
    return [named] if isinstance(named, str) else named


class Stage:
    """The stand-in for GitHub, its machines and its Pages, in one folder."""

    def __init__(self, room: Path, bench: str):
        self.room, self.bare, self.work = room, room / "origin.git", room / "work"
        self.artifacts, self.published, self.kept = room / "artifacts", room / "published", room / "kept"
        self.bench, self.bin = bench, room / "bin"
        self.bin.mkdir(parents=True)
        subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(self.bare)], check=True)
        git(self.bare, "config", "uploadpack.allowAnySHA1InWant", "true")  # as GitHub does

    def push(self, commit: str, ref: str = "refs/heads/main", source: Path = ROOT) -> None:
        git(source, "-c", "core.hooksPath=/dev/null", "push", "--quiet", str(self.bare), f"{commit}:{ref}")

    def run(self, data: dict[str, Any], event: Event, only: str = "") -> dict[str, str]:
        """Run a workflow's jobs, or one of them, and what became of each."""
        ended: dict[str, str] = {}
        for name, choices in jobs_of(data):
            if only and name != only:
                continue
            before = [] if only else _ancestors(data["jobs"], name)
            context = {"github": _github(event), "needs": {n: {"result": ended[n]} for n in before}}
            status = status_after(*(ended[n] for n in before))
            if not condition(choices[0].data.get("if", "success()"), context, status):
                ended[name] = "skipped"
                say(f"{data['name']} / {name}: skipped")
                continue
            results = [self.job(data, job, context, event) for job in choices]
            ended[name] = "failure" if "failure" in results else "success"
        return ended

    def job(self, data: dict[str, Any], job: Job, context: dict[str, Any], event: Event) -> str:
        """Run one job in a fresh clone; its result."""
        shutil.rmtree(self.work, ignore_errors=True)
        temp = self.room / "temp"
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        self.work.mkdir()
        context = context | {"matrix": job.matrix, "steps": {}, "runner": {"temp": str(temp)}}
        variables = self.variables(temp, event)
        title = f"{data['name']} / {job.name}" + "".join(f" ({v})" for v in job.matrix.values())
        say(f"{title}: runs-on {fill(job.data['runs-on'], context)}")
        failed = False
        for step in job.steps:
            told = step.get("name") or step.get("uses") or step["run"].splitlines()[0]
            status = status_after("failure" if failed else "success")
            if not condition(step.get("if", "success()"), context, status):
                say(f"  {told}: skipped")
                outcome = "skipped"
            else:
                say(f"  {told}")
                scopes = (data, job.data, step)
                own = {k: fill(v, context) for part in scopes for k, v in (part.get("env") or {}).items()}
                good = self.step(step, context, variables | own, temp, event)
                failed, outcome = failed or not good, "success" if good else "failure"
            if "id" in step:
                known = context["steps"].setdefault(step["id"], {})
                known |= {"outcome": outcome, "outputs": _pairs(temp / "output")}
        self.put_away()
        say(f"{title}: {'failed' if failed else 'succeeded'}")
        return "failure" if failed else "success"

    def step(
        self, step: dict[str, Any], context: dict[str, Any], variables: dict[str, str], temp: Path,
        event: Event,
    ) -> bool:  # fmt: skip
        """Run one step; whether it succeeded."""
        if "uses" in step:
            given = {k: fill(v, context) for k, v in (step.get("with") or {}).items()}
            action = step["uses"].partition("@")[0]
            if action not in ACTIONS:
                raise ValueError(f"rehearse: an action must be one of {', '.join(ACTIONS)}; got {action}.")
            try:
                ACTIONS[action](self, given, temp, event)
            except (OSError, subprocess.CalledProcessError) as error:
                say(f"    {error}")
                return False
            return True
        commands = step["run"]
        for written, here in WITHOUT_GPU.items():
            if written in commands:
                commands = commands.replace(written, here)
                say(f"    on a machine without a GPU: {here}")
        script = temp / "step.sh"
        script.write_text(commands)
        path = [*reversed(_lines(temp / "path")), variables["PATH"]]
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        own = variables | {"PATH": os.pathsep.join(path)}
        return subprocess.run(words, cwd=self.work, env=own).returncode == 0

    def variables(self, temp: Path, event: Event) -> dict[str, str]:
        """A runner's environment, and a home in which asv can note its machines."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("NOX", "VIRTUAL_ENV", "GITHUB_"))}
        home = self.room / "home"
        home.mkdir(exist_ok=True)
        for name in (".cache", ".config", ".gitconfig", ".pip"):
            there = Path.home() / name
            if there.exists() and not (home / name).exists():
                (home / name).symlink_to(there)
        for name in ("output", "path", "summary", "env"):
            (temp / name).touch()
        return own | {
            "CI": "true", "HOME": str(home), "RUNNER_TEMP": str(temp), "GITHUB_OUTPUT": str(temp / "output"),
            "GITHUB_PATH": str(temp / "path"), "GITHUB_STEP_SUMMARY": str(temp / "summary"),
            "GITHUB_ENV": str(temp / "env"), "GITHUB_SHA": event.sha, "GITHUB_REF": event.ref,
            "GITHUB_EVENT_NAME": event.name, "GITHUB_REPOSITORY": "owner/project",
            "PROJECTA_BENCH": self.bench, "PATH": f"{self.bin}{os.pathsep}{own['PATH']}",
        }  # fmt: skip

    def put_away(self) -> None:
        """Keep what a runner would, at the one path that environments can stand at."""
        for name in STAYS:
            if (self.work / name).exists():
                target = self.kept / name
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                (self.work / name).rename(target)
        shutil.rmtree(self.work, ignore_errors=True)

    def checkout(self, given: dict[str, str], temp: Path, event: Event) -> None:
        wanted = given.get("ref") or event.sha
        git(self.work, "init", "--quiet")
        git(self.work, "remote", "add", "origin", f"file://{self.bare}")
        if given.get("fetch-depth") == "0":
            git(self.work, "fetch", "--quiet", "origin", "+refs/heads/*:refs/remotes/origin/*", wanted)
        else:
            git(self.work, "fetch", "--quiet", "--depth=1", "origin", wanted)
        git(self.work, "checkout", "--quiet", "--detach", wanted)
        for name in STAYS if given.get("clean") == "False" else STAYS[:1]:
            if (self.kept / name).exists():
                (self.work / name).parent.mkdir(exist_ok=True)
                (self.kept / name).rename(self.work / name)

    def setup_python(self, given: dict[str, str], temp: Path, event: Event) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(temp / "python")], check=True)
        with (temp / "path").open("a") as file:
            print(temp / "python/bin", file=file)

    def upload(self, given: dict[str, str], temp: Path, event: Event) -> None:
        """Each path, below what all have in common, as the action does."""
        paths = [self.work / line.strip() for line in given["path"].splitlines() if line.strip()]
        top = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0]
        target = self.artifacts / given.get("name", "github-pages")
        for path in paths:
            if path.is_dir():
                shutil.copytree(path, target / path.relative_to(top), dirs_exist_ok=True)
            elif path.is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.relative_to(top))
            else:
                say(f"    nothing at {path.relative_to(self.work)}")

    def download(self, given: dict[str, str], temp: Path, event: Event) -> None:
        target = self.work / given.get("path", ".")
        if "name" in given:
            shutil.copytree(self.artifacts / given["name"], target, dirs_exist_ok=True)
            return
        target.mkdir(parents=True, exist_ok=True)
        for path in self.artifacts.iterdir() if self.artifacts.is_dir() else ():
            if fnmatch(path.name, given.get("pattern", "*")):
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)

    def deploy(self, given: dict[str, str], temp: Path, event: Event) -> None:
        shutil.rmtree(self.published, ignore_errors=True)
        shutil.copytree(self.artifacts / "github-pages", self.published)
        with (temp / "output").open("a") as file:
            print(f"page_url=file://{self.published}/index.html", file=file)


ACTIONS: dict[str, Callable[[Stage, dict[str, str], Path, Event], None]] = {
    "actions/checkout": Stage.checkout,
    "actions/setup-python": Stage.setup_python,
    "actions/upload-artifact": Stage.upload,
    "actions/upload-pages-artifact": Stage.upload,
    "actions/download-artifact": Stage.download,
    "actions/deploy-pages": Stage.deploy,
}


def _github(event: Event) -> dict[str, Any]:
    base = event.payload.get("base_ref", "")
    return {
        "event_name": event.name, "event": event.payload, "sha": event.sha, "ref": event.ref, "token": "none",
        "repository": "owner/project", "base_ref": base,
    }  # fmt: skip


def _ancestors(jobs: dict[str, Any], name: str) -> list[str]:
    found: list[str] = []
    for one in needs(jobs[name]):
        found += [one, *_ancestors(jobs, one)]
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]


def _pairs(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in _lines(path) if "=" in line)


def say(line: str) -> None:
    print(f"rehearsal: {line}", flush=True)
