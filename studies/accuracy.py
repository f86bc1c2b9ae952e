"""Accuracy of a small Mamba on tasks that need memory, trained with the full scan and with MRSS.

The model is transformers' Mamba on projecta's scan: two layers of width 64, 16 states, trained from scratch.
"full" uses the full scan, the others MRSS with the bands of `SCANS`. Seeds are fixed; nothing is tuned.

`python -m studies.accuracy [FOLDER] [TASK...]` measures what mrss_accuracy_seeds.csv of the folder (results)
lacks, and writes mrss_accuracy.csv and .png from the results of all seeds.
"""

import csv
import functools
import io
import statistics
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from projecta.mrss import BANDS, Bands
from projecta.regress.store.provenance import record_provenance

SEEDS, JUDGED, BATCH, WIDTH, LAYERS = (0, 1, 2, 3, 4), 5120, 32, 64, 2
SCANS: dict[str, Bands | None] = {"full": None, "half per 8": BANDS}
TESTED = 256  # sequence length in the test of induction heads
IGNORE = -100  # ignore_index of cross_entropy: positions without an answer
Batch = tuple[torch.Tensor, torch.Tensor]
Compare = Callable[[str, int], dict[str, float]]  # the result with each scan, of a task and a seed


class Task(NamedTuple):
    """draw(count, generator, test) returns token ids (b, l), and the answer at each position or IGNORE."""

    draw: Callable[[int, torch.Generator, bool], Batch]
    vocabulary: int
    steps: int
    unit: str = "per cent right"


def copying(count: int, draw: torch.Generator, test: bool, l: int = 96, asked: int = 12) -> Batch:
    """Selective copying (Gu & Dao 2023, section 4.1.1): repeat the tokens that were hidden among blanks.

    Token 0 is blank, 1 asks for an answer, 2...15 are data.
    """
    ids = torch.zeros(count, l + asked, dtype=torch.long)
    where = torch.rand(count, l, generator=draw).argsort(1)[:, :asked].sort(1).values
    data = torch.randint(2, 16, (count, asked), generator=draw)
    ids.scatter_(1, where, data)
    ids[:, l:] = 1
    answers = torch.full_like(ids, IGNORE)
    answers[:, l:] = data
    return ids, answers


def induction(count: int, draw: torch.Generator, test: bool, l: int | None = None) -> Batch:
    """Induction heads (section 4.1.2): which token followed the first marker 0? Training length is 64."""
    l = l or (TESTED if test else 64)
    ids = torch.randint(1, 16, (count, l), generator=draw)
    first = torch.randint(0, l - 2, (count, 1), generator=draw)
    ids.scatter_(1, first, 0)
    ids[:, -1] = 0
    answers = torch.full_like(ids, IGNORE)
    answers[:, -1:] = ids.gather(1, first + 1)
    return ids, answers


def recall(count: int, draw: torch.Generator, test: bool, pairs: int = 6) -> Batch:
    """Multi-query associative recall (Arora et al. 2023): pairs of key and value, then every key again.

    Keys are 0...15, values 16...31. The answer to a key's second occurrence is its value.
    """
    keys = torch.rand(count, 16, generator=draw).argsort(1)[:, :pairs]
    values = torch.randint(16, 32, (count, pairs), generator=draw)
    again = torch.rand(count, pairs, generator=draw).argsort(1)
    ids = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, again)], 1)
    answers = torch.full_like(ids, IGNORE)
    answers[:, 2 * pairs :] = values.gather(1, again)
    return ids, answers


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(found.images).long()[order], torch.from_numpy(found.target).long()[order]


def digits(count: int, draw: torch.Generator, test: bool) -> Batch:
    """Scikit-learn's 1,797 digits pixel by pixel, shifted by up to one pixel; the last 597 are the test."""
    images, labels = _digits()
    low, high = (1200, len(images)) if test else (0, 1200)
    rows = torch.randint(low, high, (count,), generator=draw)
    moves = torch.randint(-1, 2, (count, 2), generator=draw).tolist()
    moved = [images[row].roll(tuple(move), (0, 1)).flatten() for row, move in zip(rows, moves, strict=True)]
    ids = torch.cat([torch.stack(moved), torch.full((count, 1), 17)], 1)
    answers = torch.full_like(ids, IGNORE)
    answers[:, -1] = labels[rows]
    return ids, answers


@functools.cache
def library_bytes() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the standard library's modules: every eighth is for the test, the others for training."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [b"".join(p.read_bytes() for p in group) for group in ([*_without(paths, 8)], paths[::8])]
    train, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, test


def _without(paths: list[Path], every: int):
    return (path for i, path in enumerate(paths) if i % every)


def language(count: int, draw: torch.Generator, test: bool, l: int = 256) -> Batch:
    """Predict the next byte in the source of Python's standard library."""
    text = library_bytes()[test]
    starts = torch.randint(0, len(text) - l - 1, (count, 1), generator=draw)
    window = text[starts + torch.arange(l + 1)].long()
    return window[:, :-1], window[:, 1:]


TASKS = {
    "selective copying": Task(copying, 16, 4000),
    "induction heads": Task(induction, 16, 1500),
    "associative recall": Task(recall, 32, 5000),
    "sequential digits": Task(digits, 18, 1500),
    "language": Task(language, 256, 1000, "bits per byte"),
}


def build(task: Task, seed: int):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=task.vocabulary, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=16,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return MambaForCausalLM(config)


def loss_of(model, ids: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=IGNORE)


def train(name: str, seed: int, mrss: Bands | None = None, steps: int | None = None):
    """The trained model, and the handle of the scan that it was trained with."""
    from projecta.mamba import accelerate

    task = TASKS[name]
    steps = steps or task.steps
    model, draw = build(task, seed).train(), torch.Generator().manual_seed(seed)
    handle = accelerate(model, mrss=mrss)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        loss = loss_of(model, *task.draw(BATCH, draw, False))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval(), handle


@torch.inference_mode()
def judge(name: str, model, count: int = JUDGED) -> float:
    """Per cent of answers that are right, or bits per byte, on `count` sequences of the test set."""
    task, draw = TASKS[name], torch.Generator().manual_seed(12345)
    hits, answers_given, losses = 0, 0, []
    for _ in range(0, count, 256):
        ids, answers = task.draw(256, draw, True)
        asked = answers != IGNORE
        logits = model(ids, use_cache=False).logits[asked]
        hits += int((logits.argmax(-1) == answers[asked]).sum())
        answers_given += int(asked.sum())
        losses.append(torch.nn.functional.cross_entropy(logits, answers[asked]).item())
    if task.unit == "bits per byte":
        return statistics.mean(losses) / 0.6931471805599453
    return 100 * hits / answers_given


def compare(name: str, seed: int, steps: int | None = None, count: int = JUDGED) -> dict[str, float]:
    """The result with each scan, by name."""
    found = {}
    for way, bands in SCANS.items():
        model, _ = train(name, seed, mrss=bands, steps=steps)
        found[way] = judge(name, model, count)
    return found


def draw_chart(rows: Sequence[tuple[str, str, Sequence[float]]]):
    """A figure of the change of each scan against the full one, by task, with one dot per seed.

    Args:
        rows: task, scan, and the value with each seed.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _, _ in rows))
    figure = Figure(figsize=(3.2 * len(names), 3.4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [(way, values) for task, way, values in rows if task == name]
        full = dict(mine)["full"]
        for i, (_, values) in enumerate(mine):
            changes = [v - f for v, f in zip(values, full, strict=True)]
            axis.plot(changes, [i] * len(changes), "o", alpha=0.6)
        axis.set_yticks(range(len(mine)), [way for way, _ in mine])
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"change, {TASKS[name].unit}", fontsize=8)
        axis.invert_yaxis()
    return figure


def measure(path: Path, names: Collection[str], seeds: Iterable[int], compare: Compare = compare) -> None:
    """Add the results of each task and seed that the file lacks. Those of a seed are written at once."""
    known = _read(path)
    for seed in seeds:
        for name in names:
            if (name, TASKS[name].steps, seed) in known:
                continue
            found = compare(name, seed)
            fresh = not path.exists()
            with path.open("a", newline="") as file:
                out = csv.writer(file)
                if fresh:
                    out.writerow(["task", "steps", "seed", "scan", "value"])
                for way, value in found.items():
                    out.writerow([name, TASKS[name].steps, seed, way, f"{value:.4f}"])
                    print(f"{name}, seed {seed}: {way} {value:.3f} {TASKS[name].unit}", flush=True)


def write_results(
    folder: Path, names: Collection[str], seeds: Iterable[int], compare: Compare = compare
) -> None:
    """Measure what is missing; write the table and the chart of all results in the folder."""
    each, means, chart = (folder / f"mrss_accuracy{end}" for end in ("_seeds.csv", ".csv", ".png"))
    measure(each, names, seeds, compare)
    rows: dict[tuple[str, str], list[float]] = {}
    for (name, _, _), found in sorted(_read(each).items()):
        for way, value in found.items():
            rows.setdefault((name, way), []).append(value)
    with means.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["task", "scan", "unit", "seeds", "mean", "change", "change, least", "change, most"])
        for (name, way), values in rows.items():
            changes = [v - f for v, f in zip(values, rows[name, "full"], strict=True)]
            numbers = (statistics.mean(values), statistics.mean(changes), min(changes), max(changes))
            out.writerow([name, way, TASKS[name].unit, len(values), *(f"{v:.3f}" for v in numbers)])
    figure = draw_chart([(name, way, values) for (name, way), values in rows.items()])
    figure.savefig(chart, dpi=120)
    record_provenance([each, means, chart], "nox -s accuracy")


def _read(path: Path) -> dict[tuple[str, int, int], dict[str, float]]:
    """Stored values by scan, for each task and seed. Results with other numbers of steps are left out."""
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    rows = csv.DictReader(io.StringIO(path.read_text()) if path.exists() else [])
    for row in rows:
        if row["task"] in TASKS and int(row["steps"]) == TASKS[row["task"]].steps:
            key = row["task"], int(row["steps"]), int(row["seed"])
            found.setdefault(key, {})[row["scan"]] = float(row["value"])
    return found


if __name__ == "__main__":
    place, *chosen = sys.argv[1:] or ["results"]
    write_results(Path(place), chosen or TASKS, SEEDS)
