"""Security rules for the workflows and action.yml. `python .github/rules.py` prints every violation.

A fork's code runs on hosted machines only, with no permission to write; every job has the permissions that
its steps need, and no other.

The tests break each rule in a copy of a workflow, and check that the violation is found.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "workflows"
ACTION = Path(__file__).parents[1] / "action.yml"
# Events that may start a job on a self-hosted machine. A fork or a stranger's comment cannot cause them.
OURS = {"push": {"branches": ["main"]}, "schedule": ..., "workflow_dispatch": ...}
HOSTED = re.compile(r"(ubuntu|windows|macos)-[\w.-]+")  # runs-on; any other value counts as self-hosted
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")
LOCAL = re.compile(r"\./\.github/workflows/[\w.-]+")  # a reusable workflow, which is checked like the others
VERSION = re.compile(r"uses: [^\s#]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
LEVELS = {"none": 0, "read": 1, "write": 2}
NEEDS = [  # action or pattern in the commands of a step, key in its `with`, permissions that it needs
    ("actions/checkout", "", {"contents": "read"}),
    ("actions/download-artifact", "run-id", {"actions": "read"}),
    ("actions/deploy-pages", "", {"pages": "write", "id-token": "write"}),
    ("pypa/gh-action-pypi-publish", "", {"id-token": "write"}),
    (re.compile(r"\bnox -s push\b"), "", {"contents": "write"}),
    (re.compile(r"\bgh api\b.*/(issues|pulls)/", re.S), "", {"pull-requests": "write"}),
]
FETCHES = re.compile(r"\bgit (clone|fetch|pull)\b|\bgh (pr checkout|repo clone|run download)\b|\b(nox|pip)\b")


def violations(text: str) -> list[str]:
    """Every violation in a workflow, one line each, beginning with the name of the rule.

    >>> violations("on: pull_request_target\\npermissions: {}\\njobs: {}")
    ['event: pull_request_target runs with our permissions on what a fork says']
    """
    data = yaml.safe_load(text)
    of_jobs = (line for name, job in data["jobs"].items() for line in _of_job(name, job))
    return [*_of_workflow(data), *_of_lines(text), *of_jobs]


def action_violations(text: str) -> list[str]:
    """Every violation in a composite action.

    >>> action_violations("runs: {steps: [{run: 'echo ${{ inputs.base }}'}]}")
    ['injection: action must not write an expression into commands; got inputs.base']
    """
    steps = yaml.safe_load(text)["runs"]["steps"]
    return [*_of_lines(text), *(line for step in steps for line in _of_step("action", step))]


def events(data: dict[str, Any]) -> dict[str, Any]:
    """Events that start a workflow, with their conditions. YAML 1.1 reads the key `on` as true."""
    on = data.get("on", data.get(True))
    return dict.fromkeys([on] if isinstance(on, str) else on) if not isinstance(on, dict) else on


def is_ours(job: dict[str, Any]) -> bool:
    """Whether a job may run on a self-hosted machine."""
    runner = job.get("runs-on", "")
    return "uses" not in job and not (isinstance(runner, str) and HOSTED.fullmatch(runner))


def _of_workflow(data: dict[str, Any]) -> Iterator[str]:
    started, jobs = events(data), data["jobs"]
    if "pull_request_target" in started:
        yield "event: pull_request_target runs with our permissions on what a fork says"
    if data.get("permissions") != {}:
        yield "permissions: the workflow must begin with none (permissions: {}), and each job name its own"
    ours = [name for name, job in jobs.items() if is_ours(job)]
    for event, conditions in started.items():
        wanted = OURS.get(event)
        if ours and (wanted is None or (wanted is not ... and conditions != wanted)):
            yield f"fork: {event} must not start {', '.join(ours)}, which may run on a machine of our own"
    publishes = any(str(step.get("uses")).startswith("actions/deploy-pages@") for step in _steps(jobs))
    if ours or publishes:
        group = data.get("concurrency")
        if not isinstance(group, dict) or "${{" in str(group.get("group", "${{")):
            yield "concurrency: one group for all runs must guard what measures or publishes"
        elif group.get("cancel-in-progress") is not False:
            yield "concurrency: what measures or publishes must not be cancelled (cancel-in-progress: false)"
    for name, job in jobs.items():
        if (ours or publishes) and "cancel-in-progress: true" in yaml.safe_dump(job.get("concurrency")):
            yield f"concurrency: {name} must not be cancelled"
    if "workflow_run" in started:
        for name, job in jobs.items():
            for step in job.get("steps", ()):
                checkout = str(step.get("uses")).startswith("actions/checkout")
                if checkout or FETCHES.search(step.get("run", "")):
                    yield f"workflow_run: {name} must fetch no code and run none"


def _of_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if re.match(r"\s*(- )?uses:", line) and "@" in line and not VERSION.search(line):
            yield f"pin: {line.strip()!r} must end with its version in a comment"


def _of_job(name: str, job: dict[str, Any]) -> Iterator[str]:
    if "timeout-minutes" not in job and "uses" not in job:
        yield f"timeout: {name} must have timeout-minutes"
    if job.get("secrets") == "inherit":
        yield f"secrets: {name} must not hand on all secrets"
    needed: dict[str, str] = {}
    for step in [job, *job.get("steps", ())]:
        yield from _of_step(name, step)
        uses, run, given = str(step.get("uses", "")), str(step.get("run", "")), step.get("with") or {}
        for what, word, levels in NEEDS:
            does = uses.startswith(what + "@") if isinstance(what, str) else what.search(run)
            if does and (not word or word in given):
                needed |= {k: v for k, v in levels.items() if LEVELS[v] > LEVELS[needed.get(k, "none")]}
    images = [job.get("container"), *(job.get("services") or {}).values()]
    for image in (i.get("image") if isinstance(i, dict) else i for i in images if i):
        if not re.search(r"@sha256:[0-9a-f]{64}$", str(image)):
            yield f"pin: {name} must pin the image {image} by its digest"
    yield from _of_permissions(name, job.get("permissions", {}), needed)


def _of_step(name: str, step: dict[str, Any]) -> Iterator[str]:
    uses, run, given = str(step.get("uses", "")), str(step.get("run", "")), step.get("with") or {}
    if uses and not PINNED.fullmatch(uses) and not LOCAL.fullmatch(uses):
        yield f"pin: {name} must pin {uses} by a commit's hash"
    if "${{" in run:
        what = run.split("${{")[1].partition("}}")[0].strip()
        yield f"injection: {name} must not write an expression into commands; got {what}"
    if uses.startswith("actions/checkout@") and given.get("persist-credentials") is not False:
        yield f"credentials: {name} must check out with persist-credentials: false"


def _of_permissions(name: str, given: Any, needed: dict[str, str]) -> Iterator[str]:
    if not isinstance(given, dict):
        yield f"permissions: {name} must name each permission; got {given}"
        return
    for scope in given | needed:
        has, wants = given.get(scope, "none"), needed.get(scope, "none")
        if LEVELS[has] > LEVELS[wants]:
            yield f"permissions: {name} must have no more than its steps need ({scope}: {wants}); got {has}"
        elif LEVELS[has] < LEVELS[wants]:
            yield f"permissions: {name} must have what its steps need ({scope}: {wants}); got {has}"


def _steps(jobs: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in jobs.values() for step in job.get("steps", ())]


def main() -> int:
    found = [
        (path.name, line) for path in sorted(FOLDER.glob("*.y*ml")) for line in violations(path.read_text())
    ]
    found += [(ACTION.name, line) for line in action_violations(ACTION.read_text())]
    for name, line in found:
        print(f"{name}: {line}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
