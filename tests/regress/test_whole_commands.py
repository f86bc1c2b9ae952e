"""The gate of whole commands, in a repository that is no asv project."""

import json
import sys

import pytest

from projecta.regress.run import pair
from tests.regress.foreign import git, run

MAKEFILE = """
tool: tool.c
\t$(CC) -O1 -o tool tool.c
"""
TOOL = """
#include <stdlib.h>
#include <unistd.h>
int main() {
    size_t size = (size_t)MIB << 20;
    volatile char *room = malloc(size);
    for (size_t i = 0; i < size; i += 512) room[i] = 1;
    usleep(MS * 1000);
    return room[0] != 1;
}
"""


@pytest.fixture
def tool(workplace):
    """A tool in C: the second commit sleeps for longer, the third needs more memory."""
    (workplace / "Makefile").write_text(MAKEFILE)
    git(workplace, "init", "--quiet", "--initial-branch", "main")
    for ms, mib in ((20, 8), (60, 8), (20, 12)):
        text = TOOL.replace("MIB", str(mib)).replace("MS", str(ms))
        (workplace / "tool.c").write_text(text)
        git(workplace, "add", "--all")
        git(workplace, "commit", "--quiet", "--message", f"{ms} {mib}")
    return workplace


def judged(tool, head, name):
    """Exit code, verdict and ratio of the tool's time or peak between its first commit and `head`."""
    words = ("--build", "make", "--command", "./tool", "--json", "out.json", "--bench")
    code, _ = run("gate", "HEAD^^", head, *words, name)
    (row,) = json.loads((tool / "out.json").read_text())["benchmarks"]
    return code, row["verdict"], row["ratio"]


@pytest.mark.serial
def test_a_slower_command_is_found(tool, monkeypatch):
    monkeypatch.setattr(pair, "MOST", 2)
    *verdict, ratio = judged(tool, "HEAD^", "time")
    assert verdict == [1, "REGRESSED"]
    assert 1.2 < ratio < 3


@pytest.mark.serial
def test_a_larger_command_is_found(tool, monkeypatch):
    monkeypatch.setattr(pair, "MOST", 2)
    assert judged(tool, "HEAD^", "peak")[:2] == (0, "PASS")
    *verdict, ratio = judged(tool, "HEAD", "peak")
    assert verdict == [1, "REGRESSED"]
    assert 1.4 < ratio < 1.55
    assert git(tool, "status", "--porcelain") == "?? out.json\n"  # what it writes is ignored


def test_what_fails_says_why(tool):
    code, text = run("gate", "HEAD^", "HEAD", "--command", "./nothing", "--json", "out.json")
    assert code == 3
    rows = json.loads((tool / "out.json").read_text())["benchmarks"]
    assert all("exit code 127: sh: " in row["reason"] for row in rows), rows
    code, text = run("gate", "HEAD^", "HEAD", "--build", "make other", "--command", "./tool")
    assert code == 3
    assert "does not build: `make other` ended with 2" in text
    assert run("gate", "HEAD^", "HEAD", "--build", "make") == (
        2, "projecta gate: --build must be given with --command or --pytest; got 'make'.\n"
    )  # fmt: skip


def test_a_repository_is_needed(workplace):
    code, text = run("gate", "HEAD^", "HEAD", "--command", f"{sys.executable} -c pass")
    assert code == 2
    assert "cannot find the repository" in text


def test_the_same_commit_is_identical(tool):
    code, text = run("gate", "HEAD", "HEAD", "--build", "make", "--command", "./tool")
    assert (code, "identical" in text) == (0, True)
