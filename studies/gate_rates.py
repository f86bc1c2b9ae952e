"""Error rates of `projecta gate`: on identical code, and on commits with a planted slow-down.

`python -m studies.gate_rates gates KIND COUNT` runs real gates of three benchmarks in a clone of this
repository. It compares HEAD with an empty commit ("same"), or with a commit that makes the scan and the
pruned tower slower and the tower use more memory. `whole KIND COUNT` runs gates of all that the project gates
by itself, each of which the planted commit makes slower. `continuous KIND COUNT` runs asv continuous on the
commits of the first. Each gate adds rows to results/gate_rates.csv, and each pair of processes adds a row to
results/gate_pairs.csv. `summary` resamples 2,000 gates from the pairs of identical code, unchanged and with a
factor, and writes results/gate_summary.csv.
"""

import csv
import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from projecta.regress.store.provenance import record_provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
TIMED = {"scan": "scan.Scan.time_forward('cpu', 2048)", "vtp": "vtp.VtpSingle.time_forward('input 0.5', 1)"}
PEAK = "vtp.VtpPeak.track_peak_forward('input 0.5', 8)"
PATTERN = (
    "^(" + "|".join(label.replace("(", r"\(").replace(")", r"\)") for label in (*TIMED.values(), PEAK)) + ")$"
)
RESAMPLED = 2000
IMPROVED = "improved"
WHOLE = ", whole"  # marks gates of all that the project gates by itself
_SAID = {  # output of asv continuous: verdict
    "PERFORMANCE DECREASED": "REGRESSED",
    "PERFORMANCE INCREASED": IMPROVED,
    "NOT SIGNIFICANTLY CHANGED": "PASS",
}
_MARKS = {"+": "REGRESSED", "-": IMPROVED, "": "PASS"}
HEADER = ["gate", "planted", "benchmark", "verdict", "ratio", "pairs", "seconds"]
# Code of a planted commit: the outermost call waits for a share of its time, and holds memory while it runs.
_PLANT = """

import functools
import time

import torch

_inside = False


def slower(plain, share, size=0):
    @functools.wraps(plain)
    def planted(*args, **kwargs):
        global _inside
        if _inside:
            return plain(*args, **kwargs)
        _inside, start = True, time.perf_counter()
        gpu = torch.cuda.is_available()
        held = torch.ones(size, dtype=torch.uint8, device="cuda" if gpu else "cpu")
        try:
            found = plain(*args, **kwargs)
        finally:
            _inside = False
        if gpu:
            torch.cuda.synchronize()
        end = time.perf_counter() + share * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        del held
        return found

    return planted


"""
_FUNCTION = "\n\nfrom projecta._planted import slower\n\n{name} = slower({name}, {share})\n"
_VTP = """

from projecta._planted import slower

_plain_prune = prune


def prune(model, *args, **kwargs):
    handle = _plain_prune(model, *args, **kwargs)
    plain = type(model).forward.__get__(model)  # not what an earlier call put there
    model.forward = slower(plain, {share}, {size})
    return handle
"""
_TWO = {"projecta/_planted.py": _PLANT, "projecta/vtp/pruning.py": _VTP}
_TWO["projecta/scan/__init__.py"] = _FUNCTION.replace("{name}", "selective_scan")
_ALL = _TWO | {
    "projecta/_planted.py": _PLANT + "torch.autograd.grad = slower(torch.autograd.grad, {share})\n",
    "projecta/mrss/__init__.py": _FUNCTION.replace("{name}", "mrss_scan"),
    "projecta/s4d.py": _FUNCTION.replace("{name}", "s4d_scan"),
    "projecta/mamba/block.py": _FUNCTION.replace("{name}", "MambaBlock.forward"),
}
ONE_PERCENT = round(0.401 * 2**20)  # of the peak of 40.1 MiB, in bytes
KINDS = {  # name: share of time, bytes
    "same": (0.0, 0), **{f"+{s} %, +1 % memory": (s / 100, ONE_PERCENT) for s in (3, 5, 10)},
    "+5 MB": (0.0, 5 * 2**20),
}  # fmt: skip


def _git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=gate rates", "-c", "user.email=gate@rates.invalid"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def _clone(kind: str, plants: dict[str, str] = _TWO) -> tuple[Path, str, str]:
    """A clone with the planted commit; it uses this repository's environments. Returns folder, base, head."""
    folder = ROOT / ".asv/rates"
    if not folder.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    _git(folder, "fetch", "--quiet", "origin")
    base = _git(ROOT, "rev-parse", "HEAD")
    _git(folder, "checkout", "--quiet", "--force", "--detach", base)
    share, size = KINDS[kind]
    for path, text in plants.items() if share or size else ():
        plain = (folder / path).read_text() if (folder / path).exists() else ""
        (folder / path).write_text(plain + text.replace("{share}", str(share)).replace("{size}", str(size)))
    _git(folder, "add", "--all", "projecta")
    _git(folder, "commit", "--quiet", "--all", "--allow-empty", "--message", f"plant {kind}")
    head = _git(folder, "rev-parse", "HEAD")
    config = (folder / "asv.conf.json").read_text()
    (folder / "asv.conf.json").write_text(config.replace('".asv/env"', json.dumps(str(ROOT / ".asv/env"))))
    return folder, base, head


def _run(folder: Path, *words: str, bench: tuple[str, ...] = ("--bench", PATTERN)) -> Any:
    """Run a command on the three benchmarks, or on those that `bench` selects."""
    return subprocess.run([sys.executable, "-m", *words, *bench], cwd=folder, capture_output=True, text=True)


def _append(name: str, header: list[str], rows: list[list[object]]) -> None:
    from projecta.regress.project import machine

    path, processor = RESULTS / name, machine.state()["processor"]
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.writer(file)
        if fresh:
            out.writerow(["processor", *header])
        out.writerows([processor, *row] for row in rows)
    record_provenance([path], "nox -s rates")


def gates(kind: str, count: int, whole: bool = False) -> None:
    """Run real gates, one after the other; `whole`: of all that the project gates by itself."""
    from projecta.regress.run.case import Outcome
    from projecta.regress.run.pair import MOST

    name = f"{MOST} samples, set up at once" + (WHOLE if whole else "")
    folder, base, head = _clone(kind, _ALL if whole else _TWO)
    words = ["projecta", "gate", base, head, "--always", "--machine", "rates", "--json", "gate.json"]
    for _ in range(count):
        start = time.monotonic()
        (folder / "gate.json").unlink(missing_ok=True)
        done = _run(folder, *words, bench=()) if whole else _run(folder, *words)
        if not (folder / "gate.json").exists():
            sys.exit(f"gate_rates: the gate must give a verdict; got {done.stderr.strip().splitlines()[-1]}")
        found = json.loads((folder / "gate.json").read_text())
        seconds, rows, pairs = time.monotonic() - start, [], []
        for row in found["benchmarks"]:
            label = f"{row['name']}({', '.join(row['params'])})"
            timed = label in TIMED.values() or (whole and ".time_" in label)
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.4f}"  # None for a broken benchmark
            rows.append([name, kind, label, row["verdict"], ratio, row["pairs"], f"{seconds:.0f}"])
            if kind == "same" and timed:
                both = zip(row["base"], row["head"], strict=False)
                each = ((Outcome(**b).lower_quartile, Outcome(**h).lower_quartile) for b, h in both)
                pairs += [[name, label, f"{h / b:.5f}"] for b, h in each if b and h]
        _append("gate_rates.csv", HEADER, rows)
        _append("gate_pairs.csv", ["gate", "benchmark", "ratio"], pairs)
        print(f"{kind}: {found['verdict']} ({done.returncode}), {seconds:.0f} s", flush=True)


def continuous(kind: str, count: int) -> None:
    """Run asv continuous with its defaults on the same commits. Run `asv machine --yes` first."""
    name = f"asv {version('asv')}"
    folder, base, head = _clone(kind)
    for _ in range(count):
        start = time.monotonic()
        done = _run(folder, "asv", "continuous", base, head)
        seconds = f"{time.monotonic() - start:.0f}"
        verdict = next((own for words, own in _SAID.items() if words in done.stdout), None)
        if verdict is None:
            printed = (done.stdout + done.stderr).strip().splitlines()
            sys.exit(f"gate_rates: asv continuous must give a verdict; got {printed[-1]}")
        rows: list[list[object]] = [[name, kind, "asv continuous", verdict, "", "", seconds]]
        table = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
        changed = {row[5]: (row[1], row[4]) for row in table if len(row) == 7}  # name: mark, ratio
        for label in (*TIMED.values(), PEAK):
            mark, ratio = changed.get(label, ("", ""))
            rows.append([name, kind, f"asv continuous, {label}", _MARKS.get(mark, mark), ratio, "", seconds])
        _append("gate_rates.csv", HEADER, rows)
        print(f"{kind}: asv continuous {verdict}, {seconds} s", flush=True)


def summary() -> None:
    """Count the verdicts of real gates and of 2,000 resampled gates, by processor, gate and factor."""
    from projecta.regress.gate.statistics import REGRESSED, Design, judge_pairs

    pairs: dict[tuple[str, str], dict[str, list[float]]] = {}
    with (RESULTS / "gate_pairs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            own = pairs.setdefault((row["processor"], row["gate"]), {})
            own.setdefault(row["benchmark"], []).append(float(row["ratio"]))
    draw = random.Random(0)
    lines: list[list[object]] = []
    for measured, percent in itertools.product(sorted(pairs), (0, 3, 5, 10)):
        each: dict[str, Counter[str]] = {label: Counter() for label in pairs[measured]}
        design = Design(benchmarks=len(each) + 1 if measured[1].endswith(WHOLE) else 3)  # one of memory
        looks = sorted({*design.looks()[0], *design.looks()[1]})
        wrong = 0
        for _ in range(RESAMPLED):
            verdicts = set()
            for label, drawn_from in pairs[measured].items():
                ratios = [(1 + percent / 100) * draw.choice(drawn_from) for _ in range(design.most)]
                verdict = next(
                    (v for n in looks if (v := judge_pairs(ratios[:n], design).verdict)), "INCONCLUSIVE"
                )
                each[label][verdict] += 1
                verdicts.add(verdict)
            wrong += REGRESSED in verdicts
        planted = ["resampled", *measured, f"+{percent} %"]
        for label, counts in each.items():
            lines += [[*planted, label, verdict, found, RESAMPLED] for verdict, found in counts.most_common()]
        lines.append([*planted, "any", REGRESSED, wrong, RESAMPLED])
    with (RESULTS / "gate_rates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    of = ("processor", "gate", "planted", "benchmark")
    kinds = Counter((*(row[name] for name in of), row["verdict"]) for row in rows)
    totals = Counter(tuple(row[name] for name in of) for row in rows)
    for (*own, verdict), found in sorted(kinds.items()):
        lines.append(["real", *own, verdict, found, totals[tuple(own)]])
    with (RESULTS / "gate_summary.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["gates", "processor", "gate", "planted", "benchmark", "verdict", "count", "of"])
        out.writerows(lines)
    record_provenance([RESULTS / "gate_summary.csv"], "nox -s rates")
    for line in lines:
        print(*line)


MODES = {"gates": gates, "whole": partial(gates, whole=True), "continuous": continuous}


def main() -> None:
    if sys.argv[1:2] == ["summary"]:
        summary()
    elif len(sys.argv) == 4 and sys.argv[1] in MODES and sys.argv[2] in KINDS:
        MODES[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(f"gate_rates: say {', '.join(MODES)}, one of {', '.join(KINDS)}, and how many; or summary.")


if __name__ == "__main__":
    main()
