"""Run the nox sessions of benchmarks.yml on this machine, in their order, for two commits.

    python .github/rehearse.py [--bench REGEX] [--folder FOLDER]

A bare clone replaces the remote. The sessions run in a clone of it with the commands of the workflow, first
for the commit before HEAD, then for HEAD. Only the options for a GPU are left out. At the end, the branch of
results and the pages must hold both commits. GitHub's artifacts, permissions and events are not rehearsed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github/workflows/benchmarks.yml"
BENCH = r"^scan\.(Scan|ScanPeak)\.\w+\('cpu', 2048\)"  # a timing and a peak
WITHOUT_GPU = ("preflight -- --gpu --lock --wait 600", "preflight -- --load 1000")


def sessions(text: str) -> list[str]:
    """The commands of a workflow that call nox sessions, in order.

    >>> sessions("jobs: {a: {steps: [{run: pip install nox && nox -s lint}, {run: ls}]}}")
    ['nox -s lint']
    """
    steps = [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]
    found = (re.search(r"nox -s \w+.*", step.get("run", "")) for step in steps)
    return [match[0] for match in found if match]


def git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def rehearse(source: Path, folder: Path, bench: str = "") -> Path:
    """Run the sessions in a clone below `folder`; return the clone. Raises if one fails."""
    bare, clone = folder / "remote.git", folder / "clone"
    commits = git(source, "rev-list", "--first-parent", "--max-count=2", "HEAD").split()[::-1]
    git(source, "clone", "--quiet", "--bare", str(source), str(bare))
    git(source, "clone", "--quiet", str(bare), str(clone))
    own = {"MACHINE": "t4", "RANGE": "NEW", "PROJECTA_BENCH": bench}
    own["GITHUB_STEP_SUMMARY"] = str(folder / "summary.md")
    for commit in commits:
        git(clone, "checkout", "--quiet", "--detach", commit)
        for command in sessions(WORKFLOW.read_text()):
            if "nox -s push" in command:  # GitHub's artifact carries the results to a job that may write
                shutil.copytree(clone / ".asv/results", clone / "incoming/t4", dirs_exist_ok=True)
            command = command.partition(" #")[0].replace(*WITHOUT_GPU)
            print(f"$ {command}", flush=True)
            words = ["bash", "-eo", "pipefail", "-c", command]
            subprocess.run(words, cwd=clone, env=os.environ | own, check=True)
    held = git(bare, "ls-tree", "-r", "--name-only", "results").split()
    pages = json.loads((clone / ".asv/html/index.json").read_text())["revision_to_hash"].values()
    for commit in commits:
        assert any(name.startswith(f"t4/{commit[:8]}-") for name in held), f"the branch lacks {commit}"
        assert commit in pages, f"the pages lack {commit}"
    return clone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bench", default=BENCH, help="benchmarks to measure")
    parser.add_argument("--folder", type=Path, help="keep the clone there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rehearse(ROOT, folder, arguments.bench)
    print("Both commits are on the branch of results and on the pages.")


if __name__ == "__main__":
    main()
