"""Checks of the documentation: figures match results/, examples print their comments, links exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from studies import figures

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in figures.pages()}
PROSE = {
    name: re.sub(r"```.*?```", "", figures.BLOCK.sub("", text), flags=re.S) for name, text in PAGES.items()
}
FIGURE = re.compile(
    r"(?<![\w.])\d[\d.,]*(?: to \d[\d.,]*)? ?(?:ms|us|s|MiB|GiB|MB|GB|images/s|%|times as fast)(?!\w)"
)
SETTINGS = {  # settings and requirements, not measurements
    "docs/gate.md": {"40 ms", "12 ms", "2 %", "95 %", "1 %", "5 %", "0 s"},
    "docs/benchmark.md": set(),
}
NOT_MEASURED = ("docs/runner.md", "docs/security.md")  # requirements and limits


@pytest.mark.parametrize("name", PAGES)
def test_figures_are_those_of_the_results(name):
    assert figures.filled(PAGES[name]) == PAGES[name], "run python -m studies.figures"


@pytest.mark.parametrize("name", PAGES)
def test_no_figure_is_typed_by_hand(name):
    if name not in NOT_MEASURED:
        assert set(FIGURE.findall(PROSE[name])) <= SETTINGS.get(name, set())


def test_a_figure_typed_by_hand_is_found():
    for text in ("It takes 12.5 ms.", "a peak of 40 MiB", "134 to 164 times as fast", "saves 35 %"):
        assert FIGURE.search(text)


def test_every_published_table_names_where_it_comes_from():
    known = figures.read_provenance(figures.RESULTS)
    for path in sorted(figures.RESULTS.iterdir()):
        if path.suffix in (".csv", ".png"):
            entry = known[path.name]
            assert re.fullmatch(r"[0-9a-f]{40}", entry["commit"]), path.name
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"]), path.name
            assert entry.get("processor") or entry.get("gpu"), path.name
            assert entry["by"], path.name


@pytest.mark.parametrize("name", PAGES)
def test_numbers_have_a_leading_zero(name):
    assert re.findall(r"(?<![\w.)\]*/`{}-])\.\d+", PROSE[name]) == []


RUN = """
import contextlib, io, re, sys
for name in sys.argv[1:]:
    for block in re.findall(r"```python\\n(.*?)```", open(name).read(), re.S):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, name, "exec"), {})
        expected = re.findall(r"^ *print\\(.*\\)  # (.*)$", block, re.M)
        assert said.getvalue().splitlines() == expected, (name, said.getvalue(), expected)
"""


@pytest.mark.parametrize(
    "pages",
    [
        ["README.md", "docs/mamba.md", "docs/mrss.md", "docs/pruning.md", "docs/vision_mamba.md"],
        ["docs/compat.md"],
    ],
    ids=["pages", "compat"],
)
def test_examples_print_their_comments(pages):
    done = subprocess.run([sys.executable, "-c", RUN, *pages], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[name]):
        assert (folder / link).exists(), link


def test_sessions_and_commands_exist():
    from projecta.regress.cli import cli

    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.M))
    for name in [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]:
        text = (ROOT / name).read_text()
        assert set(re.findall(r"nox -s (\w+)", text)) <= sessions, name
        if name == "CHANGELOG.md":  # it also names removed commands
            continue
        commands = set(re.findall(r"^(?:\$ )?projecta ([a-z]+)", text, re.M)) | set(
            re.findall(r"`projecta ([a-z]+)", text)
        )
        assert commands <= set(cli.commands), name


def test_the_readme_is_one_page():
    text = figures.BLOCK.sub("", PAGES["README.md"])
    assert len(PAGES["README.md"].split()) <= 900
    assert len(re.findall(r"^\|[-|]+\|$", PAGES["README.md"], re.M)) <= 3
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        assert len(block.strip().splitlines()) <= 6


def test_the_tested_range_is_stated():
    import tomllib

    tested = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["projecta"]["tested"]
    for name, (low, high) in tested.items():
        assert f"{name} {low} to {high}" in PAGES["README.md"]
        assert f"| {name} | {low} | {high} |" in PAGES["docs/mamba.md"]
