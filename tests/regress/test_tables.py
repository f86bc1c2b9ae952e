"""Tables that a project declares: in the report, as files with their provenance, and on the start page."""

import csv
import json
from pathlib import Path

import pytest

from projecta.regress.project.config import Project
from projecta.regress.site import charts, tables
from projecta.regress.store.provenance import NAME, read_provenance
from projecta.regress.store.results import Measurement, read_measurements
from tests.regress import foreign
from tests.regress.foreign import run

TABLES = """
    def sections():
        from projecta.regress.site.tables import Custom, Lines, Section
        return [Section("sorting", "Sorting", [
            Lines("sort_time", "Time to sort", "time_ms", 1e3, "p1", {"suite.time_sort": "random"}, x="p0",
                  against="bubble"),
            Custom("fastest", "Fastest", fastest, "One line."),
        ])]

    def fastest(source):
        return [{"ms": 1e3 * min(m.value for m in source.measurements)}]
"""
SORTS = {"suite.time_sort": [[10, 100], ["bubble", "merge"]]}


@pytest.fixture
def project(workplace):
    foreign.make(workplace)
    foreign.commit(workplace, "zero")
    foreign.make_history(workplace, 3, SORTS, lambda name, k, i: [0.002, 0.001, 0.2, 0.01][k])
    (workplace / "pyproject.toml").write_text('[tool.projecta]\ntables = "tables.py"\n')
    (workplace / "tables.py").write_text(foreign.textwrap.dedent(TABLES))
    return workplace


def test_the_report_prints_and_writes_what_the_project_declares(project):
    code, text = run("report")
    assert code == 0
    assert "| random | bubble | 2 | 200 |" in text
    assert "| random | merge | 1 (2x) | 10 (20x) |" in text
    folder = project / ".asv/report"
    with (folder / "sort_time.csv").open() as file:
        assert [(r["p1"], r["p0"], r["time_ms"]) for r in csv.DictReader(file)] == [
            ("bubble", "10", "2.0"), ("bubble", "100", "200.0"), ("merge", "10", "1.0"), ("merge", "100", "10.0"),
        ]  # fmt: skip
    assert (folder / "sort_time.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "fastest.csv").read_text().split() == ["ms", "1.0"]
    assert foreign.git(project, "status", "--porcelain", "--untracked-files=all").split() == [
        "??", "pyproject.toml", "??", "tables.py",
    ]  # fmt: skip


def test_the_chart_of_lines_names_its_axes_and_its_lines(project):
    (section,) = tables.load_sections(project)
    table, newest = section.tables[0], tables.newest_commit(read_measurements(Project(project), "desk"), [])
    figure = table.draw(table.rows(tables.Source(newest, project)), charts.PRINT)
    (axis,) = figure.axes
    assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == ("random", "p0", "time (ms)")
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
    assert drawn == {"bubble": ([10, 100], [2.0, 200.0]), "merge": ([10, 100], [1.0, 10.0])}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["bubble", "merge"]


def test_each_file_names_where_it_comes_from(project):
    assert run("report", "--into", "results")[0] == 0
    (project / "results/other.csv").write_text("x\n1\n")
    known = json.loads((project / "results" / NAME).read_text())
    (project / "results" / NAME).write_text(json.dumps(known | {"other.csv": {"commit": "c"}}))
    assert run("report", "--into", "results")[0] == 0
    found = read_provenance(project / "results")
    assert set(found) == {"fastest.csv", "sort_time.csv", "sort_time.png", "other.csv"}
    head = foreign.git(project, "rev-parse", "HEAD").strip()
    entry = found["sort_time.csv"]
    assert (entry["commit"], entry["machine"], entry["processor"]) == (head, "desk", "a processor")
    assert entry["versions"] == {"python": "3.11"}
    assert entry["date"] == "2023-11-16"
    assert found["other.csv"] == {"commit": "c"}


def test_the_front_page_shows_them(project):
    assert run("publish")[0] == 0
    page = (project / ".asv/html/index.html").read_text()
    assert '<h2 id="sorting-title">Sorting</h2>' in page
    assert "Time to sort" in page
    assert "One line." in page
    assert (project / ".asv/html/data/desk/sort_time.csv").is_file()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def sections(: pass", "SyntaxError"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("x = 1", "has no attribute 'sections'"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_file_of_tables_that_cannot_be_read_is_named(project, text, reason):
    if text is None:
        (project / "tables.py").unlink()
    else:
        (project / "tables.py").write_text(text)
    code, said = run("report")
    assert code == 2
    assert said.startswith("projecta: cannot read the tables: tables.py: ")
    assert reason in said
    assert said.count("\n") == 1


def test_a_project_without_tables_has_a_page_and_an_empty_report(project):
    (project / "pyproject.toml").unlink()
    assert run("publish")[0] == 0
    code, text = run("report")
    assert code == 0
    assert "Machine desk, commit" in text
    assert not list((project / ".asv/report").glob("*.csv"))


OWN = Path(__file__).parents[2]


def at(benchmark, value, unit="seconds", **params):
    return Measurement("m", "e", "c" * 40, 0, benchmark, params, value, unit)


def test_projecta_s_own_tables_become_charts():
    rows = [
        at("scan.Scan.time_forward", 1e-3 * k, backend=backend, length=str(length))
        for backend in ("cpu", "vectorised") for k, length in ((1, 256), (2, 512), (4, 1024), (8, 2048))
    ]  # fmt: skip
    rows += [
        at("scan.ScanReference.time_forward", 0.1, backend="reference", length="512"),
        at("scan.ScanBound.track_peak_forward", 1.0, "MiB", length="256"),
        at("roofline.Bandwidth.track_copy", 20.0, "GB/s"), at("roofline.Arithmetic.track_product", 50.0, "Gop/s"),
        at("vtp.VtpFlops.track_flops_ratio", 0.496, "of the full tower", case="input 0.5"),
    ]  # fmt: skip
    for case, seconds in (("full", 0.9), ("input 0.7", 0.6), ("input 0.5", 0.4)):
        rows.append(at("vtp.Vtp.time_forward", seconds, case=case, batch="8"))
        rows.append(at("vtp.VtpPeak.track_peak_forward", 100 * seconds, "MiB", case=case, batch="8"))
    source = tables.Source(rows, OWN)
    found = {t.name: (t, t.rows(source)) for section in tables.load_sections(OWN) for t in section.tables}
    drawn = {
        name for name, (table, rows) in found.items() if rows and table.draw(rows, charts.PAGE) is not None
    }
    assert {
        "scan_time",
        "scan_memory",
        "scan_roofline",
        "clip_vtp_results",
        "vtp_targets",
        "mrss_accuracy",
    } <= drawn
    beside = {(row["change"], row["keep"]): row for row in found["vtp_targets"][1]}
    assert beside["latency", 0.5] == {"change": "latency", "keep": 0.5, "measured": -55.6, "target": -43.2}
    half = next(row for row in found["clip_vtp_results"][1] if row["variant"] == "input_0.5_b8")
    assert (half["flops_ratio"], half["latency_change"], half["memory_mib"]) == (0.496, -0.5556, 40.0)
    (cpu,) = (r for r in found["scan_roofline"][1] if r["backend"] == "cpu" and r["length"] == 256)
    assert cpu["gops"] == pytest.approx(13 * 256 * 16 * 256 / 1e-3 / 1e9, rel=1e-3)
    table, own = found["scan_time"]
    assert {row["backend"]: row["length 512"] for row in table.summary(own)} == {
        "cpu": "2 (50x)", "reference": "100", "vectorised": "2 (50x)",
    }  # fmt: skip
