"""Where published numbers come from: `provenance.json` beside the tables, one entry for each file.

An entry holds commit, date, processor or GPU, the versions of what was measured with, and `by`: the command
that repeats it.
"""

import datetime
import json
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from projecta.regress.project import machine

NAME = "provenance.json"
PACKAGES = ("torch", "numba", "triton", "transformers")


def read_provenance(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of a folder, by file; none if it has none."""
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def record_provenance(paths: Iterable[Path], by: str, facts: Mapping[str, Any] | None = None) -> None:
    """Write where these files, all of one folder, come from; entries of other files stay.

    `by` is the command that repeats them; `facts` are this process's unless given.
    """
    paths = list(paths)
    if not paths:
        return
    folder = paths[0].parent
    known = read_provenance(folder) | {path.name: {"by": by, **(facts or facts_here())} for path in paths}
    kept = {name: entry for name, entry in sorted(known.items()) if (folder / name).is_file()}
    (folder / NAME).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def facts_here(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Commit, date, machine and versions of this process."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    state = machine.state()
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "commit": done.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **{key: state[key] for key in ("processor", "processors", "gpu", "system") if key in state},
        "versions": versions,
    }
