"""Rehearses the workflows on one machine, without GitHub and without a GPU.

    python .github/rehearse.py [--gate] [--bench REGEX] [--room FOLDER]

A fork's pull request is shown to start nothing on a machine of our own. Then main is pushed to twice, and
each time the steps of benchmarks.yml run, as they are written, in fresh clones: what is measured, kept and
published the second time must hold both commits. With --gate a pull request from a fork follows: the gate of
ci.yml, and comment.yml with a `gh` that writes down what it is asked.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import rules
import yaml
from stage import ROOT, Event, Stage, git, say

BENCH = r"^scan\.(Scan|ScanPeak)\.\w+\('cpu', 512\)"  # a timing and a peak


def starts(data: dict[str, Any], event: Event) -> str:
    """Why an event does not start a workflow; "" if it does.

    >>> starts({"on": {"push": {"branches": ["main"]}}}, Event("pull_request", "1"))
    'its events are push; this is pull_request'
    """
    known = rules.events(data)
    if event.name not in known:
        return f"its events are {', '.join(known)}; this is {event.name}"
    conditions = known[event.name] or {}
    branches = conditions.get("branches") if isinstance(conditions, dict) else None
    if event.name in ("push", "pull_request") and branches:
        target = event.payload.get("base_ref") or event.branch
        if not any(fnmatch(target, pattern) for pattern in branches):
            return f"its branches are {', '.join(branches)}; this is {target}"
    if event.name == "workflow_run" and event.workflow not in conditions["workflows"]:
        return f"it follows {', '.join(conditions['workflows'])}; this is {event.workflow}"
    return ""


def snapshot(root: Path) -> str:
    """A commit of the working tree as it is, which no branch holds; HEAD if nothing has changed."""
    with tempfile.TemporaryDirectory() as room:
        index = {"GIT_INDEX_FILE": str(Path(room, "index"))}
        git(root, "read-tree", "HEAD", **index)
        git(root, "add", "--all", **index)
        tree = git(root, "write-tree", **index)
    if tree == git(root, "rev-parse", "HEAD^{tree}"):
        return git(root, "rev-parse", "HEAD")
    return git(root, "commit-tree", tree, "-p", "HEAD", "-m", "The working tree")


def child(root: Path, commit: str, message: str) -> str:
    """A further commit that changes nothing."""
    return git(root, "commit-tree", f"{commit}^{{tree}}", "-p", commit, "-m", message)


def lacks(pages: Path, commits: list[str]) -> list[str]:
    """What published pages do not have: the page, or values of one of the commits."""
    if not (pages / "index.html").is_file():
        return ["index.html"]
    revisions = json.loads((pages / "index.json").read_text())["revision_to_hash"]
    numbers = {commit: int(number) for number, commit in revisions.items()}
    drawn: set[int] = set()
    for path in (pages / "graphs").rglob("*.json"):
        points = json.loads(path.read_text())
        if isinstance(points, list) and "summary" not in path.parts:
            drawn |= {p[0] for p in points if isinstance(p, list) and p[1] not in (None, [], [None])}
    return [commit for commit in commits if numbers.get(commit) not in drawn]


_GH = """#!/bin/sh
echo "gh $*" >> {log}
case "$*" in *pulls/*) echo {sha} ;; esac
case "$*" in *body=@*) cat body >> {log} ;; esac
"""


def rehearse_pull_request(stage: Stage, workflows: dict[str, Any], event: Event) -> list[str]:
    """The gate of ci.yml for a fork's pull request, and what comment.yml makes of it; what went wrong."""
    log = stage.room / "comment.txt"
    (stage.bin / "gh").write_text(_GH.format(log=log, sha=event.sha))
    (stage.bin / "gh").chmod(0o755)
    run = {
        "event": "pull_request",
        "conclusion": "success",
        "head_sha": event.sha,
        "id": 1,
        "html_url": "run",
    }
    completed = Event("workflow_run", event.sha, payload={"workflow_run": run}, workflow="ci")
    problems = [
        *failed("ci.yml", stage.run(workflows["ci.yml"], event, only="gate")),
        *failed("comment.yml", stage.run(workflows["comment.yml"], completed)),
    ]
    if "--method POST" not in (log.read_text() if log.exists() else ""):
        return [*problems, "comment.yml: no comment was made"]
    say(f"the comment: {log}")
    return problems


def failed(workflow: str, ended: dict[str, str]) -> list[str]:
    return [f"{workflow}: {job}: {result}" for job, result in ended.items() if result != "success"]


def show_fork(workflows: dict[str, Any], event: Event) -> list[str]:
    """Say what a fork's pull request starts; what it must not start."""
    problems = []
    for name, data in workflows.items():
        reason = starts(data, event)
        ours = [job for job, known in data["jobs"].items() if rules.is_ours(known)]
        said = (
            f"refused: {reason}" if reason else f"starts, {'on OUR machines' if ours else 'on hosted ones'}"
        )
        say(f"a fork's pull request, {name}: {said}")
        problems += [f"{name}: a fork's pull request starts {job}" for job in ours if not reason]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Rehearse the workflows on this machine.")
    parser.add_argument("--bench", default=os.environ.get("PROJECTA_BENCH") or BENCH, metavar="REGEX")
    parser.add_argument("--room", type=Path, help="an empty folder; a temporary one by default")
    parser.add_argument("--gate", action="store_true", help="rehearse a pull request's gate and comment too")
    words = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="rehearsal-")) if words.room is None else words.room.resolve()
    room.mkdir(parents=True, exist_ok=True)
    texts = {path.name: path.read_text() for path in sorted(rules.FOLDER.glob("*.yml"))}
    workflows = {name: yaml.safe_load(text) for name, text in texts.items()}
    problems = [f"{name}: {line}" for name, text in texts.items() for line in rules.violations(text)]
    stage, first = Stage(room, words.bench), snapshot(ROOT)
    second = child(ROOT, first, "A further commit")
    forks = child(ROOT, second, "A fork's commit")
    pull = {"base_ref": "main", "pull_request": {"number": 1, "head": {"sha": forks}}}
    asked = Event("pull_request", forks, "refs/pull/1/merge", pull)
    problems += show_fork(workflows, asked)
    for commit in (first, second):
        stage.push(commit)
        say(f"push of {commit[:8]} to main")
        event = Event("push", commit)
        for name, data in workflows.items():
            if any(map(rules.is_ours, data["jobs"].values())) and not starts(data, event):
                problems += failed(name, stage.run(data, event))
        shutil.rmtree(stage.artifacts, ignore_errors=True)
    problems += [f"the pages lack {what}" for what in lacks(stage.published, [first, second])]
    if words.gate:
        stage.push(forks, "refs/pull/1/head")
        problems += rehearse_pull_request(stage, workflows, asked)
    shutil.rmtree(stage.kept, ignore_errors=True)
    say(f"published: {stage.published}/index.html")
    for line in problems:
        say(f"PROBLEM: {line}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
