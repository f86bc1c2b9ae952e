"""The results branch: pushes of runners, also at the same time, and pulls."""

import json
import os
import subprocess
import sys

import pytest

from projecta.regress.project.config import Project
from projecta.regress.store import branch
from tests.regress.foreign import commit, git, make, run, start

COLUMNS = ["result", "params", "version"]
ENTRY = {"version": "1", "unit": "seconds", "params": [], "param_names": []}


def results_file(hash_, **rows):
    return {"commit_hash": hash_, "env_name": "py", "result_columns": COLUMNS, "results": rows}


def put(folder, name, data):
    path = folder / ".asv/results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def fill(folder, machine, hash_, **rows):
    """Write results of one commit on one machine in asv's layout."""
    put(folder, f"{machine}/machine.json", {"machine": machine, "version": 1})
    put(folder, f"{machine}/{hash_[:8]}-py.json", results_file(hash_, **rows))
    put(folder, "benchmarks.json", {"version": 2} | {name: ENTRY for name in rows})
    put(folder, "journal.sqlite", "a database")


@pytest.fixture
def desks(tmp_path, monkeypatch):
    """A bare repository and two clones of it, each an asv project with one commit."""
    first, second, bare = tmp_path / "first", tmp_path / "second", tmp_path / "bare.git"
    first.mkdir()
    make(first)
    commit(first, "one")
    for words in (["init", "--bare", "-b", "main", bare], ["clone", bare, second]):
        if words[0] == "clone":
            git(first, "remote", "add", "origin", str(bare))
            git(first, "push", "--quiet", "origin", "main")
        subprocess.run(["git", *map(str, words), "--quiet"], check=True, capture_output=True)
    monkeypatch.chdir(first)
    monkeypatch.delenv(branch.TOKEN, raising=False)
    return first, second, bare


def on_branch(bare):
    """The files of the branch: path to text."""
    names = git(bare, "ls-tree", "-r", "--name-only", "results").split()
    return {name: git(bare, "show", f"results:{name}") for name in names}


def push(folder, machine, remote=None, **options):
    project = Project(folder)
    return branch.push(project, [(project.results, machine)], remote or branch.Remote(folder), **options)


def test_the_first_push_creates_the_branch(desks, monkeypatch):
    first, second, bare = desks
    assert run("pull", "--machine", "t4") == (0, "Fetched 0 new file(s) of results.\n")
    fill(first, "t4", "a" * 40, f=[[1.0]])
    put(first, "t4/last.gate", {"verdict": "PASS"})
    put(first, "t4/.hidden.json", {})
    put(first, "quarantine/machine.json", {})
    put(first, "nobody/aaaaaaaa-py.json", results_file("a" * 40))
    code, said = run("push", "--machine", "t4")
    assert (code, said.split(", commit")[0]) == (0, "3 file(s) are on branch results")
    assert set(on_branch(bare)) == {
        "benchmarks.ages", "benchmarks.json", "t4/aaaaaaaa-py.json", "t4/last.gate", "t4/machine.json",
    }  # fmt: skip
    assert git(bare, "log", "--format=%an: %s", "results") == "benchmark results: t4: results\n"
    monkeypatch.chdir(second)
    assert run("pull", "--machine", "a100") == (0, "Fetched 4 new file(s) of results.\n")
    for name in ("t4/aaaaaaaa-py.json", "t4/last.gate", "t4/machine.json"):
        assert (second / ".asv/results" / name).read_bytes() == (first / ".asv/results" / name).read_bytes()
    assert not list((second / ".asv/results").glob("*.ages"))
    assert not list((second / ".asv/results").glob(".writing-*"))
    assert run("pull", "--machine", "a100") == (0, "Fetched 0 new file(s) of results.\n")


def test_a_push_of_nothing_new_adds_no_commit(desks):
    first, _, bare = desks
    fill(first, "t4", "a" * 40, f=[[1.0]])
    before = push(first, "t4")
    assert push(first, "t4") == before
    assert git(bare, "rev-list", "--count", "results") == "1\n"


def test_a_push_without_results_is_an_error(desks):
    assert run("push", "--machine", "t4") == (4, "projecta: cannot push: no results of t4 yet.\n")
    assert git(desks[2], "branch", "--list", "results") == ""


def test_the_second_runner_merges_and_pushes_again(desks):
    """The other runner's push comes between this one's fetch and its push."""
    first, second, bare = desks
    fill(first, "t4", "a" * 40, f=[[1.0]])
    fill(second, "a100", "a" * 40, g=[[2.0]])
    waits = []

    class Raced(branch.Remote):
        def push(self, folder, commit):
            if not waits:
                push(second, "a100")
            return super().push(folder, commit)

    push(first, "t4", Raced(first), pause=waits.append)
    assert len(waits) == 1
    assert 0 <= waits[0] <= 0.5
    held = on_branch(bare)
    assert {"t4/aaaaaaaa-py.json", "a100/aaaaaaaa-py.json"} < set(held)
    assert set(json.loads(held["benchmarks.json"])) == {"f", "g", "version"}
    assert git(bare, "rev-list", "--count", "--first-parent", "results") == "2\n"


def test_two_runners_that_finish_at_once(desks):
    """Two processes push several commits each. The branch has all results, in a linear history."""
    first, second, bare = desks
    machines = {"t4": first, "a100": second}
    for count in range(3):
        hash_ = f"{count}" * 40
        for machine, folder in machines.items():
            fill(folder, machine, hash_, **{machine: [[float(count)]]})
        both = [start(folder, "push", "--machine", machine) for machine, folder in machines.items()]
        for process in both:
            said = process.communicate(timeout=60)[0]
            assert process.returncode == 0, said
        assert {f"{m}/{hash_[:8]}-py.json" for m in machines} < set(on_branch(bare))
    held = on_branch(bare)
    assert sum(name.endswith("-py.json") for name in held) == 6
    assert set(json.loads(held["benchmarks.json"])) == {"t4", "a100", "version"}
    assert git(bare, "rev-list", "--count", "--first-parent", "results") == "6\n"


def test_a_runner_changes_no_other_machine(desks):
    """Its local copy of another machine's results is stale."""
    first, second, bare = desks
    fill(second, "a100", "a" * 40, f=[[1.0]])
    push(second, "a100")
    branch.pull(Project(first), "t4", branch.Remote(first))
    fill(second, "a100", "a" * 40, f=[[2.0]])
    push(second, "a100")
    fill(first, "t4", "b" * 40, f=[[3.0]])
    push(first, "t4")
    assert json.loads(on_branch(bare)["a100/aaaaaaaa-py.json"])["results"] == {"f": [[2.0]]}


def test_rows_that_only_the_branch_has_stay(desks):
    """A new runner with one benchmark, or a runner that lost its disk, removes no rows."""
    first, second, bare = desks
    fill(first, "t4", "a" * 40, f=[[1.0]], g=[[1.0]])
    push(first, "t4")
    fill(second, "t4", "a" * 40, g=[[2.0]])
    push(second, "t4")
    held = json.loads(on_branch(bare)["t4/aaaaaaaa-py.json"])
    assert held == results_file("a" * 40, f=[[1.0]], g=[[2.0]])
    branch.pull(Project(second), "t4", branch.Remote(second))
    assert json.loads((second / ".asv/results/t4/aaaaaaaa-py.json").read_text()) == held


def test_a_pull_keeps_the_results_of_this_machine(desks):
    first, _, _ = desks
    fill(first, "t4", "a" * 40, f=[[1.0]])
    push(first, "t4")
    fill(first, "t4", "a" * 40, f=[[5.0]])
    branch.pull(Project(first), "t4", branch.Remote(first))
    path = first / ".asv/results/t4/aaaaaaaa-py.json"
    assert json.loads(path.read_text())["results"] == {"f": [[5.0]]}
    branch.pull(Project(first), "another", branch.Remote(first))
    assert json.loads(path.read_text())["results"] == {"f": [[1.0]]}


@pytest.mark.parametrize("newer_first", [True, False])
def test_the_description_of_the_newer_commit_wins(desks, newer_first):
    """The order of the pushes does not matter. The other descriptions are merged."""
    old, new, bare = desks
    (new / "file").write_text("newer")
    git(new, "add", "--all")
    env = os.environ | {"GIT_COMMITTER_DATE": "2090-01-01T00:00:00Z"}
    words = ["git", "-C", str(new), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*words, "commit", "--quiet", "--message", "newer"], check=True, env=env)
    for folder, machine, version, name in ((old, "t4", "1", "gone"), (new, "a100", "2", "added")):
        fill(folder, machine, "a" * 40)
        entries = {"both": ENTRY | {"version": version}, name: ENTRY, "version": 2}
        put(folder, "benchmarks.json", entries)
    for folder, machine in [(new, "a100"), (old, "t4")][:: 1 if newer_first else -1]:
        push(folder, machine)
    held = json.loads(on_branch(bare)["benchmarks.json"])
    assert set(held) == {"both", "gone", "added", "version"}
    assert held["both"]["version"] == "2"


def test_nothing_is_ever_deleted(desks):
    first, _, bare = desks
    fill(first, "t4", "a" * 40, f=[[1.0]])
    push(first, "t4")
    before = on_branch(bare)
    (first / ".asv/results/t4/aaaaaaaa-py.json").unlink()
    fill(first, "t4", "b" * 40, f=[[2.0]])
    push(first, "t4")
    assert set(before) < set(on_branch(bare))
    assert on_branch(bare)["t4/aaaaaaaa-py.json"] == before["t4/aaaaaaaa-py.json"]


def test_a_damaged_file_is_named_and_the_others_are_kept(desks):
    first, _, bare = desks
    fill(first, "t4", "a" * 40, f=[[1.0]])
    damaged = put(first, "t4/bbbbbbbb-py.json", '{"results": {')
    code, said = run("push", "--machine", "t4")
    assert code == 2
    assert said == f"projecta: cannot push all results: {damaged} holds no JSON. All others are pushed.\n"
    assert "t4/aaaaaaaa-py.json" in on_branch(bare)
    assert "t4/bbbbbbbb-py.json" not in on_branch(bare)


def test_a_link_is_not_followed(desks, tmp_path):
    first, _, bare = desks
    fill(first, "t4", "a" * 40, f=[[1.0]])
    secret = tmp_path / "secret.json"
    secret.write_text('{"secret": 1}')
    (first / ".asv/results/t4/cccccccc-py.json").symlink_to(secret)
    (first / ".asv/results/linked").symlink_to(first / ".asv/results/t4")
    push(first, None)
    assert {name.split("/")[0] for name in on_branch(bare)} == {"t4", "benchmarks.json", "benchmarks.ages"}
    assert "secret" not in str(on_branch(bare))


def test_a_push_of_several_folders_is_one_commit(desks, tmp_path, monkeypatch):
    """As in the job that pushes the uploads of several runners."""
    first, _, bare = desks
    brought = []
    for machine in ("t4", "a100"):
        fill(tmp_path / machine, machine, "a" * 40, **{machine: [[1.0]]})
        brought.append(str(tmp_path / machine / ".asv/results"))
    assert run("push", *brought)[0] == 0
    assert git(bare, "log", "--format=%s", "results") == "a100, t4: results\n"
    assert not (first / ".asv/results").exists()
    assert set(json.loads(on_branch(bare)["benchmarks.json"])) == {"t4", "a100", "version"}


def test_a_remote_that_always_refuses(desks, monkeypatch):
    first, _, bare = desks
    hook = bare / "hooks/pre-receive"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    fill(first, "t4", "a" * 40, f=[[1.0]])
    waits = []
    with pytest.raises(ValueError, match=r"10 pushes were refused: \[remote rejected\] .*declined"):
        push(first, "t4", pause=waits.append)
    assert len(waits) == 10
    assert max(waits) <= 10


def test_a_remote_that_is_not_there(desks):
    first, _, _ = desks
    fill(first, "t4", "a" * 40, f=[[1.0]])
    code, said = run("push", "--machine", "t4", "--remote", str(first / "nowhere"))
    assert code == 2
    assert said.startswith("projecta: cannot reach the remote: ")
    assert said.count("\n") == 1


def test_pull_names_the_base_of_the_gate(desks):
    """The newest measured commit before HEAD; else the parent of HEAD; else HEAD."""
    first, _, _ = desks
    hashes = [git(first, "rev-parse", "HEAD").strip()]

    def base():
        assert run("pull", "--machine", "t4", "--base", ".asv/base")[0] == 0
        return (first / ".asv/base").read_text().strip()

    assert base() == hashes[0]
    hashes += [commit(first, word) for word in ("two", "three", "four")]
    assert base() == hashes[2]
    for hash_ in (hashes[0], hashes[1], hashes[3]):
        fill(first, "t4", hash_, f=[[1.0]])
    assert base() == hashes[1]


def test_the_token_goes_to_its_address_alone_and_never_into_an_argument(desks, monkeypatch):
    first, _, _ = desks
    monkeypatch.setenv(branch.TOKEN, "s3cret")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "0")
    address = "https://example.org/a/b"
    there = branch.Remote(first, address)
    asked = ["config", "--get-urlmatch", "http.extraHeader"]
    assert there.git(first, *asked, address).stdout.startswith("Authorization: Basic ")
    assert there.git(first, *asked, "https://example.org/other").stdout == ""
    assert branch.TOKEN not in there.variables
    assert "Authorization" not in str(branch.Remote(first).variables)  # the remote is a folder
    code = "import sys; print(open(f'/proc/{sys.argv[1]}/cmdline').read())"
    shown = f'alias.show=!{sys.executable} -c "{code}" $PPID'
    assert "s3cret" not in there.git(first, "-c", shown, "show").stdout
