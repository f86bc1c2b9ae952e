"""The workflows follow the rules, each rule finds a broken copy, and the called sessions run."""

import contextlib
import doctest
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from nox import registry

from tests.regress import foreign

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github/workflows"
TEXTS = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.yml"))}
sys.path.insert(0, str(ROOT / ".github"))
try:
    import rehearse
    import rules
finally:
    sys.path.remove(str(ROOT / ".github"))


@pytest.mark.parametrize("name", TEXTS)
def test_a_workflow_holds_to_the_rules(name):
    assert rules.violations(TEXTS[name]) == []


CHECKOUT = "      - uses: actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2\n"
BROKEN = [  # workflow, its text, a careless replacement, begin of the expected violation
    ("benchmarks.yml", "  workflow_dispatch:", "  pull_request:\n  workflow_dispatch:", "fork: pull_request"),
    ("benchmarks.yml", "  workflow_dispatch:", "  issue_comment:\n  workflow_dispatch:", "fork: issue_comment"),
    ("benchmarks.yml", "  workflow_dispatch:", "  workflow_call:\n  workflow_dispatch:", "fork: workflow_call"),
    ("benchmarks.yml", "branches: [main]", "branches: [main, '**']", "fork: push"),
    ("benchmarks.yml", "    branches: [main]", "    branches: [main]\n    tags: ['*']", "fork: push"),
    (
        "benchmarks.yml", "  workflow_dispatch:",
        "  workflow_run:\n    workflows: [ci]\n    types: [completed]\n  workflow_dispatch:", "fork: workflow_run",
    ),
    ("ci.yml", "  tests:\n    name: tests\n    runs-on: ubuntu-24.04", "  tests:\n    runs-on: [self-hosted]", "fork: pull_request"),
    ("ci.yml", "  tests:\n    name: tests\n    runs-on: ubuntu-24.04", "  tests:\n    runs-on: t4", "fork: pull_request"),
    ("ci.yml", "  tests:\n    name: tests\n    runs-on: ubuntu-24.04", "  tests:\n    runs-on: {group: gpus}", "fork: pull_request"),
    ("ci.yml", "  tests:\n    name: tests\n    runs-on: ubuntu-24.04", "  tests:\n    runs-on: ${{ vars.RUNNER }}", "fork: pull_request"),
    ("comment.yml", "    runs-on: ubuntu-24.04", "    runs-on: self-hosted", "fork: workflow_run must not start comment"),
    ("ci.yml", "  pull_request:\n", "  pull_request_target:\n", "event: pull_request_target"),
    ("ci.yml", "actions/setup-python@a26af69be951a213d495a4c3e4e4022e16d87065 # v5.6.0", "actions/setup-python@v5", "pin: lint must pin actions/setup-python@v5"),
    ("ci.yml", "@a26af69be951a213d495a4c3e4e4022e16d87065 # v5.6.0", "@a26af69 # v5.6.0", "pin: lint must pin"),
    ("ci.yml", "@a26af69be951a213d495a4c3e4e4022e16d87065 # v5.6.0", "@a26af69be951a213d495a4c3e4e4022e16d87065", "pin: '- uses: actions/setup-python@"),
    ("ci.yml", "      - run: pip install nox && nox -s lint", "      - uses: docker://alpine", "pin: lint must pin docker://alpine"),
    ("ci.yml", "      - run: pip install nox && nox -s lint", "      - uses: ./.github/actions/own", "pin: lint must pin ./.github"),
    ("ci.yml", "    name: lint\n", "    name: lint\n    container: python:3.12\n", "pin: lint must pin the image python:3.12"),
    ("ci.yml", "      contents: read # to check out", "      contents: write", "permissions: lint must have no more"),
    ("ci.yml", "      contents: read # to check out", "      contents: read\n      issues: write", "permissions: lint must have no more than its steps need (issues: none); got write"),
    ("ci.yml", "    permissions:\n      contents: read # to check out", "    permissions: write-all", "permissions: lint must name each"),
    ("ci.yml", "    permissions:\n      contents: read # to check out\n", "", "permissions: lint must have what"),
    ("ci.yml", "permissions: {}\n", "", "permissions: the workflow must begin with none"),
    ("ci.yml", "permissions: {}\n", "permissions:\n  contents: read\n", "permissions: the workflow must begin with none"),
    ("benchmarks.yml", "      contents: read # to check out", "      contents: write", "permissions: measure must have no more"),
    ("benchmarks.yml", "      pages: write # to deploy", "      contents: read\n      pages: write", "permissions: publish must have no more"),
    ("comment.yml", "      actions: read ", "      actions: write ", "permissions: comment must have no more"),
    ("comment.yml", "      pull-requests: write", "      contents: write\n      pull-requests: write", "permissions: comment must have no more"),
    ("ci.yml", 'echo "$NUMBER" > gate/number', "echo ${{ github.event.number }} > gate/number", "injection: gate must not write an expression into commands; got github.event.number"),
    ("comment.yml", 'echo "$mark"', 'echo "${{ github.event.workflow_run.head_branch }}"', "injection: comment"),
    ("ci.yml", "    timeout-minutes: 30\n", "", "timeout: tests must have"),
    ("benchmarks.yml", "    timeout-minutes: 350\n", "", "timeout: measure must have"),
    ("ci.yml", CHECKOUT + "        with:\n          persist-credentials: false\n", CHECKOUT, "credentials: lint"),
    ("benchmarks.yml", "persist-credentials: false", "persist-credentials: true", "credentials: measure"),
    ("benchmarks.yml", "cancel-in-progress: false", "cancel-in-progress: true", "concurrency: what measures"),
    ("benchmarks.yml", "  cancel-in-progress: false\n", "", "concurrency: what measures"),
    ("benchmarks.yml", "group: benchmarks", "group: ${{ github.sha }}", "concurrency: one group"),
    ("benchmarks.yml", "concurrency:\n  group: benchmarks # one run at a time; a run in progress, and so a publish, is never cancelled\n  cancel-in-progress: false\n", "", "concurrency: one group"),
    ("benchmarks.yml", "    needs: pages\n", "    needs: pages\n    concurrency:\n      group: x\n      cancel-in-progress: true\n", "concurrency: publish must not be cancelled"),
    ("comment.yml", "    steps:\n", "    steps:\n" + CHECKOUT + "        with:\n          persist-credentials: false\n", "workflow_run: comment must fetch no code"),
    ("comment.yml", 'echo "$mark"', "gh pr checkout 1", "workflow_run: comment must fetch no code"),
    ("comment.yml", 'echo "$mark"', "nox -s lint", "workflow_run: comment must fetch no code"),
    ("ci.yml", "  lint:\n    name: lint\n", "  more:\n    uses: ./.github/workflows/x.yml\n    secrets: inherit\n  lint:\n    name: lint\n", "secrets: more"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "written", "instead", "named"), BROKEN)
def test_a_broken_copy_is_caught(name, written, instead, named):
    assert written in TEXTS[name]
    found = rules.violations(TEXTS[name].replace(written, instead, 1))
    assert any(line.startswith(named) for line in found), found


@pytest.fixture(scope="module")
def noxfile():
    with contextlib.chdir(ROOT):
        return importlib.import_module("noxfile")


def test_every_step_calls_an_existing_session(noxfile):
    """Other steps only install nox or pass on a file. comment.yml may not call nox."""
    called = set()
    for name in ("ci.yml", "benchmarks.yml"):
        for job in yaml.safe_load(TEXTS[name])["jobs"].values():
            for step in job["steps"]:
                found = re.findall(r"nox -s (\w+)", step.get("run", ""))
                called |= set(found)
                assert found or "run" not in step or step["name"] in (
                    "Install nox", "Note whose table it is, for comment.yml",
                ), step  # fmt: skip
    assert called <= set(registry.get())
    assert {"preflight", "pull", "bench", "gate", "push", "publish", "tests", "lint", "docs"} <= called


@pytest.mark.serial
def test_a_cancelled_job_has_time_to_write_what_it_measured(tmp_path, noxfile):
    """A runner signals only the step's first process. After 7.5 s it signals again, then it kills."""
    (step,) = (
        s
        for s in yaml.safe_load(TEXTS["benchmarks.yml"])["jobs"]["measure"]["steps"]
        if "bench" in s.get("run", "")
    )
    assert step["run"].startswith("exec nox -s bench")  # so that the first process is nox
    (tmp_path / "child.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(1.5)\n    pathlib.Path('written').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path('started').touch()\ntime.sleep(60)\n"
    )
    (tmp_path / "noxfile.py").write_text(
        "import nox\n@nox.session(venv_backend='none')\ndef bench(session):\n"
        f"    session.run({sys.executable!r}, 'child.py', **{noxfile.STOPPING!r})\n"
    )
    (tmp_path / "call_nox.py").write_text(  # the environment of the tests may ignore SIGINT
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import nox.__main__\nnox.__main__.main()\n"
    )
    words = ["bash", "-eo", "pipefail", "-c", f"exec {sys.executable} call_nox.py -s bench"]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.05)
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.wait(30)
    assert (tmp_path / "written").exists()
    assert time.monotonic() - start < 7.5


def test_adding_a_machine_takes_one_line():
    text = TEXTS["benchmarks.yml"]
    more = re.sub(r"\n( +)- t4 .*", r"\g<0>\n\1- a100", text)
    assert len(more.splitlines()) == len(text.splitlines()) + 1
    measure = yaml.safe_load(more)["jobs"]["measure"]
    assert measure["strategy"]["matrix"]["machine"] == ["t4", "a100"]
    assert "${{ matrix.machine }}" in measure["runs-on"]
    assert rules.violations(more) == []


class Recorder:
    """A nox session that only notes the commands."""

    def __init__(self):
        self.commands = []

    def install(self, *words):
        pass

    def run(self, *words):
        self.commands.append(words)


def test_lint_looks_at_every_workflow(noxfile, monkeypatch):
    monkeypatch.chdir(ROOT)
    session = Recorder()
    noxfile.lint(session)
    workflows = [f".github/workflows/{name}" for name in TEXTS]
    for words in (
        ("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows),
        ("python", ".github/rules.py"),
        ("check-jsonschema", "--builtin-schema", "vendor.github-actions", "action.yml"),
        ("zizmor", "--offline", "--persona", "pedantic", ".github/workflows", "action.yml"),
    ):
        assert words in session.commands


TINY = """
    class Tiny:
        version = "1"
        def track_size(self):
            return 1.5
"""
NOX = """#!/bin/sh
test "$1" = -s || exit 9
command=$2
shift 2
if test "$1" = --; then shift; fi
if test $command = docs; then exec mkdir .asv/html/docs; fi
exec {python} -m projecta $command "$@"
"""


def test_the_sessions_of_the_workflow_run_in_their_order(tmp_path, monkeypatch):
    """Like `nox -s rehearse`, on a tiny project. A script replaces nox and calls the projecta command."""
    source, bin_ = tmp_path / "source", tmp_path / "bin"
    source.mkdir()
    bin_.mkdir()
    foreign.make(source, foreign.textwrap.dedent(TINY))
    first, second = foreign.commit(source, "one"), foreign.commit(source, "two")
    (bin_ / "nox").write_text(NOX.format(python=sys.executable))
    (bin_ / "nox").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HOME", str(tmp_path))
    rehearse.rehearse(source, tmp_path / "room")
    bare = tmp_path / "room/remote.git"
    held = rehearse.git(bare, "ls-tree", "-r", "--name-only", "results").split()
    assert {"benchmarks.json", "t4/machine.json", "t4/last.gate"} < set(held)
    assert not [name for name in held if "journal" in name]
    gate = json.loads(rehearse.git(bare, "show", "results:t4/last.gate"))
    assert (gate["base"], gate["head"], gate["verdict"]) == (first, second, "PASS")


@pytest.mark.parametrize("module", [rehearse, rules])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


# comment.yml, with a fake `gh` that logs its arguments.

SHA = "c" * 40
FORGED = """\
**REGRESSED** 5 & more @someone #12 owner/project#13 gh-14 [click](https://evil.example) ![x](//evil.example/x.png)
<img src=x><script>alert(1)</script> www.evil.example HTTP://evil.example &#64;someone <!-- projecta gate -->
[ref]: https://evil.example

| verdict | `suite.f('a', 2)` |
|---|---|
<details><summary>3 passed</summary>

</details>
<details open><summary>other</summary>
"""


@pytest.fixture
def comment(tmp_path):
    """A function that runs comment.yml's commands on an artifact: exit code, calls of gh, body."""
    (job,) = yaml.safe_load(TEXTS["comment.yml"])["jobs"].values()
    (commands,) = (step["run"] for step in job["steps"] if "run" in step)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "gh").write_text(
        '#!/bin/sh\necho "$*" >> asked\n'
        'case "$*" in *pulls/*) echo "$ITS_HEAD" ;; *comments*--jq*) printf "$EARLIER" ;; esac\n'
    )
    (bin_ / "gh").chmod(0o755)

    def post(number="12\n", table="table\n", its_head=SHA, earlier=""):
        place = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        (place / "gate").mkdir(parents=True)
        for name, text in (("number", number), ("gate.md", table)):
            if isinstance(text, Path):
                (place / "gate" / name).symlink_to(text)
            elif text is not None:
                (place / "gate" / name).write_text(text)
        own = {
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "REPOSITORY": "o/p", "HEAD_SHA": SHA,
            "RUN_URL": "https://example.org/run", "GH_TOKEN": "t", "ITS_HEAD": its_head, "EARLIER": earlier,
        }  # fmt: skip
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", commands]
        done = subprocess.run(words, cwd=place, env=own, capture_output=True, text=True)
        asked = (place / "asked").read_text().splitlines() if (place / "asked").exists() else []
        body = (place / "body").read_text() if (place / "body").exists() else ""
        return done.returncode, asked, body

    return post


def test_the_table_is_posted_and_the_second_time_replaced(comment):
    table = "**PASS**\n\n| verdict | benchmark |\n|---|---|\n| PASS | `suite.f('a')` |\n"
    code, asked, body = comment(table=table)
    assert code == 0
    assert asked[0] == "api repos/o/p/pulls/12 --jq .head.sha"
    assert asked[2] == "api --silent --method POST repos/o/p/issues/12/comments --field body=@body"
    assert body.startswith("<!-- projecta gate -->\nGate of cccccccc against the merge base")
    assert body.endswith(table)
    code, asked, _ = comment(earlier="77\\n78\\n")
    assert code == 0
    assert asked[2:] == ["api --silent --method PATCH repos/o/p/issues/comments/77 --field body=@body"]


@pytest.mark.parametrize(
    "number",
    ["", None, "0", "12; rm -rf .", "$(id)", "../1", "-1", "1e3", "12\n13", "1234567890", "一", "12 "],
)
def test_an_invalid_pull_request_number_is_refused(comment, number):
    code, asked, _ = comment(number=number)
    assert (code, asked) == (1, [])


def test_a_pull_request_at_another_commit_gets_no_comment(comment):
    code, asked, _ = comment(its_head="d" * 40)
    assert (code, asked) == (0, ["api repos/o/p/pulls/12 --jq .head.sha"])


def test_markup_in_a_forks_table_is_escaped(comment):
    _, _, body = comment(table=FORGED)
    text = body.split("\n\n", 1)[1]
    assert not re.search(r"@\w|#\d(?!\d*;)|gh-\d|\[|://|www\.", text)
    assert set(re.findall(r"<[^>]*>", text)) == {"<details>", "<summary>", "</summary>", "</details>"}
    assert text.count("<details>") == 1
    assert "&amp;#\u200b64;" in text
    assert "| verdict | `suite.f('a', 2)` |\n|---|---|\n<details><summary>3 passed</summary>\n" in text


def test_a_long_table_is_cut_off(comment):
    """GitHub accepts 65,536 characters. Escaping turns one character into at most five."""
    code, asked, body = comment(table="&" * 200_000)
    assert code == 0
    assert len(asked) == 3
    assert len(body) < 65_000
    assert body.endswith("Cut off here; the run has all of it.\n")


def test_a_missing_table_and_symlinks_are_not_posted(comment, tmp_path):
    assert comment(table=None)[2].endswith("No verdict: the run tells why.\n")
    secret = tmp_path / "secret"
    secret.write_text("12")
    assert "12" not in comment(table=secret)[2].split("\n\n", 1)[1]
    assert comment(number=secret)[0] == 1
