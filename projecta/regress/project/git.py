"""git: one command, commits by name, files that differ."""

import subprocess
from collections.abc import Collection
from pathlib import Path

from projecta._checks import fail
from projecta.regress.errors import UsageError, cannot


def run_git(folder: Path, *words: str) -> str:
    """Output of a git command; ValueError with git's reason if it fails."""
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["unknown reason"])[0].removeprefix("fatal: ")
        cannot(f"run git {words[0]}", reason)
    return done.stdout.rstrip()


def find_commits(root: Path, revisions: str | None, measured: Collection[str] = ()) -> list[str]:
    """Hashes of the commits to measure, newest first.

    None is HEAD and the commit before it; `A..B` the commits of a range along first parents; `NEW` those of
    the current branch since the last one that has results (HEAD if none has); anything else one commit.
    `measured` are the first eight digits of commits that have results.
    """
    if revisions is None:
        return run_git(root, "rev-list", "--first-parent", "--max-count=2", "HEAD").splitlines()
    if revisions == "NEW":
        line = run_git(root, "rev-list", "--first-parent", "HEAD").splitlines()
        newest = next((i for i, commit in enumerate(line) if commit[:8] in measured), None)
        return line[:1] if newest is None else line[:newest]
    words = [revisions] if ".." in revisions else ["--max-count=1", revisions]
    done = subprocess.run(
        ["git", "-C", str(root), "rev-list", "--first-parent", *words, "--"], capture_output=True, text=True
    )
    if done.returncode or revisions.startswith("-"):
        fail("projecta bench", "RANGE", "name commits of this repository", repr(revisions), error=UsageError)
    commits = done.stdout.split()
    if not commits:
        fail("projecta bench", "RANGE", "hold at least one commit", repr(revisions), error=UsageError)
    return commits


def find_commit(root: Path, revision: str) -> str:
    """The hash of one commit."""
    words = ["rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}"]
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    if done.returncode:
        rule = "name a commit of this repository"
        shallow = run_git(root, "rev-parse", "--is-shallow-repository").strip() == "true"
        remedy = "The clone is shallow: fetch the rest with git fetch --unshallow." if shallow else ""
        fail("projecta gate", "a revision", rule, repr(revision), remedy, error=UsageError)
    return done.stdout.strip()


def uncommitted(root: Path) -> list[str]:
    """Files that differ from HEAD, and so are not measured."""
    lines = run_git(root, "status", "--porcelain", "--untracked-files=all", "--", ":/").splitlines()
    return [line[3:] for line in lines]


def list_history(root: Path) -> list[str]:
    """Hashes of HEAD and all commits before it, newest first."""
    return run_git(root, "rev-list", "--topo-order", "HEAD").splitlines()
