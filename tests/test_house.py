"""Checks of the structure: light imports, their directions, sizes of files and functions, pins, extras."""

import ast
import contextlib
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
ARROWS = {  # part of the package: the parts that it may import
    "_checks": set(),
    "_backends": {"_checks"},
    "_operators": {"_checks"},
    "_cpu": set(),
    "_calls": {"_operators"},
    "_triton": {"_calls"},
    "scan": {"_backends", "_calls", "_checks", "_operators", "_cpu", "_triton"},
    "conv": {"_backends", "_calls", "_checks", "_operators", "_cpu", "_triton"},
    "mrss": {"_backends", "_calls", "_checks", "_operators", "_cpu", "_triton", "scan"},
    "parallel": {"_checks"},
    "mamba": {"_backends", "_calls", "_checks", "_operators", "_triton", "conv", "mrss", "parallel", "scan"},
    "compat": {"_checks", "conv", "mamba", "scan"},
    "vision_mamba": {"_checks", "conv", "mamba", "mrss", "scan"},
    "low_rank": {"_checks"},
    "s4d": {"_checks", "_operators", "scan"},
    "vtp": {"_checks"},
    "regress": {"_checks"},
    "__main__": {"regress"},
    "__init__": {"conv", "mamba", "mrss", "scan", "vtp"},  # for type checkers only
}


def room_of(path):
    return path.relative_to(ROOT / "projecta").parts[0].removesuffix(".py")


def imported(path):
    """The names that a file imports, wherever in its code, with the modules that they are from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_in_the_package_go_one_way():
    for path in (ROOT / "projecta").rglob("*.py"):
        room = room_of(path)
        for name in imported(path):
            assert not name.startswith(("benchmarks", "studies", "tests")), f"{path} imports {name}"
            parts = name.split(".")
            if parts[0] == "projecta" and len(parts) > 1 and parts[1] != room:
                assert parts[1] in ARROWS[room], f"{path} imports {name}"


INNER = {  # the same within projecta/regress
    "errors": set(),
    "project": {"errors"},
    "run": {"errors", "project"},
    "store": {"errors", "project", "run"},
    "gate": {"errors", "project", "run", "store"},
    "bench": {"errors", "project", "run", "store"},
    "site": {"errors", "project", "run", "store", "gate"},
    "cli": {"errors", "project", "run", "store", "gate", "bench", "site"},
}


def test_imports_in_regress_go_one_way():
    folder = ROOT / "projecta/regress"
    for path in folder.rglob("*.py"):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        for name in imported(path):
            parts = name.split(".")
            if parts[:2] == ["projecta", "regress"] and len(parts) > 2 and parts[2] != room:
                assert parts[2] in INNER[room], f"{path} imports {name}"


def test_files_and_functions_are_short():
    folders = (ROOT / "projecta", ROOT / "benchmarks", ROOT / "studies")
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        text = path.read_text()
        assert len(text.splitlines()) <= 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"


def test_suites_do_not_import_the_project_at_the_top():
    """asv puts only the suites on the path, and a commit may lack any module of projecta."""
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("projecta", "studies", "tests"), f"{path} imports {name}"


def in_fresh_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import projecta", {"torch", "numba", "triton", "transformers", "numpy", "asv"}),
        ("import projecta; projecta.selective_scan", {"numba", "transformers", "asv"}),
        (
            "import projecta.mrss, projecta.mamba, projecta.vtp",
            {"numba", "transformers", "asv"},
        ),
        ("import projecta.regress.cli", {"torch", "numpy", "asv", "matplotlib", "rich"}),
        (
            "import projecta.regress.store.export, projecta.regress.site.page, projecta.regress.gate.session",
            {"torch"},
        ),
        ("import benchmarks.scan, benchmarks.mrss", {"transformers", "skimage"}),
    ],
)
def test_imports_stay_light(statement, unwanted):
    loaded = in_fresh_process(f"import sys; {statement}; print(*sys.modules)").split()
    assert not unwanted & set(loaded)


def test_importing_the_suites_starts_nothing():
    code = "import threading, torch, benchmarks.scan, benchmarks.mrss, benchmarks.vtp; "
    assert in_fresh_process(
        code + "print(threading.active_count(), torch.cuda.is_initialized())"
    ).split() == ["1", "False"]


@pytest.mark.serial
def test_help_is_quick():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "projecta", "--help"], check=True, capture_output=True, cwd=ROOT
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_public_names_are_lazy_and_complete():
    import projecta

    for name in dir(projecta):
        assert getattr(projecta, name) is not None
    with pytest.raises(AttributeError, match="module 'projecta' has no attribute 'nothing'"):
        projecta.nothing  # noqa: B018


@pytest.fixture(scope="module")
def noxfile():
    with contextlib.chdir(ROOT):
        return importlib.import_module("noxfile")


def test_asv_and_the_tests_use_the_same_versions(noxfile):
    """asv.conf.json, the nox sessions and the extras have the same exact pins."""
    from asv.util import load_json

    config = load_json(str(ROOT / "asv.conf.json"), js_comments=True)
    pins = {name: versions[0] for name, versions in config["matrix"]["req"].items()}
    for name in ("torch", "numba", "transformers", "scikit-image"):
        assert f"{name}=={pins[name]}" in noxfile.PINNED
    assert f"asv_runner=={pins['asv_runner']}" in noxfile.EXTRAS["gate"]
    assert any(f"asv_runner=={pins['asv_runner']}" in command for command in config["install_command"])
    assert all("--no-deps" in command for command in config["install_command"])


def test_the_sessions_pin_a_package_to_one_version():
    nodes = ast.walk(ast.parse((ROOT / "noxfile.py").read_text()))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = [word.partition("==")[0] for word in words if "==" in word]
    assert sorted(names) == sorted(set(names))


def test_the_tested_range_holds_the_pins(noxfile):
    extras = noxfile.EXTRAS
    declared = " ".join([*extras["scan"], *extras["gpu"], *extras["models"]])
    pinned = {rule.name: rule.specifier for rule in map(Requirement, [*noxfile.PINNED, noxfile.TRITON])}
    for name, (low, high) in noxfile.TESTED.items():
        assert f"{name}>={low}" in declared
        (pin,) = pinned[name]
        assert pin.operator == "=="
        assert Version(low) <= Version(pin.version)
        assert Version(pin.version).release[:2] <= Version(high).release


def test_no_helper_has_the_name_of_a_benchmark():
    """asv collects every name with such a prefix as a benchmark."""
    collected = re.compile(r"^(time|timeraw|mem|peakmem|track)_|^(Time|Mem|PeakMem|Track)[A-Z_]")
    for node in ast.parse((ROOT / "benchmarks" / "common.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert not collected.match(node.name)


MISSING = {  # package: (code that needs it, extra that installs it)
    "torch": ("import projecta; projecta.selective_scan", "scan"),
    "click": ("import runpy; runpy.run_module('projecta', run_name='__main__')", "gate"),
}


@pytest.mark.parametrize("package", MISSING)
def test_a_missing_extra_is_named_in_one_line(package):
    use, extra = MISSING[package]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{package!r}] = None; {use}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1].endswith(f'Install it with: pip install "projecta[{extra}]"')
    if package == "click":
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
