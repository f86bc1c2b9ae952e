"""Writes the figures of README.md and docs/ from the files under results/, so that none is typed by hand.

`python -m studies.figures` rewrites each table between `<!-- figures: NAME -->` and `<!-- end -->`. NAME is a
function of this module or of `vision_figures`. With --check it changes nothing and fails if a table is out of
date.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from projecta.regress.store.provenance import read_provenance
from studies import vision_figures
from studies.cells import RESULTS, ROOT, Rows, mean, ms, read, table

BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.S)


def _against(case: str, name: str) -> dict[str, str]:
    (row,) = (r for r in read("against_transformers.csv") if (r["case"], r["implementation"]) == (case, name))
    return row


def headline() -> str:
    """Existing tools and projecta."""
    rows = []
    for case, name, label in (
        ("scan, forward", "transformers", "Selective scan of a mamba-130m layer, CPU, forward"),
        ("scan, forward + backward", "mambapy", "the same with gradients"),
    ):
        theirs, ours = _against(case, name), _against(case, "projecta")
        times = f"{float(theirs['times_as_fast']):.0f} times as fast"
        rows.append([label, f"{name}: {ms(theirs['median_ms'])}", f"{ms(ours['median_ms'])}: {times}"])
    gpu = read("against_mamba_ssm.csv")
    both = " and ".join(
        f"{mean(float(r[f'{kind}_times_as_fast']) for r in gpu):.2f}" for kind in ("forward", "both")
    )
    label = f"Selective scan, GPU, {len(gpu)} shapes and dtypes, forward and with gradients"
    rows.append([label, "mamba-ssm's CUDA kernel", f"{both} times as fast (geometric means)"])
    blocks = [r for r in read("block.csv") if r["dtype"] == "bfloat16" and r["projecta_both_ms"]]
    both = " and ".join(f"{mean(_gains(blocks, f'{kind}_ms')):.2f}" for kind in ("forward", "both"))
    label = f"Mamba block, GPU, bfloat16, {len(blocks)} shapes, the same"
    rows.append([label, "mamba-ssm's `Mamba`", f"{both} times as fast (geometric means)"])
    (step,) = (r for r in read("models.csv") if (r["model"], r["pass"]) == ("130m", "training"))
    (gain,) = _gains([step], "eager_ms")
    label = f"mamba-130m, GPU, bfloat16, a training step of {step['b']} x {step['l']} tokens"
    theirs = f"mamba-ssm's `MambaLMHeadModel`: {ms(step['mamba_ssm_eager_ms'])}"
    rows.append([label, theirs, f"{ms(step['projecta_eager_ms'])}: {gain:.2f} times as fast"])
    tower = {row["variant"]: row for row in read("clip_vtp_results.csv")}
    full, half = tower["baseline_b8"], tower["merge_0.5_b8"]
    cosine = vision_figures.fidelity_row("merge", "0.5", "natural")
    change = f"{100 * float(half['latency_change']):+.0f} % time, cosine {cosine}"
    rows.append(
        [
            "CLIP ViT-B/16 tower, CPU, batch 8, half of the FLOPs",
            f"the full tower: {ms(full['latency_ms'])}",
            f"{ms(half['latency_ms'])}: {change}",
        ]
    )
    clips = {row["tower"]: row["accuracy"] for row in read("joint_zero_shot.csv") if row["plan"] == "full"}
    label = "Small CLIP on Fashion-MNIST, zero-shot accuracy, three seeds"
    rows.append([label, f"with a ViT: {clips['ViT']} %", f"with a Vision Mamba: {clips['Vision Mamba']} %"])
    wrong, gates = _false_alarms("asv 0.6.6")
    ours_wrong, ours_gates = _false_alarms("samples")
    rows.append(
        [
            "A gate on identical code: false alarms",
            f"asv continuous: {wrong} of {gates}",
            f"{ours_wrong} of {ours_gates}",
        ]
    )
    return table(["", "today", "projecta"], rows)


def cpu_against() -> str:
    """The scan and whole models on a CPU."""
    rows = []
    for row in read("against_transformers.csv"):
        if row["implementation"] != "projecta":
            times = (
                f"{float(row['times_as_fast']):.3g} ({float(row['least']):.3g} to {float(row['most']):.3g})"
            )
            ours = _against(row["case"], "projecta")["median_ms"]
            rows.append([row["case"], row["implementation"], ms(row["median_ms"]), ms(ours), times])
    return table(["case", "today", "its time", "projecta", "times as fast (least to most)"], rows)


def cpu_limits() -> str:
    """A model on a CPU, and the limit by matrix products or by memory."""
    rows = [
        [
            f"{r['pass']}, {r['tokens']} token{'s' * (r['tokens'] != '1')}", r["bound"], ms(r["limit_ms"]),
            ms(r["median_ms"]), f"{100 * float(r['share']):.0f} %",
        ]
        for r in read("model_limits.csv")
    ]  # fmt: skip
    return table(["mamba-130m, float32", "limit", "at the limit", "projecta", "share of the limit"], rows)


def cpu_scan() -> str:
    """The scan by backend and length."""
    times, peaks = read("scan_time.csv"), read("scan_memory.csv")
    lengths = sorted({int(row["length"]) for row in times})
    peak = {(r["pass"], r["backend"]): r["memory_mib"] for r in peaks if r["length"] == str(lengths[-1])}
    found = {(r["pass"], r["backend"], int(r["length"])): r["time_ms"] for r in times}
    rows = [
        [
            kind,
            backend,
            *(ms(found[kind, backend, l]) if (kind, backend, l) in found else "" for l in lengths),
            f"{float(peak[kind, backend]):.0f} MiB" if (kind, backend) in peak else "",
        ]
        for kind, backend in sorted({key[:2] for key in found})
    ]
    bounds = {kind: value for (kind, backend), value in peak.items() if backend == "lower bound"}
    rows += [
        [kind, "least possible", *[""] * len(lengths), f"{float(v):.0f} MiB"]
        for kind, v in sorted(bounds.items())
    ]
    return table(["pass", "backend", *(f"l = {l}" for l in lengths), f"peak memory at {lengths[-1]}"], rows)


def lengths() -> str:
    """Time of a layer against length."""
    found = read("length_time.csv")
    columns = sorted({int(row["length"]) for row in found})
    cells = {(row["layer"], int(row["length"])): ms(row["time_ms"]) for row in found}
    rows = [
        [layer, *(cells.get((layer, l), "") for l in columns)]
        for layer in dict.fromkeys(r["layer"] for r in found)
    ]
    return table(["layer", *(f"l = {l}" for l in columns)], rows)


def gpu_means() -> str:
    """Time and memory against mamba-ssm's kernel, geometric means by dtype."""
    found, rows = read("against_mamba_ssm.csv"), []
    for title, column in (
        ("forward: times as fast", "forward_times_as_fast"),
        ("forward + backward: times as fast", "both_times_as_fast"),
        ("forward: memory ratio", "forward_memory_ratio"),
        ("forward + backward: memory ratio", "both_memory_ratio"),
    ):
        cells = [
            f"{mean(float(r[column]) for r in found if r['dtype'] == d):.2f}"
            for d in ("float16", "bfloat16", "float32")
        ]
        values = [float(r[column]) for r in found]
        rows.append([title, *cells, f"{mean(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"])
    return table(["projecta / mamba-ssm", "float16", "bfloat16", "float32", "all", "range"], rows)


def gpu_scan() -> str:
    """Every shape: kernel times."""
    rows = [
        [
            row["dtype"],
            f"{row['b']}, {row['d']}, {row['l']}",
            row["mamba_ssm_forward_ms"],
            row["projecta_forward_ms"],
            f"{float(row['forward_times_as_fast']):.2f}",
            row["mamba_ssm_both_ms"],
            row["projecta_both_ms"],
            f"{float(row['both_times_as_fast']):.2f}",
        ]
        for row in read("against_mamba_ssm.csv")
    ]
    head = ["dtype", "b, d, l", "forward: mamba-ssm (ms)", "projecta (ms)", "times as fast"]
    return table([*head, "both: mamba-ssm (ms)", "projecta (ms)", "times as fast"], rows)


def _gains(rows: Rows, column: str) -> list[float]:
    """mamba-ssm / projecta of a column, where both have it."""
    pairs = [(r.get(f"mamba_ssm_{column}"), r.get(f"projecta_{column}")) for r in rows]
    return [float(theirs) / float(ours) for theirs, ours in pairs if theirs and ours]


def gpu_block() -> str:
    """The block beside mamba-ssm's: geometric mean and least of the ratios."""
    rows = []
    for title, column in (
        ("forward, captured", "forward_ms"),
        ("forward, eager", "forward_eager_ms"),
        ("forward + backward, captured", "both_ms"),
        ("forward + backward, eager", "both_eager_ms"),
        ("forward + backward, peak memory", "both_mib"),
        ("one token, captured", "step_ms"),
        ("one token, eager", "step_eager_ms"),
    ):
        cells = []
        for dtype in ("bfloat16", "float32"):
            found = _gains([r for r in read("block.csv") if r["dtype"] == dtype], column)
            cells += [f"{mean(found):.2f}", f"{min(found):.2f}"]
        rows.append([title, *cells])
    return table(["mamba-ssm / projecta", "bfloat16", "least", "float32", "least"], rows)


def gpu_profile() -> str:
    """The kernels of one block: where the time of a pass goes."""
    rows: dict[tuple[str, str], list[float]] = {}
    found = [r for r in read("block_profile.csv") if (r["d_model"], r["b"], r["l"]) == ("768", "8", "2048")]
    for r in found:
        product = r["kernel"].startswith(("nvjet", "void cublas"))
        name = "matrix products" if product else r["kernel"].removeprefix("void ").partition("<")[0]
        rows.setdefault((r["pass"], name), []).append(float(r["us"]))
    whole = {kind: sum(float(r["us"]) for r in found if r["pass"] == kind) for kind in ("forward", "both")}
    lines = [
        [kind, f"`{name}`" if "_" in name or "conv" in name else name, len(us), f"{sum(us):.0f}",
         f"{100 * sum(us) / whole[kind]:.0f} %"]
        for (kind, name), us in sorted(rows.items(), key=lambda at: (at[0][0] == "both", -sum(at[1])))
        if sum(us) > 5
    ]  # fmt: skip
    return table(["pass", "kernel", "calls", "us", "share"], lines)


def gpu_models() -> str:
    """Whole models beside mamba-ssm's."""
    labels = {"generate": "`generate`, time for each new token"}
    rows = []
    for r in read("models.csv"):
        kind = "eager" if r["pass"] == "training" else "captured"
        column = f"{kind}_ms".replace("captured_", "")
        (gain,) = _gains([r], column)
        name = labels.get(r["pass"], f"{r['pass']}, {r['b']} x {r['l']} tokens, {kind}")
        rows.append(
            [r["model"], name, ms(r[f"mamba_ssm_{column}"]), ms(r[f"projecta_{column}"]), f"{gain:.2f}"]
        )
    return table(["model", "pass", "mamba-ssm", "projecta", "mamba-ssm / projecta"], rows)


def _alone_ms(model: str, layers: str, tokens: int) -> float:
    """One GPU's step on a sequence of so many tokens."""
    (row,) = (
        r
        for r in read("parallel.csv")
        if (r["model"], r["layers"], r["tokens"], r["ranks"]) == (model, layers, str(tokens), "1")
    )
    return float(row["step_ms"])


def _modelled_ms(
    piece_ms: float, layers: int, ranks: int, schedule: str, gigabytes: float, rate: float
) -> float:
    """The model of docs/parallel.md: a step of `ranks`, each with a piece that takes one GPU `piece_ms`."""
    from projecta.parallel import GATHER_COST, WAIT

    cost = GATHER_COST if schedule == "gather" else DRAG * (1 + WAIT * (ranks - 1) / layers)
    return piece_ms * cost + 2 * gigabytes * (ranks - 1) / ranks / rate * 1e3


DRAG = 1.03  # a rank that receives states: its kernels read them, and its copies wait for the network
LINK_GB_S = {"host": 150, "network": 40}  # of an all-reduce: measured, assumed


def parallel_steps() -> str:
    """Training steps of one sequence over several GPUs."""
    rows = []
    for r in read("parallel.csv"):
        whole = r["layers"] == str(LAYERS[r["model"]])
        if not whole or int(r["tokens"]) < 131_072:
            continue
        modelled = ""
        if r["schedule"] == "pass":
            piece = _alone_ms(r["model"], r["layers"], int(r["tokens"]) // int(r["ranks"]))
            sizes = int(r["layers"]), int(r["ranks"])
            modelled = ms(_modelled_ms(piece, *sizes, "pass", float(r["gradients_gb"]), LINK_GB_S["host"]))
        known = r["step_ms"] != ""
        rows.append([
            r["model"], f"{int(r['tokens']):,}", r["ranks"], r["schedule"], ms(r["step_ms"]) if known else "",
            modelled, r["speedup"], f"{100 * float(r['rate']):.0f} %" if known else "",
            f"{float(r['peak_mib']) / 1024:.1f} GiB" if known else r["peak_mib"],
        ])  # fmt: skip
    head = [
        "layers of",
        "tokens",
        "GPUs",
        "schedule",
        "step",
        "model",
        "speedup",
        "rate of a GPU",
        "memory of a GPU",
    ]
    return table(head, rows)


LAYERS = {"130m": 24, "2.8b": 64}


def parallel_outlook() -> str:
    """What the model says of more GPUs, at 262,144 tokens for each."""
    rows = []
    gigabytes = {r["model"]: float(r["gradients_gb"]) for r in read("parallel.csv") if int(r["layers"]) > 8}
    for model, layers in LAYERS.items():
        piece = _alone_ms(model, str(layers), 262_144)
        for ranks in (4, 8, 64, 1024):
            rate = LINK_GB_S["host" if ranks <= 8 else "network"]
            share = [
                piece / _modelled_ms(piece, layers, ranks, schedule, gigabytes[model], rate)
                for schedule in ("pass", "gather")
            ]
            rows.append([model, ranks, f"{ranks * 262_144:,}", *(f"{100 * s:.0f} %" for s in share)])
    text = (
        f"Averaging moves twice the gradients, at {LINK_GB_S['host']} GB/s within a host of 8 GPUs"
        f" (measured), and at {LINK_GB_S['network']} GB/s between hosts (assumed).\n\n"
    )
    return text + table(["layers of", "GPUs", "tokens", '"pass": rate of a GPU', '"gather"'], rows)


def mrss_accuracy() -> str:
    """Small models with the full scan, and the change with MRSS."""
    found = read("mrss_accuracy.csv")
    ways = ["half per 8"]
    cells = {(r["task"], r["scan"]): r for r in found}
    rows = []
    for task in dict.fromkeys(r["task"] for r in found):
        full = cells[task, "full"]
        changes = [
            f"{float(cells[task, way]['change']):+.2f}" if (task, way) in cells else "" for way in ways
        ]
        rows.append([task, full["unit"], f"{float(full['mean']):.2f}", *changes])
    return table(["task", "unit", "full scan", *ways], rows)


def mrss_time() -> str:
    """Time of MRSS against the full scan."""
    found = read("mrss_time.csv")
    columns = sorted({int(row["length"]) for row in found})
    cells = {(r["pass"], r["case"], int(r["length"])): ms(r["time_ms"]) for r in found}
    rows = [
        [kind, case, *(cells.get((kind, case, l), "") for l in columns)]
        for kind, case in dict.fromkeys((r["pass"], r["case"]) for r in found)
    ]
    return table(["pass", "scan", *(f"l = {l}" for l in columns)], rows)


def mrss_gpu() -> str:
    """MRSS beside the full scan on a GPU: times by replay of a CUDA graph, and relative to the full scan."""
    found = read("mrss_gpu.csv")
    inputs = ["dtype", "batch", "length", "last", "pass"]
    known = {(*(r[name] for name in inputs), r["scan"]): r for r in found}
    ways = [
        name for name in dict.fromkeys(r["scan"] for r in found) if name not in ("full scan", "half per 4")
    ]
    rows = []
    for key in dict.fromkeys(tuple(r[name] for name in inputs) for r in found):
        full, own = known[*key, "full scan"], known[*key, "half per 8"]
        dtype, batch, length, last, way = key
        shares = [float(known[*key, name]["graph_ms"]) / float(full["graph_ms"]) for name in ways]
        more = [float(own[name]) / float(full[name]) for name in ("peak_mib", "eager_ms")]
        rows.append(
            [f"{dtype}, b {batch}, l {length}, {last} last", way, ms(full["graph_ms"])]
            + [f"{share:.2f}" for share in (*shares, *more)]
        )
    return table(
        ["inputs", "pass", "full scan", *ways, "memory, half per 8", "called eagerly, half per 8"], rows
    )


def _false_alarms(tool: str) -> tuple[int, int]:
    """REGRESSED gates on identical code, and all gates. gate_rates.csv has several rows per gate."""
    by_gate: dict[tuple[str, str], list[str]] = {}
    last: dict[str, int] = {}
    for row in read("gate_rates.csv"):
        if row["planted"] != "same" or tool not in row["gate"]:
            continue
        if tool != "samples":
            if row["benchmark"] == "asv continuous":
                by_gate[row["gate"], str(len(by_gate))] = [row["verdict"]]
            continue
        key = row["benchmark"]
        last[key] = last.get(key, -1) + 1
        by_gate.setdefault((tool, str(last[key])), []).append(row["verdict"])
    return sum("REGRESSED" in verdicts for verdicts in by_gate.values()), len(by_gate)


def gate_alarms() -> str:
    """Real gates on identical code: asv continuous, and ours."""
    rows: list[list[object]] = []
    for tool, name in (("asv continuous", "asv 0.6.6"), ("projecta gate", "samples")):
        wrong, gates = _false_alarms(name)
        rows.append([tool, gates, wrong])
    return table(["tool", "gates", "REGRESSED"], rows)


def gate_rates() -> str:
    """Gates resampled from pairs of identical code, by processor and planted slow-down."""
    found = [r for r in read("gate_summary.csv") if r["gates"] == "resampled" and r["benchmark"] == "any"]
    rows = []
    for key in dict.fromkeys((r["processor"], r["gate"]) for r in found):
        own = {
            r["planted"]: f"{r['count']} of {r['of']}" for r in found if (r["processor"], r["gate"]) == key
        }
        rows.append(
            [
                key[0],
                key[1],
                *(own.get(p, "") for p in ("+0 %", "+3 %", "+5 %", "+10 %")),
            ]
        )
    return table(
        ["processor", "samples a side", "identical code", "+3 %, the tolerance", "+5 %", "+10 %"], rows
    )


def gate_whole() -> str:
    """Real gates of all that the project gates, by planted change and benchmark, as sampled last."""
    whole = [row for row in read("gate_rates.csv") if row["gate"].endswith("whole")]
    own: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in whole:
        if row["gate"] == whole[-1]["gate"]:
            own.setdefault((row["planted"], row["benchmark"]), []).append(row)
    verdicts, rows = ("REGRESSED", "INCONCLUSIVE", "PASS"), []
    for (planted, name), gates in own.items():
        counts = [sum(r["verdict"] == verdict for r in gates) for verdict in verdicts]
        ratios, pairs = [float(r["ratio"]) for r in gates], [int(r["pairs"]) for r in gates]
        spans = f"{min(ratios):.3f} to {max(ratios):.3f}", f"{min(pairs)} to {max(pairs)}"
        rows.append([planted, f"`{name}`", len(gates), *counts, *spans])
    return table(["planted", "benchmark", "gates", *verdicts, "head / base", "pairs"], rows)


def compat_tests() -> str:
    """mamba-ssm's and causal-conv1d's own tests against the names of projecta.compat."""
    rows = read("compat_tests.csv")
    return table(list(rows[0]), [list(row.values()) for row in rows])


def histories() -> str:
    """Change points: precision and recall on histories whose steps are known, by judge."""
    rows = []
    found = read("histories.csv")
    for name in dict.fromkeys(r["judge"] for r in found):
        own = {r["kind"]: r for r in found if r["judge"] == name}
        false = sum(int(r["found"]) - int(r["right"]) for kind, r in own.items() if r["true steps"] == "0")
        recall = [f"{int(own[f'step of {p} %']['right'])}" for p in (2, 3, 5, 10)]
        gone, whole = own["step that goes away"], own["all"]
        rows.append(
            [name, whole["precision"], whole["recall"], *recall, f"{gone['right']} of {gone['true steps']}",
             false, whole["ms a history"]]
        )  # fmt: skip
    steps = [f"{p} %, of {found[0]['histories']}" for p in (2, 3, 5, 10)]
    head = [
        "change points by",
        "precision",
        "recall",
        *steps,
        "goes away",
        "false, of 200",
        "ms",
    ]
    return table(head, rows)


def provenance() -> str:
    """Where each file under results/ comes from."""
    rows = []
    for name, entry in read_provenance(RESULTS).items():
        versions = ", ".join(f"{package} {version}" for package, version in entry.get("versions", {}).items())
        machine = entry.get("gpu") or entry.get("processor", "")
        rows.append([f"`{name}`", entry["commit"][:8], entry["date"], machine, versions, entry.get("by", "")])
    return table(["file", "commit", "date", "processor or GPU", "versions", "repeat with"], rows)


FIGURES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        headline,
        cpu_against,
        cpu_scan,
        cpu_limits,
        lengths,
        gpu_means,
        gpu_scan,
        gpu_block,
        gpu_profile,
        gpu_models,
        parallel_steps,
        parallel_outlook,
        vision_figures.vtp,
        vision_figures.fidelity,
        vision_figures.zero_shot,
        vision_figures.joint,
        vision_figures.vision_time,
        vision_figures.vision_gpu,
        vision_figures.vision_pruned,
        mrss_accuracy,
        mrss_time,
        mrss_gpu,
        gate_alarms,
        gate_rates,
        gate_whole,
        compat_tests,
        histories,
        provenance,
    )
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """The page with its tables filled from results/."""
    return BLOCK.sub(lambda block: block[1] + FIGURES[block[2]]() + block[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    check, stale = parser.parse_args().check, []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new, encoding="utf-8")
    print(
        "\n".join(f"{'out of date' if check else 'wrote'}: {name}" for name in stale)
        or "All figures are up to date."
    )
    sys.exit(bool(stale and check))


if __name__ == "__main__":
    main()
