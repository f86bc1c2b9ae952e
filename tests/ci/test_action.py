"""action.yml: its commands run as GitHub runs them, and a careless change of it is caught."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ci.test_workflows import ROOT, rules
from tests.regress.foreign import git

TEXT = (ROOT / "action.yml").read_text()
ACTION = yaml.safe_load(TEXT)


def test_it_holds_to_the_rules():
    assert rules.action_violations(TEXT) == []


@pytest.mark.parametrize(
    ("written", "instead", "named"),
    [
        ('gate "$BASE"', "gate ${{ inputs.base }}", "injection: action"),
        ("@ea165f8d65b6e75b540449e92b4886f43607fa02 # v4.6.2", "@v4", "pin: action must pin"),
        (" # v4.6.2", "", "pin: 'uses: actions/upload-artifact@"),
    ],
)
def test_a_broken_copy_is_caught(written, instead, named):
    assert written in TEXT
    assert any(line.startswith(named) for line in rules.action_violations(TEXT.replace(written, instead)))


def act(folder, **inputs):
    """Run the step that gates; return its exit code, outputs and summary."""
    (step,) = (step for step in ACTION["runs"]["steps"] if step.get("id") == "gate")
    given = {name: str(entry["default"]) for name, entry in ACTION["inputs"].items()} | inputs
    values = {f"${{{{ inputs.{name} }}}}": value for name, value in given.items()}
    own = {name: values.get(text, "7") for name, text in step["env"].items()}
    temporary = folder / "runner"
    temporary.mkdir(exist_ok=True)
    files = {"GITHUB_OUTPUT": temporary / "output", "GITHUB_STEP_SUMMARY": temporary / "summary"}
    for file in files.values():
        file.write_text("")
    own |= {name: str(file) for name, file in files.items()} | {"RUNNER_TEMP": str(temporary)}
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(words, cwd=folder, env=os.environ | own, capture_output=True, text=True)
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    assert (temporary / "gate/number").read_text() == "7\n"
    return done, outputs, files["GITHUB_STEP_SUMMARY"].read_text()


@pytest.fixture
def tool(workplace):
    """A shell script that fails in its second commit."""
    git(workplace, "init", "--quiet", "--initial-branch", "main")
    (workplace / ".gitignore").write_text("runner/\n.asv/\n")
    for text in ("test $1 = 'a b'\n", "exit 3\n"):
        (workplace / "tool.sh").write_text(text)
        git(workplace, "add", "--all")
        git(workplace, "commit", "--quiet", "--message", text)
    return workplace


WORDS = """--command "sh tool.sh 'a b'" --bench 'time_command'"""


def test_a_verdict_is_the_job_s(tool):
    done, outputs, summary = act(tool, base="HEAD", arguments=WORDS)
    assert (done.returncode, outputs["verdict"]) == (0, "PASS"), done.stderr
    assert "identical" in summary
    assert json.loads(Path(outputs["json"]).read_text())["machine"] == "hosted"
    done, outputs, summary = act(tool, arguments=WORDS)
    assert (done.returncode, outputs["verdict"]) == (3, "BROKEN"), done.stderr
    assert "exit code 3" in summary
    done, outputs, summary = act(tool, base="nothing", arguments=WORDS)
    assert (done.returncode, outputs, summary) == (2, {}, "")
    assert "a revision must name a commit" in done.stderr


def test_inconclusive_passes_unless_asked(tool, monkeypatch):
    stub = tool / "runner/bin"
    stub.mkdir(parents=True)
    (stub / "python").write_text(
        f'#!/bin/sh\n[ "$2 $3" = "-m projecta" ] && exit 5\nexec {sys.executable} "$@"\n'
    )
    (stub / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub / "python"))
    assert act(tool)[0].returncode == 0
    assert act(tool, inconclusive="fail")[0].returncode == 5
