"""The start page: change points, verdicts, machines, links and size."""

import csv
import json
import math
import random
import re
import time
from html.parser import HTMLParser

import pytest

from projecta.regress.gate import output
from projecta.regress.project.config import Project
from projecta.regress.project.git import list_history
from projecta.regress.run.build import cases
from projecta.regress.site import changepoints, charts, page
from projecta.regress.site.changepoints import Point, Series
from projecta.regress.store.results import NOISE, STATE, Measurement
from tests.regress import foreign
from tests.regress.foreign import run


class Links(HTMLParser):
    """Collects the links and ids of a page, and checks that its tags close."""

    VOID = ("meta", "link", "br", "img", "use", "path", "rect")

    def __init__(self, text):
        super().__init__()
        self.found, self.ids, self.open = [], set(), []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.found += [named[key] for key in ("href", "src") if key in named and tag not in ("use",)]
        if "id" in named:
            self.ids.add(named["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_links(folder):
    """Every link of projecta's pages leads to a file of the site, or to an id in the page."""
    for written in folder.glob("*.html"):
        if written.name in ("history.html", "error.html"):
            continue  # pages of asv
        links = Links(written.read_text())
        for link in links.found:
            path, _, place = link.partition("#")
            assert not re.match(r"\w+:|//", path), link
            if path:
                assert (folder / path).is_file(), link
            else:
                assert place in links.ids, link


@pytest.fixture
def project(workplace):
    foreign.make(workplace)
    foreign.commit(workplace, "one")
    return workplace


def grown(project, commits, axes, value, **settings):
    """Write the pages of a generated history, without those of asv."""
    foreign.make_history(project, commits, {"suite.Case.time_it": axes}, value, **settings)
    pages = project / ".asv/html"
    pages.mkdir(exist_ok=True)
    (pages / "history.html").write_text("")
    (pages / "swallow.ico").write_text("")
    page.write_pages(Project(project), pages, list_history(project))
    return pages


def test_steps_up_and_down_name_their_commit():
    def value(_, place, i):
        return (1.5 if i >= 20 else 1.0) if place == 0 else (0.5 if i >= 30 else 1.0)

    points = [tuple(Point(f"c{i}", i, value("", place, i)) for i in range(40)) for place in range(2)]
    up, down = (changepoints.steps(Series("x", (), "seconds", own)) for own in points)
    assert [(s.commit, s.change, s.worse) for s in up] == [("c20", 0.5, True)]
    assert [(s.commit, s.change, s.worse) for s in down] == [("c30", -0.5, False)]
    fast = changepoints.steps(Series("x", (), "GB/s", points[0], higher_is_better=True))
    assert not fast[0].worse  # higher is better


def test_a_step_that_goes_away_says_so():
    def one(i):
        return (1.1 if 20 <= i < 32 else 1.0) * (1 + 0.004 * (i * 7 % 5 - 2))

    points = tuple(Point(f"c{i}", i, one(i)) for i in range(60))
    up, down = changepoints.steps(Series("x", (), "seconds", points))
    assert (up.last, up.commit, up.gone) == ("c19", "c20", "c32")
    assert (down.commit, down.gone) == ("c32", "")
    assert min(up.confidence, down.confidence) > 0.99


def test_a_drift_has_no_commit():
    points = tuple(Point(f"c{i}", i, 1 + 0.001 * i + 0.002 * (i * 7 % 5 - 2)) for i in range(100))
    assert changepoints.steps(Series("x", (), "seconds", points)) == []


def test_values_that_are_not_positive_have_steps_too():
    points = tuple(Point(f"c{i}", i, float(i % 2) + 5 * (i >= 20)) for i in range(40))
    (step,) = changepoints.steps(Series("x", (), "", points))
    assert (step.commit, step.before, step.after) == ("c20", 0.5, 5.5)


def test_noise_is_no_step():
    draw, found = random.Random(0), 0
    for _ in range(50):
        points = tuple(Point(f"c{i}", i, math.exp(draw.gauss(0, 0.01))) for i in range(100))
        found += len(changepoints.steps(Series("x", (), "seconds", points)))
    assert found == 0


def test_a_series_follows_the_history_not_the_clock():
    def at(commit, date, value):
        return Measurement("m", "e", commit, date, "x", {}, value, "seconds")

    measured = [at("c", 1, 3.0), at("a", 3, 1.0), at("b", 2, 2.0), at("z", 9, 9.0)]
    found = changepoints.collect(measured, ["c", "b", "a"])
    assert [point.value for point in found[0].points] == [1.0, 2.0, 3.0]


def test_a_change_of_packages_is_not_blamed_on_a_commit(project):
    pages = grown(
        project, 40, [[1]], lambda *_: 1.0 if _[2] < 20 else 1.3,
        conditions=lambda i: {"torch": "2.12" if i < 20 else "2.13"},
    )  # fmt: skip
    text = (pages / "index.html").read_text()
    assert "not a commit's: torch 2.12 to 2.13" in text
    assert "machine or packages changed 1 time(s): dashed" in text
    with (pages / "data/desk/changes.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["cause"], float(row["change"])) == ("torch 2.12 to 2.13", pytest.approx(0.3))


def test_a_new_driver_is_not_blamed_on_a_commit(project):
    """The state of the machine is stored beside a commit's results."""
    pages = grown(project, 40, [[1]], lambda *_: 1.0 if _[2] < 20 else 1.3)
    assert "not a commit's" not in (pages / "index.html").read_text()
    for i, path in enumerate(sorted((project / ".asv/results/desk").glob("*-env.json"), key=_date)):
        path.with_suffix(STATE).write_text(json.dumps({"gpu": f"T4, driver {1 if i < 20 else 2}"}))
    page.write_pages(Project(project), pages, list_history(project))
    assert "not a commit's: gpu T4, driver 1 to T4, driver 2" in (pages / "index.html").read_text()


def _date(path):
    return json.loads(path.read_text())["date"]


@pytest.mark.parametrize("parameter", [True, None, 1e-05, "8"])
def test_the_noise_is_found_by_the_label_that_the_gate_uses(project, parameter):
    pages = grown(project, 5, [[parameter]], lambda *_: 1.0)
    assert "opacity: 0.15" not in (pages / "index.html").read_text()
    described = json.loads((project / ".asv/results/benchmarks.json").read_text())
    (case,) = cases({name: entry for name, entry in described.items() if name != "version"})
    (project / ".asv/results/desk" / NOISE).write_text(json.dumps({case.label: 0.01}))
    page.write_pages(Project(project), pages, list_history(project))
    assert "opacity: 0.15" in (pages / "index.html").read_text()


def test_every_link_leads_somewhere_and_machines_have_their_pages(project):
    grown(project, 5, [[1, 2]], lambda *_: 1.0)
    foreign.make_history(project, 5, {"suite.Case.time_it": [[1, 2]]}, lambda *_: 2.0, machine="rack")
    pages = project / ".asv/html"
    written = page.write_pages(Project(project), pages, list_history(project))
    assert [path.name for path in written] == ["index.html", "machine-desk.html"]
    check_links(pages)
    assert "rack (this page)" in (pages / "index.html").read_text()


def test_names_cannot_break_the_page(project):
    hostile = "<script>alert(1)</script>&\"'"
    pages = grown(project, 30, [[hostile]], lambda *_: 1.0 if _[2] < 15 else 2.0)
    text = (pages / "index.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    Links(text)


def test_the_verdict_of_the_projects_own_gate_is_on_the_page(project):
    (project / "pyproject.toml").write_text("[tool.projecta]\ngate = 'track_size'\n")
    foreign.commit(project, "two")
    assert run("gate", "HEAD^", "--machine", "desk")[0] == 3
    assert run("bench", "HEAD", "--machine", "desk", "--bench", "sleep")[0] == 0
    text = (project / ".asv/html/index.html").read_text()
    assert '<span class="verdict broken">BROKEN</span>' in text
    assert "RuntimeError: planted failure" in text
    (project / ".asv/results/desk" / output.LAST).unlink()
    assert run("gate", "HEAD", "HEAD", "--always", "--machine", "desk", "--bench", "track_size")[0] == 3
    assert not (project / ".asv/results/desk" / output.LAST).exists()  # not the whole gate
    check_links(project / ".asv/html")
    assert run("doctor")[0] == 0


def test_500_commits_of_300_series_make_a_small_page(project):
    draw = random.Random(0)
    start = time.monotonic()
    pages = grown(
        project, 500, [list(range(30)), list("abcdefghij")],
        lambda name, place, i: (1 + place) * math.exp(draw.gauss(0, 0.01)) * (1.2 if i > 400 and place % 3 == 0 else 1),
    )  # fmt: skip
    weight = sum((pages / name).stat().st_size for name in ("index.html", "page.css"))
    assert weight < 500_000
    assert time.monotonic() - start < 120
    with (pages / "data/desk/changes.csv").open() as file:
        assert sum(1 for _ in csv.DictReader(file)) == 100
    assert "(60 more)" in (pages / "index.html").read_text()


def test_a_drawing_takes_its_colours_from_the_page():
    drawn = charts.svg(charts.lines({"a": {"one": [(1, 1), (2, 2)], "two": [(1, 2), (2, 4)]}}, "x", "y"))
    assert "var(--line-1)" in drawn
    assert "var(--ink)" in drawn
    assert not re.search(r"#[ab]0000\d", drawn)
    assert 'width="' not in drawn[: drawn.index(">")]  # no fixed width, so it fits its container
    assert Links(drawn)
    bars = charts.svg(charts.bars({"": {"": {"one": 0.7194}}}, "y"))
    assert ">0.7194<" in bars  # coordinates are shortened, text is not
